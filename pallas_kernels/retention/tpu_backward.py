"""The backward kernel of retention on a TPU: one pass, backward in time, over q, k, v and the gradient of out.

A block of tokens starts from the state that the forward kernel saved before it, runs the states of its chunks forward into VMEM, then goes
through its chunks backward with R, the gradient of the state, which stays in VMEM. Per chunk, with o for the gradient of out and pairs
that lie [s, t]:
  W = pair * k q^T, U = pair * v o^T,   O = read * o, V = write * v
  dq = U^T k + O S^T,   dk = U q + V R^T,   dv = W o + write * (k R),   R <- keep * R + q^T O
and, for the decay (`tpu_decay`), the terms W * v o^T, q * (O S^T), k * (V R^T), keep * S * R. By token they become rows e, f, z as
`tpu_plan.decay_gradient` sums them; A = W * v o^T without its diagonal:
  e_t = (sum of A over s) - (sum of A over t, of s = t) + q . (O S^T),   f_s = k . (V R^T),   z = keep <S, R>
"""
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.retention.tpu_decay import Terms, add_kept, add_pairs, add_reads, add_writes, scratch, write_rows, write_total
from pallas_kernels.retention.tpu_factors import (
    chunk_tokens,
    dot,
    factors,
    fill,
    first,
    last,
    only_head,
    only_valid,
    outer,
    own_state,
    scaled,
    side_by_side,
    tables,
    wide,
)
from pallas_kernels.retention.tpu_forward import each_chunk, specs


def backward(q, k, v, decay, saved, grad_out, grad_final, plan, with_decay, interpret):
    """Returns (dq, dk, dv, d initial state, with `with_decay` what `decay_gradient` takes [rows, heads together, 8, tokens or 128]).

    saved: states before each block [rows, blocks, ...], or None for zeros where there is one block.
    """
    heads, shape = plan.rows, (plan.key_lanes, plan.value_lanes)
    tokens, state, decays = specs(plan, backwards=True)
    keys, values = tokens(plan.key_lanes), tokens(plan.value_lanes)
    before = pl.BlockSpec((plan.U, None, *shape), lambda h, c: (h, plan.blocks - 1 - c, 0, 0))
    out_specs = [keys, keys, values, state]
    out_shape = [*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)), jax.ShapeDtypeStruct((heads, *shape), jnp.float32)]
    if with_decay:
        by_token = pl.BlockSpec((plan.U, plan.together, 8, plan.block), lambda h, c: (h, 0, 0, plan.blocks - 1 - c))
        out_specs.append(by_token if plan.by_token else pl.BlockSpec((plan.U, plan.together, 8, 128), lambda h, c: (h, 0, 0, 0)))
        out_shape.append(jax.ShapeDtypeStruct((heads, plan.together, 8, plan.blocks * plan.block if plan.by_token else 128), jnp.float32))
    has_saved = saved is not None
    flops = 10 * heads * plan.time * (plan.together * plan.C * (plan.key_lanes + plan.value_lanes) // 2 + plan.key_lanes * plan.value_lanes)
    return pl.pallas_call(
        side_by_side(functools.partial(_kernel, plan=plan, has_saved=has_saved, with_decay=with_decay), plan),
        grid=(plan.rows // plan.U, plan.blocks),
        in_specs=[decays, *[before] * has_saved, state, keys, keys, values, values],
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=[pltpu.VMEM((plan.U, *shape), jnp.float32), pltpu.VMEM((plan.U, plan.K, *shape), q.dtype), *tables(plan),
                        *scratch(plan, with_decay, q.dtype)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=4 * q.nbytes + 3 * v.nbytes),
        interpret=interpret,
        name="retention_backward",
    )(decay, *[saved] * has_saved, grad_final, q, k, v, grad_out)


def _kernel(decay_ref, *refs, plan, has_saved, with_decay):
    refs = list(refs)
    saved_ref = refs.pop(0) if has_saved else None
    final_ref, q_ref, k_ref, v_ref, o_ref, dq_ref, dk_ref, dv_ref, grad_ref = refs[:9]
    decay_grad_ref = refs[9] if with_decay else None
    state_ref, states_ref, *rest = refs[9 + with_decay:]
    tables_end = len(tables(plan))
    table_refs, terms = rest[:tables_end], rest[tables_end:]
    if with_decay:
        terms = Terms(*terms, decay_grad_ref) if plan.by_token else Terms(*terms)
    c = pl.program_id(1)

    @first(c, plan)
    def _():
        grad_ref[...] = final_ref[...]
        if not plan.by_token:
            fill(table_refs, decay_ref, plan, keys_first=True)
            for ref in terms:
                ref[...] = jnp.zeros(ref.shape, jnp.float32)

    block = plan.blocks - 1 - c
    state_ref[...] = jnp.zeros(state_ref.shape, jnp.float32) if saved_ref is None else saved_ref[...]
    each_chunk(block, plan, functools.partial(_state, decay_ref, k_ref, v_ref, state_ref, states_ref, table_refs, plan))
    each_chunk(block, plan, functools.partial(_chunk, decay_ref, (q_ref, k_ref, v_ref, o_ref), (dq_ref, dk_ref, dv_ref), grad_ref, terms,
                                              states_ref, table_refs, plan), reverse=True)
    if with_decay and plan.by_token:
        each_chunk(block, plan, functools.partial(write_rows, terms, plan))
    elif with_decay:
        last(c, plan)(lambda: write_total(decay_grad_ref, terms, plan))


def _state(decay_ref, k_ref, v_ref, state_ref, states_ref, table_refs, plan, i, valid):
    """Keeps the state before chunk i."""
    state = state_ref[...]
    states_ref[i] = state.astype(states_ref.dtype)
    if isinstance(i, int) and i == plan.K - 1:
        return
    rows = chunk_tokens(i, plan)
    f = factors(decay_ref, table_refs, i, valid, plan, k_ref.dtype, keys_first=True)
    k, v = only_valid(k_ref[rows], valid), only_valid(v_ref[rows], valid)
    state_ref[...] = state * f.keep + own_state(outer(k, f.write_key, f.write_turned, v), plan)


def _chunk(decay_ref, ins, outs, grad_ref, terms, states_ref, table_refs, plan, i, valid):
    rows = chunk_tokens(i, plan)
    f = factors(decay_ref, table_refs, i, valid, plan, ins[0].dtype, keys_first=True)
    q, k, v, o = (only_valid(ref[rows], valid) for ref in ins)
    dtype = q.dtype
    state, grad = states_ref[i], grad_ref[...]
    rounded = grad.astype(dtype)
    dq = dk = dv = 0.0
    for j in range(plan.together):
        own_q, own_k, own_o = (only_head(x, j, plan) for x in (q, k, o))
        weights = dot(k, own_q, (1, 1)) * f.pair[j]
        products = dot(v, own_o, (1, 1))
        if terms:
            add_pairs(terms, j, rows, weights * products, plan)
        scores = (products * f.pair[j]).astype(dtype)
        dv += dot(weights.astype(dtype), own_o)
        dk += dot(scores, own_q)
        dq += dot(scores, own_k, (0, 0))
    # Products with states come last: they wait for nothing, and the compiler, which keeps this order, would fill the registers with them.
    read = scaled(o, f.read_value, dtype)
    grad_ref[...] = grad * f.keep + own_state(dot(q, read, (0, 0)), plan)
    dk_state = dot(scaled(v, f.write_value, dtype), rounded, (1, 1))
    if terms:
        add_writes(terms, rows, valid, dk_state * k.astype(jnp.float32), plan)
    outs[1][rows] = (dk + dk_state).astype(dtype)
    dv_state = dot(k, rounded)
    outs[2][rows] = (dv + dv_state * wide(f.write_value, dv_state.shape[1])).astype(dtype)
    dq_state = dot(read, state, (1, 1))
    if terms:
        add_reads(terms, rows, dq_state * q.astype(jnp.float32), plan)
        add_kept(terms, rows, valid, jnp.sum(state.astype(jnp.float32) * (grad * f.keep), axis=0, keepdims=True), plan)
    outs[0][rows] = (dq + dq_state).astype(dtype)

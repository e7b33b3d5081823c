"""The backward kernel of retention on a TPU: one pass, backward in time, over q, k, v and the gradient of out.

A block of tokens starts from the state that the forward kernel saved before it, runs the states of its chunks forward into VMEM, then goes
through its chunks backward with R, the gradient of the state, which stays in VMEM. Per chunk, with o for the gradient of out:
  W = pair * q k^T, U = pair * o v^T
  dq = U k + read * (o S^T),   dk = U^T q + write * (v R^T),   dv = W^T o + write * (k R),   R <- keep * R + (read * q)^T o
and, for the decay, rows e, f, z per token as `tpu_plan.decay_gradient` sums them; A = pair * q k^T * o v^T without its diagonal:
  e_t = (row sum of A) - (column sum of A) + q . (read * (o S^T)),   f_s = k . (write * (v R^T)),   z = keep <S, R>
"""
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.retention.tpu_factors import (
    chunk_tokens,
    dot,
    factors,
    fill,
    first,
    iota,
    only_head,
    only_valid,
    outer,
    own_state,
    side_by_side,
    sums_over_lanes,
    tables,
    wide,
)
from pallas_kernels.retention.tpu_forward import each_chunk, specs


def backward(q, k, v, decay, saved, grad_out, grad_final, plan, with_decay, interpret):
    """Returns (dq, dk, dv, d initial state, with `with_decay` the rows [rows, heads together, 8, tokens] of `tpu_plan.decay_gradient`).

    saved: states before each block [rows, blocks, ...], or None for zeros where there is one block.
    """
    heads, shape = plan.rows, (plan.key_lanes, plan.value_lanes)
    tokens, state, decays = specs(plan, backwards=True)
    keys, values = tokens(plan.key_lanes), tokens(plan.value_lanes)
    before = pl.BlockSpec((plan.U, None, *shape), lambda h, c: (h, plan.blocks - 1 - c, 0, 0))
    out_specs = [keys, keys, values, state]
    out_shape = [*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)), jax.ShapeDtypeStruct((heads, *shape), jnp.float32)]
    if with_decay:
        out_specs.append(pl.BlockSpec((plan.U, plan.together, 8, plan.block), lambda h, c: (h, 0, 0, plan.blocks - 1 - c)))
        out_shape.append(jax.ShapeDtypeStruct((heads, plan.together, 8, plan.blocks * plan.block), jnp.float32))
    has_saved = saved is not None
    flops = 10 * heads * plan.time * (plan.together * plan.C * (plan.key_lanes + plan.value_lanes) // 2 + plan.key_lanes * plan.value_lanes)
    return pl.pallas_call(
        side_by_side(functools.partial(_kernel, plan=plan, has_saved=has_saved, with_decay=with_decay), plan),
        grid=(plan.rows // plan.U, plan.blocks),
        in_specs=[decays, *[before] * has_saved, state, keys, keys, values, values],
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=[pltpu.VMEM((plan.U, *shape), jnp.float32), pltpu.VMEM((plan.U, plan.K, *shape), q.dtype), *tables(plan)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=4 * q.nbytes + 3 * v.nbytes),
        interpret=interpret,
        name="retention_backward",
    )(decay, *[saved] * has_saved, grad_final, q, k, v, grad_out)


def _kernel(decay_ref, *refs, plan, has_saved, with_decay):
    refs = list(refs)
    saved_ref = refs.pop(0) if has_saved else None
    final_ref, q_ref, k_ref, v_ref, o_ref, dq_ref, dk_ref, dv_ref, grad_ref = refs[:9]
    rows_ref = refs[9] if with_decay else None
    state_ref, states_ref, *table_refs = refs[9 + with_decay:]
    c = pl.program_id(1)

    @first(c, plan)
    def _():
        grad_ref[...] = final_ref[...]
        if not plan.by_token:
            fill(table_refs, decay_ref, plan)

    block = plan.blocks - 1 - c
    state_ref[...] = jnp.zeros(state_ref.shape, jnp.float32) if saved_ref is None else saved_ref[...]
    each_chunk(block, plan, functools.partial(_state, decay_ref, k_ref, v_ref, state_ref, states_ref, table_refs, plan))
    each_chunk(block, plan, functools.partial(_chunk, decay_ref, (q_ref, k_ref, v_ref, o_ref), (dq_ref, dk_ref, dv_ref), grad_ref, rows_ref,
                                              states_ref, table_refs, plan), reverse=True)


def _state(decay_ref, k_ref, v_ref, state_ref, states_ref, table_refs, plan, i, valid):
    """Keeps the state before chunk i."""
    state = state_ref[...]
    states_ref[i] = state.astype(states_ref.dtype)
    if isinstance(i, int) and i == plan.K - 1:
        return
    rows = chunk_tokens(i, plan)
    f = factors(decay_ref, table_refs, i, valid, plan)
    k, v = only_valid(k_ref[rows], valid), only_valid(v_ref[rows], valid)
    state_ref[...] = state * f.keep + own_state(outer(k, f.write_key, f.write_turned, v), plan)


def _chunk(decay_ref, ins, outs, grad_ref, rows_ref, states_ref, table_refs, plan, i, valid):
    rows = chunk_tokens(i, plan)
    f = factors(decay_ref, table_refs, i, valid, plan)
    q, k, v, o = (only_valid(ref[rows], valid) for ref in ins)
    dtype = q.dtype
    state, grad = states_ref[i], grad_ref[...]
    rounded = grad.astype(dtype)
    dq_state = dot(o, state, (1, 1))
    dq_state *= wide(f.read_key, dq_state.shape[1])
    dk_state = dot(v, rounded, (1, 1))
    dk_state *= wide(f.write_key, dk_state.shape[1])
    dv = dot(k, rounded)
    dv *= wide(f.write_value, dv.shape[1])
    dq, dk = dq_state, dk_state
    for j in range(plan.together):
        own = [only_head(x, j, plan) for x in (q, k, o)]
        weights = dot(q, own[1], (1, 1)) * f.pair[j]
        products = dot(own[2], v, (1, 1))
        scores = products * f.pair[j]
        if rows_ref is not None:
            _decay_rows(weights * products, dq_state, dk_state, q, k, j, f, state, grad, rows_ref, rows, plan)
        scores = scores.astype(dtype)
        dv += dot(weights.astype(dtype), own[2], (0, 0))
        dq += dot(scores, own[1])
        dk += dot(scores, own[0], (0, 0))
    grad_ref[...] = grad * f.keep + own_state(outer(q, f.read_key, f.read_turned, o), plan)
    for ref, x in zip(outs, (dq, dk, dv)):
        ref[rows] = x.astype(ref.dtype)


def _decay_rows(pairs, dq_state, dk_state, q, k, j, f, state, grad, rows_ref, rows, plan):
    """Rows e, f, z of head j. The diagonal of the pairs is left out: it would only cancel, and at strong decay it is all there is."""
    pairs = jnp.where(iota(pairs.shape, 0) > iota(pairs.shape, 1), pairs, 0.0)
    reads = only_head(dq_state * q.astype(jnp.float32), j, plan)
    writes = only_head(dk_state * k.astype(jnp.float32), j, plan)
    kept = only_head(state.astype(jnp.float32) * (grad * f.keep), j, plan)
    kept = jnp.sum(jnp.sum(kept, axis=0, keepdims=True), axis=1, keepdims=True)
    e = sums_over_lanes(pairs, reads) - jnp.sum(pairs, axis=0, keepdims=True)
    row = iota((8, plan.C), 0)
    rows_ref[j, :, rows] = jnp.where(row == 0, e, jnp.where(row == 1, sums_over_lanes(writes), kept))

"""The forward kernel of retention on a TPU: one pass over q, k, v and out; the state stays in VMEM while the chunks of a head go by.

C tokens of a chunk; lanes of keys (heads x H) and of values (heads x P). Per chunk, with the factors of `tpu_factors`:
  out = (pair * q k^T) v + read * (q S),   S <- keep * S + (write * k)^T v
The state is float32. What the MXU reads of it has the dtype of the inputs: that rounding does not come back into the state.
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
    only_head,
    only_valid,
    outer,
    own_state,
    side_by_side,
    tables,
    wide,
)

TILE = 256  # value lanes at a time: what is alive between matmuls stays near the size of the register file


def forward(q, k, v, decay, initial, plan, save, interpret):
    """q, k [rows, T, key lanes], v alike; decay: see `specs`; initial [rows, key lanes, value lanes] or None.

    Returns (out as v, final state, with `save` the states before each block [rows, blocks, key lanes, value lanes]).
    """
    heads, shape = plan.rows, (plan.key_lanes, plan.value_lanes)
    tokens, state, decays = specs(plan)
    out_specs, out_shape = [tokens(plan.value_lanes), state], [jax.ShapeDtypeStruct(v.shape, v.dtype),
                                                               jax.ShapeDtypeStruct((heads, *shape), jnp.float32)]
    if save:
        out_specs.append(pl.BlockSpec((plan.U, None, *shape), lambda h, c: (h, c, 0, 0)))
        out_shape.append(jax.ShapeDtypeStruct((heads, plan.blocks, *shape), jnp.float32))
    keys, values = tokens(plan.key_lanes), tokens(plan.value_lanes)
    flops = 2 * heads * plan.time * (plan.together * plan.C + 2 * plan.key_lanes) * (plan.key_lanes + plan.value_lanes) // 2
    return pl.pallas_call(
        side_by_side(functools.partial(_kernel, plan=plan, has_initial=initial is not None, save=save), plan),
        grid=(plan.rows // plan.U, plan.blocks),
        in_specs=[decays, *[state] * (initial is not None), keys, keys, values],
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=tables(plan),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=2 * q.nbytes + 2 * v.nbytes),
        interpret=interpret,
        name="retention_forward",
    )(decay, *[initial] * (initial is not None), q, k, v)


def specs(plan, backwards=False):
    """Blocks: tokens(lanes), a state, and the decay: [rows, heads together, ROWS, tokens] by token, else
    [groups, heads together, 8, 128], one number per head. U rows in each."""
    at = (lambda c: plan.blocks - 1 - c) if backwards else (lambda c: c)
    tokens = lambda lanes: pl.BlockSpec((plan.U, plan.block, lanes), lambda h, c: (h, at(c), 0))  # noqa: E731
    state = pl.BlockSpec((plan.U, plan.key_lanes, plan.value_lanes), lambda h, c: (h, 0, 0))
    if plan.by_token:
        return tokens, state, pl.BlockSpec((plan.U, plan.together, 8, plan.block), lambda h, c: (h, 0, 0, at(c)))
    return tokens, state, pl.BlockSpec((plan.U, plan.together, 8, 128), lambda h, c: (h % (plan.groups // plan.U), 0, 0, 0))


def _kernel(decay_ref, *refs, plan, has_initial, save):
    refs = list(refs)
    initial_ref = refs.pop(0) if has_initial else None
    q_ref, k_ref, v_ref, out_ref, state_ref = refs[:5]
    saved_ref = refs[5] if save else None
    table_refs = refs[5 + save:]
    c = pl.program_id(1)

    @first(c, plan)
    def _():
        state_ref[...] = initial_ref[...] if has_initial else jnp.zeros(state_ref.shape, jnp.float32)
        if not plan.by_token:
            fill(table_refs, decay_ref, plan)

    if save:
        saved_ref[...] = state_ref[...]
    each_chunk(c, plan, functools.partial(_chunk, decay_ref, q_ref, k_ref, v_ref, out_ref, state_ref, table_refs, plan))


def each_chunk(block, plan, chunk, reverse=False):
    """chunk(i, valid tokens) for the chunks of a block that have tokens.

    Whole blocks are unrolled, so that the compiler overlaps one chunk with the next. A ragged last block is too if it is the only one;
    else it is a loop, for its code is a second copy.
    """
    def unrolled(block):
        for i in reversed(range(plan.K)) if reverse else range(plan.K):
            if plan.valid(block, i):
                chunk(i, plan.valid(block, i))

    def looped():
        left = plan.time - (plan.blocks - 1) * plan.block
        chunks = -(-left // plan.C)

        @pl.loop(0, chunks)
        def _(step):
            i = chunks - 1 - step if reverse else step
            chunk(i, jnp.minimum(left - i * plan.C, plan.C))

    if plan.blocks == 1 or plan.time % plan.block == 0:
        return unrolled(0)
    pl.when(block < plan.blocks - 1)(lambda: unrolled(0))
    pl.when(block == plan.blocks - 1)(looped)


def _chunk(decay_ref, q_ref, k_ref, v_ref, out_ref, state_ref, table_refs, plan, i, valid):
    rows = chunk_tokens(i, plan)
    f = factors(decay_ref, table_refs, i, valid, plan, k_ref.dtype)
    q, k = q_ref[rows], only_valid(k_ref[rows], valid)
    weights = [(dot(q, only_head(k, j, plan), (1, 1)) * f.pair[j]).astype(q.dtype) for j in range(plan.together)]
    tile = TILE if plan.together == 1 else plan.value_lanes
    for start in range(0, plan.value_lanes, tile):
        lanes = slice(start, min(start + tile, plan.value_lanes))
        v, state = only_valid(v_ref[rows, lanes], valid), state_ref[:, lanes]
        read = dot(q, state.astype(q.dtype))
        out = read * wide(f.read_value, read.shape[1])
        for j in range(plan.together):
            out += dot(weights[j], only_head(v, j, plan))
        out_ref[rows, lanes] = out.astype(out_ref.dtype)
        state_ref[:, lanes] = state * f.keep + own_state(outer(k, f.write_key, f.write_turned, v), plan)

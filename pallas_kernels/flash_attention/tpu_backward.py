"""Gradients of attention on a TPU: dq, dk and dv in one kernel, five matrix products per visible tile.

B batch, T query, S key, N heads, K kv heads, G query heads per kv head, H head dim, P value dim (both padded to whole lanes);
U spans of queries, R tiles of queries per span, Q and C queries and keys of one tile.

FlashAttention-2 (arXiv:2307.08691, algorithm 2) with the loops arranged for a TPU core:

    for each (batch row, kv head), split over the cores
      for each query head of the group, for each span of queries        dq of the span stays in VMEM, written once
        for each key block that the span can see                        dk, dv summed over the visible tiles, then written
          for each query tile of the span that the block can see        a loop in the kernel: tiles out of sight cost nothing

Scores are held transposed, [C, Q]: the row statistics are then rows that broadcast along sublanes, and dv = p^T do, dk = ds^T q are
plain products. A key block met by several (head, span) pairs is summed in float32 in HBM: read at the start of its loop, needed at its
end, so the copies hide behind the loop. Temporary memory is O((T + S) D): no copy per block.
"""
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu
from pallas_kernels.flash_attention import ranges
from pallas_kernels.flash_attention.mask import sides, visible_pairs
from pallas_kernels.flash_attention.tpu_backward_kernel import FAR, LOG2E, Blocks, Shape, interval, kernel, scratch

_SHORTEST_SPAN, _LONGEST_SPAN = 1024, 8192  # queries; each span reads its keys once more


def _vmem():
    """Bytes per core for this kernel. Where there is much, XLA keeps operands of its own there."""
    vmem = tpu.chip().vmem
    return vmem if _is_tight() else vmem * 3 // 4


def _is_tight():
    return tpu.chip().vmem <= 16 * 2**20


def _tiles(dtype):
    """Queries and keys of a tile, best first. A product of float32 is six of bfloat16 in the code: small tiles, short compilation."""
    small = ((256, 256), (128, 128))
    if dtype == jnp.float32:
        return small
    # One core of a v4 is full with 256 x 512 (100 % of its matrix cycles); a v5p gains from a larger one (84 against 76 %).
    return ((256, 512), *small) if _is_tight() else ((512, 1024), (256, 512), *small)


def blocks(T, S, H, P, dtype, out_dtype=None):
    """Blocks that fit the VMEM of a core of the chip the program is for. H and P in whole lanes."""
    width, out_width = jnp.dtype(dtype).itemsize, jnp.dtype(out_dtype or dtype).itemsize
    for q, kv in _tiles(dtype):
        q, kv = min(q, tpu.round_up(T, tpu.LANES)), min(kv, tpu.round_up(S, tpu.LANES))
        # Per query: q, do and dq twice (a pipeline holds two of each), the sum of dq, statistics and bounds in rows of 8 sublanes.
        per_query = 2 * (H + P) * width + 2 * H * out_width + 4 * H + 2 * 2 * 8 * 4
        # Keys: k and v twice; sums new, being written, and read (or new, and results twice); bounds as columns.
        # Scores: p, dp and ds, kept or spilled.
        rest = kv * (H + P) * (2 * width + 12) + 3 * kv * tpu.LANES * 4 + q * kv * (8 + 2 * width)
        if dtype == jnp.float32:  # its operands in three pieces of bfloat16
            rest += 8 * (q + kv) * (H + P)
        span = (_vmem() - 2**20 - rest) // per_query // q * q
        if span >= min(_SHORTEST_SPAN, tpu.round_up(T, q)):
            break
    number = -(-T // min(span, _LONGEST_SPAN))  # spans of equal length
    return Blocks(tpu.round_up(-(-T // number), q), q, kv)


def backward(spec, q_BTNH, k_BSKH, v_BSKP, index, lse_BTN, do_BTNP, delta_BTN, interpret=False, out_dtype=None):
    """(dq_BTNH, dk_BSKH, dv_BSKP) in `out_dtype` (None: that of q, k, v).

    lse is the logsumexp that normalised the forward pass (sinks included), -inf where a query saw nothing; delta is
    rowsum(out * d out) - d lse. Both are float32.
    """
    run = jax.custom_batching.custom_vmap(functools.partial(_backward, spec, interpret, jnp.dtype(out_dtype or q_BTNH.dtype)))
    run.def_vmap(functools.partial(_fold_batch, run))
    return run(q_BTNH, k_BSKH, v_BSKP, index, lse_BTN, do_BTNP, delta_BTN)


def _fold_batch(run, size, batched, *args):
    """vmap makes the batch longer: a kernel with copies of its own cannot be given one more grid axis."""
    whole = jax.tree.map(lambda x, is_batched: x if is_batched else jnp.broadcast_to(x, (size, *x.shape)), args, tuple(batched))
    out = run(*jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), whole))
    return tuple(x.reshape(size, -1, *x.shape[1:]) for x in out), (True,) * len(out)


def _backward(spec, interpret, out_dtype, q_BTNH, k_BSKH, v_BSKP, index, lse_BTN, do_BTNP, delta_BTN):
    (B, T, N, H), (S, K, P) = q_BTNH.shape, v_BSKP.shape[1:]
    lanes = lambda x: tpu.round_up(x, tpu.LANES)  # noqa: E731
    size = blocks(T, S, lanes(H), lanes(P), q_BTNH.dtype, out_dtype)
    shape, tables = _shape_and_tables(spec, index, B, T, S, N, K, lanes(H), lanes(P), size)
    rows = _rows(shape, lse_BTN, delta_BTN)
    operands = [_flat(x, size) for x, size in ((q_BTNH, size.q), (do_BTNP, size.q), (k_BSKH, size.kv), (v_BSKP, size.kv))]
    bounds = [] if shape.plan.static else _bounds(shape, index, T, S, spec)
    dq, dk, dv = _call(shape, tables, operands, rows, bounds, interpret, out_dtype)
    dq_BTNH = dq[:, :T].reshape(B, T, N, -1)[..., :H]
    dk_BSKH, dv_BSKP = (_total(shape, x, c)[:, :S].reshape(B, S, K, -1)[..., :size].astype(out_dtype)
                        for x, size, c in ((dk, H, shape.scale), (dv, P, 1.0)))
    return dq_BTNH, dk_BSKH, dv_BSKP


def _total(shape, x, scale):
    """Sums in HBM hold one share per part, not scaled yet."""
    return x if shape.direct else scale * x.sum(0)


def _shape_and_tables(spec, index, B, T, S, N, K, H, P, size):
    G, U = N // K, -(-T // size.span)
    parts, over = 1, None
    if tpu.chip().cores == 2 and B * K % 2:  # nothing else to split over the cores
        over = "heads" if G % 2 == 0 else "spans" if U % 2 == 0 else None
        parts = 2 if over else 1
    plan, tile_tables = ranges.make(index, T, S, spec, size.q, size.kv)
    span_plan, span_tables = ranges.make(index, T, S, spec, size.span, size.kv)
    shape = Shape(B, K, G, U, parts, over, H, P, size, plan, spec.scale)
    steps = plan.kv_blocks if shape.direct else ranges.grid_steps(span_plan, span_tables)[0]
    return shape, (steps, span_plan, tile_tables, span_tables)


def _flat(x_BTNH, block):
    """[B, T, N * H]: the heads side by side, each in whole lanes, so that a block of one head is read without a transpose."""
    B, T, N, H = x_BTNH.shape
    pad_t = max(0, min(block, tpu.LANES) - T)
    x_BTNH = jnp.pad(x_BTNH, ((0, 0), (0, pad_t), (0, 0), (0, tpu.round_up(H, tpu.LANES) - H)))
    return x_BTNH.reshape(B, T + pad_t, -1)


def _rows(shape, lse_BTN, delta_BTN):
    """[B,N,U,R,2,Q] float32: log2 of the sum of exponentials, +inf where no probability may arise, and delta."""
    seen = lse_BTN != -jnp.inf
    rows = jnp.stack([jnp.where(seen, lse_BTN * LOG2E, jnp.inf), jnp.where(seen, delta_BTN, 0.0)], 2).astype(jnp.float32)
    rows = _padded(rows, 1, shape.U * shape.blocks.span, jnp.array([jnp.inf, 0.0])[:, None])
    B, _, _, N = rows.shape
    return rows.reshape(B, shape.U, shape.tiles, shape.blocks.q, 2, N).transpose(0, 5, 1, 2, 4, 3)


def _padded(x, axis, length, fill):
    shape = (*x.shape[:axis], length - x.shape[axis], *x.shape[axis + 1:])
    return jnp.concatenate([x, jnp.broadcast_to(fill, shape).astype(x.dtype)], axis)


def _bounds(shape, index, T, S, spec):
    """Visibility as an interval: a query sees a key of its segment iff low <= its position <= high, two numbers of the key.

    [B,U,R,2,Q] int32 positions and segments of the queries, [B,J,3,C] low, high and segment of the keys.
    """
    q_side, k_side = sides(index, T, S, spec)
    B, size = shape.B, shape.blocks
    low, high = interval(k_side.position, k_side.is_global, spec)
    segment = jnp.int32(1) if k_side.segment is None else k_side.segment
    empty = (k_side.position < 0) | (segment == 0)
    whole = lambda x, length: jnp.broadcast_to(x.astype(jnp.int32), (B, length))  # noqa: E731
    keys = jnp.stack([whole(x, S) for x in (jnp.where(empty, FAR, low), high, segment)], 1)
    keys = _padded(keys, 2, shape.plan.kv_blocks * size.kv, jnp.int32(FAR))
    queries = jnp.stack([whole(x, T) for x in (q_side.position, jnp.int32(1) if q_side.segment is None else q_side.segment)], 1)
    queries = _padded(queries, 2, shape.U * size.span, jnp.int32(0))
    return [queries.reshape(B, 2, shape.U, shape.tiles, size.q).transpose(0, 2, 3, 1, 4),
            keys.reshape(B, 3, -1, size.kv).swapaxes(1, 2)]


# The call.


def _call(shape, tables, operands, rows, bounds, interpret, out_dtype):
    steps, span_plan, tile_tables, span_tables = tables
    size, H, P = shape.blocks, shape.H, shape.P
    q, do, k, v = operands
    pairs = shape.B * shape.K * shape.G * visible_pairs(shape.plan.T, shape.plan.S, shape.plan.spec)
    moved = sum(x.nbytes for x in operands) + sum(x.size for x in (q, k, v)) * jnp.dtype(out_dtype).itemsize
    scalars = (span_tables.rows, *tile_tables[1:])

    def kv_index(p, u, step, rows_ref):
        b, head, _, _, u = shape.place(p, 0, u)
        j = step if shape.direct else ranges.kv_block(span_plan, ranges.Tables(rows_ref, None, None, None), b, u, step)
        return b, head, j

    def q_spec(width):
        return pl.BlockSpec((1, size.span, width), lambda p, g, u, step, *_: _q_index(shape, p, g, u))

    def kv_spec(width):
        def at(p, g, u, step, rows_ref, *_):
            b, head, j = kv_index(p, u, step, rows_ref)
            return b, j, head
        return pl.BlockSpec((1, size.kv, width), at)

    def row_at(p, g, u, step, *_):
        b, _, _, n, u = shape.place(p, g, u)
        return b, n, u, 0, 0, 0

    in_specs = [q_spec(H), q_spec(P), kv_spec(H), kv_spec(P), pl.BlockSpec((1, 1, 1, shape.tiles, 2, size.q), row_at)]
    if bounds:
        def q_bounds_at(p, g, u, step, *_):
            b, _, _, _, u = shape.place(p, g, u)
            return b, u, 0, 0, 0

        def k_bounds_at(p, g, u, step, rows_ref, *_):
            b, _, j = kv_index(p, u, step, rows_ref)
            return b, j, 0, 0
        in_specs += [pl.BlockSpec((1, 1, shape.tiles, 2, size.q), q_bounds_at), pl.BlockSpec((1, 1, 3, size.kv), k_bounds_at)]

    out_shape = [jax.ShapeDtypeStruct(q.shape, out_dtype)]
    out_specs = [q_spec(H)]
    sums, aliases = [], {}
    if shape.direct:
        out_shape += [jax.ShapeDtypeStruct(x.shape, out_dtype) for x in (k, v)]
        out_specs += [kv_spec(H), kv_spec(P)]
    else:
        sums = [jnp.zeros((shape.parts, shape.B, shape.plan.kv_blocks * size.kv, shape.K * w), jnp.float32) for w in (H, P)]
        out_shape += [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in sums]
        out_specs += [pl.BlockSpec(memory_space=pl.ANY)] * 2
        in_specs += [pl.BlockSpec(memory_space=pl.ANY)] * 2
        first = len(scalars) + 5 + len(bounds)
        aliases = {first: 1, first + 1: 2}
    return pl.pallas_call(
        functools.partial(kernel, shape, span_plan, bool(bounds)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(shape.parts * shape.B * shape.K, shape.G // (shape.parts if shape.over == "heads" else 1),
                  shape.U // (shape.parts if shape.over == "spans" else 1), steps),
            in_specs=in_specs, out_specs=out_specs, scratch_shapes=scratch(shape, bool(bounds))),
        out_shape=out_shape, input_output_aliases=aliases, interpret=interpret,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary", "arbitrary"),
                                             vmem_limit_bytes=_vmem()),
        cost_estimate=pl.CostEstimate(flops=2 * pairs * (3 * H + 2 * P), transcendentals=pairs, bytes_accessed=moved),
        name="flash_attention_backward",
    )(*scalars, q, do, k, v, rows, *bounds, *sums)


def _q_index(shape, p, g, u):
    b, _, _, n, u = shape.place(p, g, u)
    return b, u, n

"""The forward kernel: online softmax over the key blocks that a query block can see (FlashAttention-2, arXiv:2307.08691, algorithm 1).

B batch, T query, S key, N heads, K kv heads, X programs (batch x heads), H head dim, P value dim; Q queries of a block, R of a strip,
C keys of a chunk, L lanes.
A grid step is one query block and one key block, while the next key block is on its way. Inside, keys go by in chunks. A chunk that
every query of the block sees is one straight piece of code without masks: the compiler overlaps the matmuls of one sub-chunk with the
exponentials of another. A chunk on the diagonal is the same with fewer queries from one sub-chunk to the next, and a mask on their
first ones. Any other goes in parts of fewer queries and keys, and parts that nobody sees are skipped.
Scores live in base 2, exp2(x log2 e) being what the hardware does anyway; scale and log2 e are multiplied into the queries, once per
query block. The row maximum m is kept once per lane, so that it broadcasts without moving between lanes; the row sum l is kept per
lane and summed over lanes at the end.
"""
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu
from pallas_kernels.flash_attention import ranges
from pallas_kernels.flash_attention.mask import sides, visible_pairs

_LOG2E = math.log2(math.e)
# Below any score, and finite: a row that has seen nothing yet keeps exp2(m - m) = 1 and no NaN.
_NOTHING = -1e30
# Queries per kv head, all heads of its group together, up to which the group shares one block: decoding reads keys once.
PACK_ROWS = 256


class Blocks(NamedTuple):
    q: int
    kv: int
    keys: int  # of a chunk
    part_q: int
    part_kv: int
    sub: int  # keys of one step of the online softmax


def blocks(rows, S, H, P, dtype, window=None):
    """Block sizes that fit the chip's memory: the largest that do, for `rows` queries (of all packed heads) and S keys."""
    size, H, P = jnp.dtype(dtype).itemsize, tpu.round_up(H, tpu.LANES), tpu.round_up(P, tpu.LANES)

    def need(block):
        windows = 2 * size * (H + P) * (block.q + block.kv)
        scratch = block.q * (4 * P + 4 * 4 * tpu.LANES)
        # Scores, their exponentials, and for float32 the three bfloat16 parts that operands are split into.
        thirds = 3 * 2 * (block.q * block.sub + (block.q + block.sub) * (H + P)) if size == 4 else 0
        scores = 2 * block.q * block.sub * (4 + size) + thirds
        return windows + scratch + scores

    # Fewer steps are less overhead, but of a block far wider than the window most is read in vain.
    kvs = [kv for kv in (4096, 2048, 1024, 512) if window is None or kv <= max(1024, window)]
    # Where there is memory, twice the queries are more independent work: 82 % instead of 74 % of the matrix units' issue slots on v6e, 92 %
    # instead of 86 % on v5p (full mask). Not for a narrow window, of whose tiles fewer would be full.
    roomy = tpu.chip().vmem > 16 * 2**20 and size == 2 and H + P <= 256 and (window is None or window >= 8192)
    candidates = [_blocks(rows, S, H + P, dtype, q, kv) for q in ((2048,) * roomy + (1024, 512, 256)) for kv in kvs]
    fitting = [block for block in candidates if need(block) <= tpu.chip().vmem * 7 // 8]
    # Few rows past the end first, then large blocks.
    large = [block for block in fitting if block.q >= min(512, candidates[0].q)] or fitting
    return min(large, key=lambda block: (tpu.round_up(rows, block.q), -block.q, -block.kv))


def _blocks(rows, S, width, dtype, most_q, most_kv):
    block_q = min(most_q, tpu.round_up(rows, tpu.sublanes(dtype) if rows < tpu.LANES else tpu.LANES))
    block_kv = min(most_kv, tpu.round_up(S, next(x for x in (1024, 512, 256, 128) if S > x // 2 or x == 128)))
    # A chunk that divides the block of queries meets the diagonal in its corner. Wide heads, and float32 with six passes for one, are a
    # lot of code: smaller pieces keep compiling under ten seconds.
    wide = 256 if dtype == jnp.float32 else 512 if width > 256 else 1024
    keys = min(block_kv, wide if block_q < tpu.LANES else next(x for x in (1024, 512, 256, 128) if block_q % x == 0 and x <= wide))
    part_q = block_q if block_q < tpu.LANES else next(x for x in (512, 384, 256, 128) if block_q % x == 0 and (x <= wide // 2 or x == 128))
    return Blocks(block_q, block_kv, keys, part_q, min(keys, 512), min(keys, 256))


def forward(spec, q_BTNH, k_BSKH, v_BSKP, index, sinks_N, interpret):
    """(out [B,T,N,P], logsumexp [B,T,N] float32)."""
    B, T, N, H = q_BTNH.shape
    S, K, P = v_BSKP.shape[1:]
    pack = N // K if N > K and T * N // K <= PACK_ROWS else 1
    heads, rows = N // pack, T * pack
    # Scaled here, where it joins the transpose or whatever made q.
    factor = spec.scale * _LOG2E if spec.soft_cap is None else spec.scale / spec.soft_cap
    q_BTNH = (q_BTNH.astype(jnp.float32) * factor).astype(q_BTNH.dtype)
    q_XRH = q_BTNH.reshape(B, T, heads, pack, H).transpose(0, 2, 1, 3, 4).reshape(B * heads, rows, H)
    k_XSH, v_XSP = (x.swapaxes(1, 2).reshape(B * K, S, -1) for x in (k_BSKH, v_BSKP))
    out_XRP, lse_XR = _call(spec, pack, q_XRH, k_XSH, v_XSP, index, sinks_N, B, T, interpret)
    out_BTNP = out_XRP.reshape(B, heads, T, pack, P).transpose(0, 2, 1, 3, 4).reshape(B, T, N, P)
    return out_BTNP, lse_XR.reshape(B, heads, T, pack).transpose(0, 2, 1, 3).reshape(B, T, N)


def _call(spec, pack, q_XRH, k_XSH, v_XSP, index, sinks_N, B, T, interpret):
    (X, rows, H), (_, S, P), dtype = q_XRH.shape, v_XSP.shape, q_XRH.dtype
    heads, K = X // B, k_XSH.shape[0] // B
    size = blocks(rows, S, H, P, dtype, spec.window)
    if pack > 1:  # ranges know queries, not rows: packed heads are one part
        size = size._replace(part_q=size.q)
    plan, tables = ranges.make(index, T, S, spec, size.q if pack == 1 else T, size.kv)
    chunk, chunk_tables = ranges.parts(index, plan, plan.block_q, size.keys)
    part, part_tables = ranges.parts(index, plan, size.part_q if pack == 1 else T, size.part_kv)
    shape = _Shape(plan, chunk, part, size, pack, X, heads, heads // K, rows, H, P)
    prefetched = (tables.rows, *chunk_tables[2:], *part_tables[2:])
    inputs, specs = _inputs(shape, q_XRH, k_XSH, v_XSP, index, sinks_N)
    lanes = tpu.round_up(size.q, tpu.LANES)
    statistics, ids = pltpu.VMEM((size.q, tpu.LANES), jnp.float32), pltpu.VMEM((size.q, tpu.LANES), jnp.int32)
    out, lse = pl.pallas_call(
        functools.partial(_kernel, shape, tuple(inputs)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetched),
            grid=(X, -(-rows // size.q), ranges.grid_steps(plan, tables)[0]),
            in_specs=list(specs.values()),
            out_specs=[pl.BlockSpec((1, size.q, P), lambda x, i, *_: (x, i, 0)), pl.BlockSpec((1, 1, lanes), lambda x, i, *_: (x, 0, i))],
            scratch_shapes=[pltpu.VMEM((size.q, P), jnp.float32), statistics, statistics,
                            *[ids for name in ("q_position", "q_segment") if name in inputs]],
        ),
        out_shape=[jax.ShapeDtypeStruct((X, rows, P), spec.out_dtype or dtype), jax.ShapeDtypeStruct((X, 1, rows), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        cost_estimate=_cost(shape, spec, T, S, q_XRH, k_XSH, v_XSP),
        name="flash_attention_forward",
        interpret=interpret,
    )(*prefetched, *inputs.values())
    return out, lse.reshape(X, rows)


def _cost(shape, spec, T, S, q_XRH, k_XSH, v_XSP):
    """Two products per visible pair, heads in whole lanes; documents in a row are not told apart."""
    pairs = shape.programs * shape.pack * visible_pairs(T, S, spec)
    width = sum(tpu.round_up(x, tpu.LANES) for x in (shape.H, shape.P))
    moved = q_XRH.nbytes // shape.H * (shape.H + shape.P) + k_XSH.nbytes + v_XSP.nbytes
    return pl.CostEstimate(flops=2 * pairs * width, transcendentals=pairs, bytes_accessed=moved)


class _Shape(NamedTuple):
    """Everything static."""
    plan: ranges.Plan  # blocks; then chunks of keys, and parts of a chunk
    chunk: ranges.Plan
    part: ranges.Plan
    size: Blocks
    pack: int  # heads whose queries lie in one block, interleaved: row = query * pack + head
    programs: int
    heads: int  # per batch row, packed ones counted once
    group: int  # of those, how many read the same keys
    rows: int
    H: int
    P: int


def _inputs(shape, q_XRH, k_XSH, v_XSP, index, sinks_N):
    """({name: array}, {name: BlockSpec}): only what the mask needs is there."""
    plan, size, pack, X = shape.plan, shape.size, shape.pack, q_XRH.shape[0]
    lanes = tpu.round_up(size.q, tpu.LANES)

    def kv_at(x, i, step, rows_table, *_):
        """(row of the batch, head, block). Steps past the end of a row name the first block of the next row: it is fetched early."""
        tables = ranges.Tables(rows_table, None, None, None)
        past = step >= ranges.kv_steps(plan, tables, _divide(x, shape.heads, X), i)
        last = i + 1 == -(-shape.rows // size.q)
        x = jnp.where(past & last, jnp.minimum(x + 1, X - 1), x)
        i = jnp.where(past, jnp.where(last, 0, i + 1), i)
        b = _divide(x, shape.heads, X)
        return b, _divide(x, shape.group, X), ranges.kv_block(plan, tables, b, i, jnp.where(past, 0, step))

    def kv_map(*at):
        _, head, block = kv_at(*at)
        return head, block, 0

    def kv_side_map(*at):
        b, _, block = kv_at(*at)
        return b, 0, block

    arrays = {"q": q_XRH, "k": k_XSH, "v": v_XSP}
    specs = {"q": pl.BlockSpec((1, size.q, shape.H), lambda x, i, *_: (x, i, 0)), "k": pl.BlockSpec((1, size.kv, shape.H), kv_map),
             "v": pl.BlockSpec((1, size.kv, shape.P), kv_map)}
    B = X // shape.heads
    q_side, k_side = sides(index, plan.T, plan.S, plan.spec)
    dynamic = not plan.static
    for name, array, wanted in (("q_position", q_side.position, plan.positioned or pack > 1), ("q_segment", q_side.segment, plan.segmented),
                                ("k_position", k_side.position, plan.positioned), ("k_segment", k_side.segment, plan.segmented),
                                ("k_global", k_side.is_global, dynamic and k_side.is_global is not None)):
        if wanted:
            array = jnp.broadcast_to(array.astype(jnp.int32), (B, array.shape[-1]))
            is_query = name.startswith("q")
            arrays[name] = (jnp.repeat(array, pack, axis=1) if is_query else array)[:, None]
            specs[name] = (pl.BlockSpec((1, 1, lanes), lambda x, i, *_: (_divide(x, shape.heads, X), 0, i)) if is_query
                           else pl.BlockSpec((1, 1, size.kv), kv_side_map))
    if sinks_N is not None:
        sinks = _LOG2E * sinks_N.astype(jnp.float32).reshape(shape.heads, 1, pack)
        arrays["sinks"] = jnp.tile(sinks, (1, 1, plan.T)) if pack > 1 else jnp.broadcast_to(sinks, (shape.heads, 1, tpu.LANES))
        specs["sinks"] = pl.BlockSpec((1, 1, lanes if pack > 1 else tpu.LANES), lambda x, *_: (x % shape.heads, 0, 0))
    return arrays, specs


def _kernel(shape, names, rows_ref, q_extent_ref, k_extent_ref, part_q_extent_ref, part_k_extent_ref, *refs):
    inputs, (out_ref, lse_ref, *scratch) = dict(zip(names, refs)), refs[len(names):]
    inputs |= dict(zip(("acc", "m", "l", *(name + "_column" for name in names if name.startswith("q_"))), scratch))
    plan, size = shape.plan, shape.size
    x, i, step = (pl.program_id(axis) for axis in range(3))
    b = _divide(x, shape.heads, shape.programs) if plan.batched else 0
    tables = ranges.Tables(rows_ref, None, q_extent_ref, k_extent_ref)
    part_tables = ranges.Tables(None, None, part_q_extent_ref, part_k_extent_ref)

    pl.when((step == 0) & (i == 0))(lambda: _clear(inputs))
    if "q_position" in inputs or "q_segment" in inputs:
        pl.when(step == 0)(lambda: _turn_columns(shape, inputs))

    @pl.when(step < ranges.kv_steps(plan, tables, b, i))
    def _():
        j = ranges.kv_block(plan, tables, b, i, step)

        def one_chunk(n, _):
            at = b, i, j * (size.kv // size.keys) + n
            parts = lambda: _parts(shape, inputs, part_tables, *at, n)  # noqa: E731
            partly = parts
            if _has_triangles(shape):
                offset = at[2] * size.keys - i * size.q  # of the first key from the first query
                in_sight = ranges.tile_is_full(shape.chunk, tables, *at, order=False)
                triangle = (offset >= 0) & (offset < size.q) & in_sight
                rest = (lambda: None) if in_sight is True else parts
                partly = lambda: _if(triangle, lambda: _triangle(shape, inputs, offset, n), rest)  # noqa: E731
            _if(ranges.tile_is_full(shape.chunk, tables, *at), lambda: _whole(shape, inputs, n), partly)

        chunks = pl.cdiv(jnp.minimum(plan.S - j * size.kv, size.kv), size.keys) if plan.S % size.kv else size.kv // size.keys
        jax.lax.fori_loop(0, chunks, one_chunk, None)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        _finish(shape, inputs, out_ref, lse_ref)
        if shape.rows > size.q:
            _clear(inputs)  # for the next block


def _if(condition, yes, no=None):
    """Both are traced unless the condition is a Python bool."""
    if isinstance(condition, bool):
        return yes() if condition else no and no()
    pl.when(condition)(yes)
    if no is not None:
        pl.when(~condition)(no)


def _clear(inputs):
    for name, value in (("m", _NOTHING), ("l", 0.0), ("acc", 0.0)):
        inputs[name][...] = jnp.full_like(inputs[name], value)


def _turn_columns(shape, inputs):
    for name in ("q_position", "q_segment"):
        if name in inputs:
            inputs[name + "_column"][...] = _column(inputs[name][0], shape.size.q)


def _whole(shape, inputs, n):
    for first in range(0, shape.size.keys, shape.size.sub):
        _update(shape, inputs, slice(0, shape.size.q), _keys(shape.size, n, first), None)


def _has_triangles(shape):
    """Whether the diagonal of a causal mask meets every chunk on it in the chunk's corner."""
    return shape.plan.spec.is_causal and not shape.plan.positioned and shape.pack == 1 and shape.size.q % shape.size.keys == 0


def _triangle(shape, inputs, offset, n):
    """Chunk n, whose first key stands at the block's query `offset`: each sub-chunk for the queries that see some of it.

    Of its keys, the first `half` of those queries sees the first `half` only. These corners come first, all together: none waits for
    another.
    """
    size = shape.size
    half = max(size.sub // 2, tpu.LANES)
    row_SS, key_SS = (jax.lax.broadcasted_iota(jnp.int32, (half, half), axis) for axis in (0, 1))

    def corner(s_RS):
        return jnp.where(row_SS >= key_SS, s_RS, -jnp.inf)

    def mask(s_RS):
        top = jnp.concatenate([s_RS[:half, :half], corner(s_RS[:half, half:])], axis=1)
        return jnp.concatenate([top, s_RS[half:]], axis=0) if s_RS.shape[0] > half else top

    def at(start):
        firsts = range(0, size.keys, size.sub)
        for first in firsts:
            _update(shape, inputs, pl.ds(start + first, half), _keys(size, n, first, half), corner)
        for first in reversed(firsts):
            if start + first + half < size.q:
                _update(shape, inputs, slice(start + first + half, size.q), _keys(size, n, first), mask if size.sub > half else None)

    for start in range(0, size.q, size.keys):
        pl.when(offset == start)(functools.partial(at, start))


def _parts(shape, inputs, tables, b, i, key_block, n):
    """A chunk that not every query of the block sees, in parts."""
    size, part, plan = shape.size, shape.part, shape.plan
    strips, pieces = size.q // size.part_q, size.keys // size.part_kv

    def one_part(strip, piece):
        at = b, i * strips + strip, key_block * pieces + piece
        full, empty = ranges.tile_is_full(part, tables, *at), ranges.part_is_empty(part, tables, *at)
        rows = pl.ds(pl.multiple_of(strip * size.part_q, size.part_q), size.part_q) if strips > 1 else slice(0, size.part_q)

        def run(masked):
            for first in range(0, size.part_kv, size.sub):
                keys = _keys(size, n, piece * size.part_kv + first)
                origin = at[1] * part.block_q, at[2] * size.part_kv + first
                mask = lambda s_RS: jnp.where(_see(shape, inputs, origin, rows, keys), s_RS, -jnp.inf)  # noqa: B023, E731
                _update(shape, inputs, rows, keys, mask if masked else None, plan.S - origin[1] if masked and plan.S % size.sub else None)

        _if(full, lambda: run(False), lambda: _if(~empty, lambda: run(True)))

    def one_strip(strip, _):
        number = jnp.minimum(pl.cdiv(plan.S - key_block * size.keys, size.part_kv), pieces)
        jax.lax.fori_loop(0, number, lambda piece, _: one_part(strip, piece), None)

    if strips == 1:
        one_strip(0, None)
    else:  # none past T: their extents are not in the tables
        jax.lax.fori_loop(0, pl.cdiv(jnp.minimum(shape.rows - i * size.q, size.q), size.part_q), one_strip, None)


def _keys(size, n, first, keys=None):
    """The sub-chunk of the key block that starts at key `first` of chunk n, or its first `keys`."""
    return pl.ds(pl.multiple_of(n * size.keys + first, size.sub), keys or size.sub)


def _update(shape, inputs, rows, keys, mask, real_keys=None):
    """One step of the online softmax: some queries by a sub-chunk of keys, of which only the first `real_keys` lie below S."""
    spec, dtype = shape.plan.spec, inputs["q"].dtype
    v_SP = inputs["v"][0, keys]
    s_RS = _dot(inputs["q"][0, rows], inputs["k"][0, keys], 1, 1)
    if spec.soft_cap is not None:
        s_RS = jnp.tanh(s_RS) * (spec.soft_cap * _LOG2E)
    if mask is not None:
        s_RS = mask(s_RS)
    if real_keys is not None:  # past S there may be NaNs, which zero times does not remove
        v_SP = jnp.where(jax.lax.broadcasted_iota(jnp.int32, v_SP.shape, 0) < real_keys, v_SP, 0)
    acc_ref, m_ref, l_ref = inputs["acc"], inputs["m"], inputs["l"]
    m_RL = m_ref[rows]
    new_RL = jnp.maximum(m_RL, s_RS.max(1, keepdims=True))
    p_RS = jnp.exp2(s_RS - _wide(new_RL, s_RS.shape[1]))
    keep_RL = jnp.exp2(m_RL - new_RL)
    m_ref[rows] = new_RL
    l_ref[rows] = keep_RL * l_ref[rows] + functools.reduce(jnp.add, jnp.split(p_RS, s_RS.shape[1] // tpu.LANES, axis=1))
    acc_ref[rows] = _wide(keep_RL, shape.P) * acc_ref[rows] + _dot(p_RS.astype(dtype), v_SP, 1, 0)


def _see(shape, inputs, origin, rows, keys):
    """bool [R,S]: the mask of some queries and keys, as `mask.visible` has it; origin: the numbers of the first ones."""
    plan, spec, size = shape.plan, shape.plan.spec, shape.size
    RS, first = (size.part_q, size.sub), origin[1]
    key_RS = jax.lax.broadcasted_iota(jnp.int32, RS, 1)
    row = lambda name: inputs[name][0, :, keys]  # noqa: E731
    column = lambda name: _wide(inputs[name + "_column"][rows], size.sub)  # noqa: E731
    tests = [key_RS < plan.S - first] if plan.S % size.sub else []
    if "q_position" in inputs:
        q_RS, k_RS = column("q_position"), row("k_position") if plan.positioned else key_RS + first
        gap, zero = q_RS - k_RS, 0
        if plan.positioned:
            tests += [k_RS >= 0] if spec.is_causal else [k_RS >= 0, q_RS >= 0]
    else:
        # The gap is (row - key) + zero, and zero is a scalar.
        gap, zero = jax.lax.broadcasted_iota(jnp.int32, RS, 0) - key_RS, origin[0] - first
    if spec.is_causal:
        tests.append(gap >= -zero)
    if spec.window is not None:
        near = gap <= spec.window - zero
        near = near if spec.is_causal else near & (gap >= -spec.window - zero)
        if "k_global" in inputs:
            near = near | (row("k_global") != 0)
        elif spec.global_tokens:
            near = near | (key_RS < spec.global_tokens - first)
        tests.append(near)
    if plan.segmented:
        k_1S = row("k_segment")
        tests += [column("q_segment") == k_1S, k_1S != 0]
    return functools.reduce(lambda x, y: x & y, tests)


def _finish(shape, inputs, out_ref, lse_ref):
    size = shape.size
    m_QL, acc_QP = inputs["m"][...], inputs["acc"][...]
    l_QL = jnp.broadcast_to(inputs["l"][...].sum(1, keepdims=True), m_QL.shape)
    if "sinks" in inputs:
        seen_QL = l_QL > 0
        sink = _column(inputs["sinks"][0], size.q) if shape.pack > 1 else inputs["sinks"][0]
        new_QL = jnp.maximum(m_QL, sink)
        keep_QL = jnp.exp2(m_QL - new_QL)
        m_QL, l_QL = new_QL, jnp.where(seen_QL, keep_QL * l_QL + jnp.exp2(sink - new_QL), 0.0)
        acc_QP = acc_QP * _wide(keep_QL, shape.P)
    # A row that saw nothing has acc = 0 and l = 0; in any other l is at least the 1 of its greatest score.
    out_ref[0] = (acc_QP * _wide(_reciprocal(jnp.maximum(l_QL, 1e-30), out_ref.dtype), shape.P)).astype(out_ref.dtype)
    l_1Q, m_1Q = _turn(l_QL, m_QL)
    lse_ref[0] = jnp.where(l_1Q > 0, m_1Q * (1 / _LOG2E) + jnp.log(l_1Q), -jnp.inf)


def _turn(*columns_RL):
    """Columns, each the same in every lane, as rows [1, R] (R rounded up to whole lanes): many share one transpose of a square."""
    rows, together = columns_RL[0].shape[0], tpu.LANES // 8
    missing = -rows % tpu.LANES
    if missing:
        columns_RL = [jnp.concatenate([x, jnp.zeros((missing, tpu.LANES), x.dtype)], axis=0) for x in columns_RL]
    squares = [square for x in columns_RL for square in jnp.split(x, x.shape[0] // tpu.LANES)]
    lane, turned = jax.lax.broadcasted_iota(jnp.int32, (tpu.LANES, tpu.LANES), 1), []
    for first in range(0, len(squares), together):
        part = squares[first : first + together]
        mixed = functools.reduce(lambda x, n: jnp.where(lane < 8 * n, x, part[n]), range(1, len(part)), part[0]).T  # noqa: B023
        turned += [mixed[8 * n : 8 * n + 1] for n in range(len(part))]
    number = len(squares) // len(columns_RL)
    return [jnp.concatenate(turned[n : n + number], axis=1) for n in range(0, len(turned), number)]


def _reciprocal(x, dtype):
    """1 / x for a result in `dtype`: for bfloat16 the hardware's estimate and one step of Newton's method."""
    if dtype == jnp.float32:
        return 1.0 / x
    estimate = (pltpu if hasattr(pltpu, "reciprocal") else pl).reciprocal(x, approx=True)  # moved in jax 0.12
    return estimate * (2.0 - x * estimate)


def _divide(x, n, most):
    """x // n for 0 <= x < most, without a division on the scalar core where possible."""
    if n >= most:
        return 0 * x
    return x >> n.bit_length() - 1 if n & (n - 1) == 0 else x // n


def _dot(x, y, x_axis, y_axis):
    return jax.lax.dot_general(x, y, (((x_axis,), (y_axis,)), ((), ())), precision=tpu.precision(x.dtype),
                               preferred_element_type=jnp.float32)


def _wide(x_RL, columns):
    """Repeats or cuts what is the same in every lane to `columns`."""
    if columns <= tpu.LANES:
        return x_RL[:, :columns]
    whole, rest = divmod(columns, tpu.LANES)
    return jnp.concatenate([x_RL] * whole + ([x_RL[:, :rest]] if rest else []), axis=1)


def _column(x_1Q, rows):
    """[1, >= rows] to [rows, LANES], the same in every lane."""
    return jnp.broadcast_to(x_1Q, (tpu.LANES, x_1Q.shape[1])).T[:rows]

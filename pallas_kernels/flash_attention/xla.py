"""Attention tile by tile in plain jnp, the CPU path: tiles that no row can see are not visited; no temporary is as long as T.

B batch, T query, S key, K kv heads, G query heads per kv head, H head dim, P value dim; Q, C queries and keys of one tile.
Two schedules share the tile mathematics (FlashAttention-2, arXiv:2307.08691, algorithms 1 and 2):
  unrolled  visibility known at trace time (no positions) and few tiles: a Python loop with static ranges;
  scanned   a loop over query blocks, and in it a loop over the key blocks that the block can see, found from the extents of
            (segment, position) of every block, on the device.
Tiles are cut from the arrays as they are given and written where they belong, so that nothing of length T is copied; a last block
that is not whole lies over the one before, and what it repeats counts once.
The products for keys' and values' gradients are written transposed, [H,C]: the natural form would make XLA:CPU transpose every tile
of probabilities (measured: 74 against 123 GFLOP/s for that product).
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.checks import accumulator
from pallas_kernels.flash_attention.mask import Side, cut, sides, visible
from pallas_kernels.kept import kept
from pallas_kernels.products import product

# More queries or tiles than this are scanned: XLA keeps the temporaries of many unrolled tiles alive at once (measured at T = 1024:
# 149 against 78 MB, and no faster).
UNROLL_QUERIES = 512
UNROLL_TILES = 8
UNROLL_BLOCK = 128  # queries of an unrolled tile
UNROLL_KEYS = 1024  # keys of an unrolled tile: a row of scores is normalised in one piece up to here
FORWARD_BLOCK = 512  # queries and keys of a scanned tile; measured on a two-core CPU, T = 2048 and 8192
BACKWARD_BLOCK = 256


def attend(query_BTNH, key_BSKH, value_BSKP, index, sinks_N, spec):
    """(out [B,T,N,P], logsumexp [B,T,N])."""
    plan = _unrolled_plan(query_BTNH.shape[1], key_BSKH.shape[1], spec, index)
    out_BTNP, lse_BTN = _core(spec, plan, query_BTNH, key_BSKH, value_BSKP, index)
    if sinks_N is not None:
        out_BTNP, lse_BTN = _add_sinks(out_BTNP, lse_BTN, sinks_N)
    return out_BTNP.astype(spec.out_dtype or query_BTNH.dtype), lse_BTN


def gradients(query_BTNH, key_BSKH, value_BSKP, index, lse_BTN, delta_BTN, d_out_BTNP, spec):
    """(dq, dk, dv) in the accumulator's dtype, from a logsumexp over these keys and perhaps others."""
    plan = _unrolled_plan(query_BTNH.shape[1], key_BSKH.shape[1], spec, index)
    return _gradients(spec, plan, query_BTNH, key_BSKH, value_BSKP, index, lse_BTN, d_out_BTNP.astype(query_BTNH.dtype), delta_BTN)


def _add_sinks(out_BTNP, lse_BTN, sinks_N):
    """One more logit in the denominator only. Rows that saw nothing stay as they are."""
    seen_BTN = lse_BTN != -jnp.inf
    safe_BTN = jnp.where(seen_BTN, lse_BTN, 0.0)
    sinks_N = sinks_N.astype(lse_BTN.dtype)
    out_BTNP = out_BTNP * jax.nn.sigmoid(safe_BTN - sinks_N)[..., None]
    return out_BTNP, jnp.where(seen_BTN, jnp.logaddexp(safe_BTN, sinks_N), -jnp.inf)


# One tile. Its arrays have heads in front, [B,K,G,Q,H] and [B,K,C,H], as the products want them.


def _queries(x_BTN, start, size, K):
    """Rows [start, start + size) of [B,T,N,...] as [B,K,G,Q,...]. Heads are grouped here: a grouped view of the whole would be copied."""
    x = jax.lax.dynamic_slice_in_dim(x_BTN, start, size, axis=1)
    return jnp.moveaxis(x.reshape(*x.shape[:2], K, -1, *x.shape[3:]), 1, 3)


def _keys(x_BSKH, start, size):
    """Keys or values [start, start + size) as [B,K,C,H]."""
    return jnp.moveaxis(jax.lax.dynamic_slice_in_dim(x_BSKH, start, size, axis=1), 1, 2)


def _in_time(tile, like):
    """A tile [B,K,G,Q,...] or [B,K,H,C] with time where `like` [B,T,N,...] has it."""
    tile = jnp.moveaxis(tile, 3, 1)
    return tile.reshape(*tile.shape[:2], *like.shape[2:])


def _written(results, tiles, start):
    """(out, logsumexp) with a tile of each in its place."""
    return tuple(jax.lax.dynamic_update_slice_in_dim(x, _in_time(tile, x), start, axis=1) for x, tile in zip(results, tiles))


def _added(x_BT, tile, start):
    tile = _in_time(tile, x_BT)
    return jax.lax.dynamic_update_slice_in_dim(x_BT, jax.lax.dynamic_slice_in_dim(x_BT, start, tile.shape[1], axis=1) + tile, start, axis=1)


def _scores(q_BKGQH, k_BKCH, see, spec):
    """(masked scores, derivative of the soft cap or None)."""
    s = spec.scale * product("bkgqh,bkch->bkgqc", q_BKGQH, k_BKCH, accumulator(q_BKGQH.dtype))
    slope = None
    if spec.soft_cap is not None:
        t = jnp.tanh(s / spec.soft_cap)
        s, slope = spec.soft_cap * t, 1.0 - t * t
    if see is not None:
        s = jnp.where(see if see.ndim == 2 else see[:, None, None], s, -jnp.inf)
    return s, slope


def _finite(m):
    """A row that has seen nothing has maximum -inf; subtracting 0 instead keeps exp(-inf) = 0 and no NaN."""
    return jnp.where(m == -jnp.inf, 0.0, m)


def _forward_tile(carry, q_BKGQH, k_BKCH, v_BKCP, see, spec):
    """Online softmax: carry = (row maximum m, row sum l, unnormalised output o), or None before the first tile."""
    s, _ = _scores(q_BKGQH, k_BKCH, see, spec)
    m = s.max(-1) if carry is None else jnp.maximum(carry[0], s.max(-1))
    p = jnp.exp(s - _finite(m)[..., None])
    l = p.sum(-1)
    o = product("bkgqc,bkcp->bkgqp", p.astype(v_BKCP.dtype), v_BKCP, s.dtype)
    if carry is not None:
        keep = jnp.exp(carry[0] - _finite(m))
        l, o = l + keep * carry[1], o + keep[..., None] * carry[2]
    return m, l, o


def _finish(m, l, o):
    """(out, logsumexp) of rows whose tiles are all in."""
    seen = l > 0
    l = jnp.where(seen, l, 1.0)
    return o / l[..., None], jnp.where(seen, m + jnp.log(l), -jnp.inf)


def _backward_tile(q_BKGQH, k_BKCH, v_BKCP, see, lse_BKGQ, do_BKGQP, delta_BKGQ, spec):
    """(dq, dk transposed, dv transposed). delta = rowsum(out * d out) - d lse."""
    dtype = q_BKGQH.dtype
    s, slope = _scores(q_BKGQH, k_BKCH, see, spec)
    p = jnp.exp(s - _finite(lse_BKGQ)[..., None])
    ds = spec.scale * p * (product("bkgqp,bkcp->bkgqc", do_BKGQP, v_BKCP, s.dtype) - delta_BKGQ[..., None])
    ds = (ds if slope is None else ds * slope).astype(dtype)
    dq_BKGQH = product("bkgqc,bkch->bkgqh", ds, k_BKCH, s.dtype)
    dk_BKHC = product("bkgqh,bkgqc->bkhc", q_BKGQH, ds, s.dtype)
    dv_BKPC = product("bkgqp,bkgqc->bkpc", do_BKGQP, p.astype(dtype), s.dtype)
    return dq_BKGQH, dk_BKHC, dv_BKPC


# Both schedules behind one gradient rule.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _core(spec, plan, q_BTNH, k_BSKH, v_BSKP, index):
    forward = _forward_scanned if plan is None else functools.partial(_forward_unrolled, plan)
    dtype, rows = accumulator(q_BTNH.dtype), q_BTNH.shape[:-1]
    results = jnp.zeros((*rows, v_BSKP.shape[-1]), dtype), jnp.zeros(rows, dtype)
    return forward(spec, results, q_BTNH, k_BSKH, v_BSKP, *sides(index, q_BTNH.shape[1], k_BSKH.shape[1], spec))


def _core_fwd(spec, plan, q_BTNH, k_BSKH, v_BSKP, index):
    out_BTNP, lse_BTN = kept(_core(spec, plan, q_BTNH, k_BSKH, v_BSKP, index))
    return (out_BTNP, lse_BTN), (q_BTNH, k_BSKH, v_BSKP, index, out_BTNP, lse_BTN)


def _core_bwd(spec, plan, residuals, cotangents):
    q_BTNH, k_BSKH, v_BSKP, index, out_BTNP, lse_BTN = residuals
    do_BTNP, dlse_BTN = cotangents
    delta_BTN = (out_BTNP * do_BTNP).sum(-1) - dlse_BTN
    dq, dk, dv = _gradients(spec, plan, q_BTNH, k_BSKH, v_BSKP, index, lse_BTN, do_BTNP.astype(q_BTNH.dtype), delta_BTN)
    return dq.astype(q_BTNH.dtype), dk.astype(k_BSKH.dtype), dv.astype(v_BSKP.dtype), None


def _gradients(spec, plan, q_BTNH, k_BSKH, v_BSKP, index, lse_BTN, do_BTNP, delta_BTN):
    """(dq, dk, dv) in the accumulator's dtype."""
    backward = _backward_scanned if plan is None else functools.partial(_backward_unrolled, plan)
    sums = [jnp.zeros(x.shape, delta_BTN.dtype) for x in (q_BTNH, k_BSKH, v_BSKP)]
    rows = q_BTNH, lse_BTN, do_BTNP, delta_BTN
    return backward(spec, sums, rows, k_BSKH, v_BSKP, *sides(index, q_BTNH.shape[1], k_BSKH.shape[1], spec))


_core.defvjp(_core_fwd, _core_bwd)


# The unrolled schedule.


def _unrolled_plan(T, S, spec, index):
    """((q range, ((k range, is masked), ...)), ...) in closed form, or None if visibility is dynamic or the tiles are too many."""
    segmented = index.q_segment_BT is not None
    if index.q_position_BT is not None or (segmented and spec.window is not None and spec.global_tokens):
        # Only the device knows what is visible: one block of queries looks at every key, more blocks are worth skipping tiles for.
        small = T <= UNROLL_BLOCK and S <= 16 * UNROLL_KEYS
        return (((0, T), tuple((tile, True) for tile in _split(0, S))),) if small else None
    if T > UNROLL_QUERIES:
        return None
    plan = []
    for q0 in range(0, T, UNROLL_BLOCK):
        q1 = min(q0 + UNROLL_BLOCK, T)
        tiles = [tile for k0, k1 in _visible_ranges(q0, q1, S, spec) for tile in _split(k0, k1)]
        plan.append(((q0, q1), tuple((tile, segmented or not _all_visible(q0, q1, *tile, spec)) for tile in tiles)))
    return tuple(plan) if sum(len(tiles) for _, tiles in plan) <= UNROLL_TILES else None


def _split(k0, k1):
    return [(start, min(start + UNROLL_KEYS, k1)) for start in range(k0, k1, UNROLL_KEYS)]


def _visible_ranges(q0, q1, S, spec):
    """Disjoint ranges of keys that some query in [q0, q1) sees, positions being aranges."""
    end = min(S, q1) if spec.is_causal else S
    if spec.window is None:
        return [(0, end)]
    end = end if spec.is_causal else min(S, q1 + spec.window)
    start = max(0, q0 - spec.window)
    first = min(spec.global_tokens, S, q1) if spec.is_causal else min(spec.global_tokens, S)
    if start <= first:
        return [(0, max(first, end))]
    return [(k0, k1) for k0, k1 in ((0, first), (start, end)) if k0 < k1]


def _all_visible(q0, q1, k0, k1, spec):
    in_order = not spec.is_causal or k1 - 1 <= q0
    if spec.window is None or k1 <= spec.global_tokens:
        return in_order
    return in_order and q1 - 1 - k0 <= spec.window and (spec.is_causal or k1 - 1 - q0 <= spec.window)


def _forward_unrolled(plan, spec, results, q_BTNH, k_BSKH, v_BSKP, q_side, k_side):
    for (q0, q1), tiles in plan:
        q, carry = _queries(q_BTNH, q0, q1 - q0, k_BSKH.shape[2]), None
        for (k0, k1), masked in tiles:
            see = visible(cut(q_side, slice(q0, q1)), cut(k_side, slice(k0, k1)), spec) if masked else None
            carry = _forward_tile(carry, q, _keys(k_BSKH, k0, k1 - k0), _keys(v_BSKP, k0, k1 - k0), see, spec)
        results = _written(results, _finish(*(carry or _nothing_seen(q, v_BSKP))), q0)
    return results


def _nothing_seen(q_BKGQH, v_BSKP):
    """The carry of `_forward_tile` before the first tile, as arrays."""
    dtype, rows = accumulator(q_BKGQH.dtype), q_BKGQH.shape[:-1]
    return jnp.full(rows, -jnp.inf, dtype), jnp.zeros(rows, dtype), jnp.zeros((*rows, v_BSKP.shape[-1]), dtype)


def _backward_unrolled(plan, spec, sums, rows, k_BSKH, v_BSKP, q_side, k_side):
    dq_sum, dk_sum, dv_sum = sums
    for (q0, q1), tiles in plan:
        q, lse, do, delta = (_queries(x, q0, q1 - q0, k_BSKH.shape[2]) for x in rows)
        for (k0, k1), masked in tiles:
            see = visible(cut(q_side, slice(q0, q1)), cut(k_side, slice(k0, k1)), spec) if masked else None
            k, v = _keys(k_BSKH, k0, k1 - k0), _keys(v_BSKP, k0, k1 - k0)
            dq, dk, dv = _backward_tile(q, k, v, see, lse, do, delta, spec)
            dq_sum, dk_sum, dv_sum = _added(dq_sum, dq, q0), _added(dk_sum, dk, k0), _added(dv_sum, dv, k0)
    return dq_sum, dk_sum, dv_sum


# The scanned schedule: a leading axis n counts blocks.


def _starts(length, block):
    """(steps of a block, first step of every block [n]); the last block ends with the array."""
    block = min(block, length)
    return block, np.minimum(np.arange(0, length, block), length - block)


def _side_blocks(side, block, starts, once=False):
    """Blocks of a Side. `once`: what the last block repeats of the one before becomes empty slots (position -1)."""
    steps = starts[:, None] + np.arange(block)
    position, *rest = (None if x is None else jnp.moveaxis(x[..., steps], -2, 0) for x in side)
    if once:
        repeated = steps < (np.arange(len(starts)) * block)[:, None]
        position = jnp.where(repeated.reshape(len(starts), *[1] * (position.ndim - 2), block), -1, position)
    return Side(position, *rest)


def _extent(side_n):
    """Per block: (least, greatest) position and segment of what is not empty, and whether a global token is in it; [n] or [n, B]."""
    real = side_n.position >= 0
    if side_n.segment is not None:
        real = real & (side_n.segment != 0)
    big = jnp.iinfo(jnp.int32).max
    low = lambda x: jnp.where(real, x, big).min(-1)  # noqa: E731
    high = lambda x: jnp.where(real, x, -1).max(-1)  # noqa: E731
    position = low(side_n.position), high(side_n.position)
    segment = None if side_n.segment is None else (low(side_n.segment), high(side_n.segment))
    return position, segment, None if side_n.is_global is None else (side_n.is_global & real).any(-1)


def _visits(q_extent, k_extent, spec):
    """(key blocks in order of visit, number of them) for one query block: those that some row of it may see."""
    (q_low, q_high), q_segment, _ = q_extent
    (k_low, k_high), k_segment, k_global = k_extent
    visit = (q_high >= 0) & (k_high >= 0)
    if spec.is_causal:
        visit &= k_low <= q_high
    if spec.window is not None:
        # Without the sum q + w, which could overflow for the empty block's bounds.
        near = (q_low - k_high <= spec.window) & (True if spec.is_causal else k_low - q_high <= spec.window)
        visit &= near if k_global is None else near | k_global
    if q_segment is not None:
        visit = visit & (k_segment[0] <= q_segment[1]) & (q_segment[0] <= k_segment[1])
    visit_n = visit if visit.ndim == 1 else visit.any(1)
    return jnp.argsort(~visit_n, stable=True), visit_n.sum()


def _pick(tree, i):
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False), tree)


def _forward_scanned(spec, results, q_BTNH, k_BSKH, v_BSKP, q_side, k_side):
    Q, q_starts = _starts(q_BTNH.shape[1], FORWARD_BLOCK)
    C, k_starts = _starts(k_BSKH.shape[1], FORWARD_BLOCK)
    q_side_n, k_side_n = _side_blocks(q_side, Q, q_starts), _side_blocks(k_side, C, k_starts, once=True)
    k_extent = _extent(k_side_n)

    def one_block(results, xs):
        start, side, extent = xs
        q, (order, number) = _queries(q_BTNH, start, Q, k_BSKH.shape[2]), _visits(extent, k_extent, spec)

        def one_tile(i, carry):
            k_start, k_side = _pick((jnp.asarray(k_starts), k_side_n), order[i])
            return _forward_tile(carry, q, _keys(k_BSKH, k_start, C), _keys(v_BSKP, k_start, C), visible(side, k_side, spec), spec)

        tiles = _finish(*jax.lax.fori_loop(0, number, one_tile, _nothing_seen(q, v_BSKP)))
        return _written(results, tiles, start), None

    return jax.lax.scan(one_block, results, (jnp.asarray(q_starts), q_side_n, _extent(q_side_n)))[0]


def _backward_scanned(spec, sums, rows, k_BSKH, v_BSKP, q_side, k_side):
    Q, q_starts = _starts(rows[0].shape[1], BACKWARD_BLOCK)
    C, k_starts = _starts(k_BSKH.shape[1], BACKWARD_BLOCK)
    q_side_n, k_side_n = _side_blocks(q_side, Q, q_starts, once=True), _side_blocks(k_side, C, k_starts, once=True)
    k_extent = _extent(k_side_n)

    def one_block(sums, xs):
        start, side, extent = xs
        q, lse, do, delta = (_queries(x, start, Q, k_BSKH.shape[2]) for x in rows)
        order, number = _visits(extent, k_extent, spec)

        def one_tile(i, carry):
            dq_tile, dk_sum, dv_sum = carry
            k_start, k_side = _pick((jnp.asarray(k_starts), k_side_n), order[i])
            k, v = _keys(k_BSKH, k_start, C), _keys(v_BSKP, k_start, C)
            dq, dk, dv = _backward_tile(q, k, v, visible(side, k_side, spec), lse, do, delta, spec)
            return dq_tile + dq, _added(dk_sum, dk, k_start), _added(dv_sum, dv, k_start)

        dq_sum, *key_sums = sums
        dq_tile, *key_sums = jax.lax.fori_loop(0, number, one_tile, (jnp.zeros(q.shape, dq_sum.dtype), *key_sums))
        return (_added(dq_sum, dq_tile, start), *key_sums), None

    return jax.lax.scan(one_block, tuple(sums), (jnp.asarray(q_starts), q_side_n, _extent(q_side_n)))[0]

"""Attention tile by tile in plain jnp: memory linear in T, tiles that no row can see are not visited. The CPU path.

B batch, T query, S key, K kv heads, G query heads per kv head, H head dim, P value dim; Q, C queries and keys of one tile.
Two schedules share the tile mathematics (FlashAttention-2, arXiv:2307.08691, algorithms 1 and 2):
  unrolled  visibility known at trace time (no positions) and few tiles: a Python loop with static ranges;
  scanned   a scan over query blocks, and in it a loop over the key blocks that the block can see, found from the extents of
            (segment, position) of every block, on the device.
Gradients of keys and values are accumulated transposed, [H,S]: the natural form would make XLA:CPU transpose every tile of
probabilities (measured: 74 against 123 GFLOP/s for that product).
"""
import functools

import jax
import jax.numpy as jnp

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
    B, T, N, H = query_BTNH.shape
    S, K = key_BSKH.shape[1:3]
    q_BKGTH = query_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    plan = _unrolled_plan(T, S, spec, index)
    out_BKGTP, lse_BKGT = _core(spec, plan, q_BKGTH, key_BSKH.swapaxes(1, 2), value_BSKP.swapaxes(1, 2), index)
    if sinks_N is not None:
        out_BKGTP, lse_BKGT = _add_sinks(out_BKGTP, lse_BKGT, sinks_N.reshape(K, N // K, 1))
    out_BTNP = out_BKGTP.astype(spec.out_dtype or query_BTNH.dtype).transpose(0, 3, 1, 2, 4).reshape(B, T, N, -1)
    return out_BTNP, lse_BKGT.transpose(0, 3, 1, 2).reshape(B, T, N)


def gradients(query_BTNH, key_BSKH, value_BSKP, index, lse_BTN, delta_BTN, d_out_BTNP, spec):
    """(dq, dk, dv) in the accumulator's dtype, from a logsumexp over these keys and perhaps others."""
    B, T, N, H = query_BTNH.shape
    S, K = key_BSKH.shape[1:3]
    by_group = lambda x: jnp.moveaxis(x.reshape(B, T, K, N // K, *x.shape[3:]), 1, 3)  # noqa: E731
    rows = by_group(lse_BTN), by_group(d_out_BTNP.astype(query_BTNH.dtype)), by_group(delta_BTN)
    arrays = by_group(query_BTNH), key_BSKH.swapaxes(1, 2), value_BSKP.swapaxes(1, 2)
    dq_BKGTH, dk_BKHS, dv_BKPS = _gradients(spec, _unrolled_plan(T, S, spec, index), *arrays, index, *rows)
    return jnp.moveaxis(dq_BKGTH, 3, 1).reshape(B, T, N, H), dk_BKHS.transpose(0, 3, 1, 2), dv_BKPS.transpose(0, 3, 1, 2)


def _add_sinks(out_BKGTP, lse_BKGT, sinks_KG1):
    """One more logit in the denominator only. Rows that saw nothing stay as they are."""
    seen_BKGT = lse_BKGT != -jnp.inf
    safe_BKGT = jnp.where(seen_BKGT, lse_BKGT, 0.0)
    sinks_KG1 = sinks_KG1.astype(lse_BKGT.dtype)
    out_BKGTP = out_BKGTP * jax.nn.sigmoid(safe_BKGT - sinks_KG1)[..., None]
    return out_BKGTP, jnp.where(seen_BKGT, jnp.logaddexp(safe_BKGT, sinks_KG1), -jnp.inf)


# One tile.


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
def _core(spec, plan, q_BKGTH, k_BKSH, v_BKSP, index):
    forward = _forward_scanned if plan is None else functools.partial(_forward_unrolled, plan)
    return forward(spec, q_BKGTH, k_BKSH, v_BKSP, *sides(index, q_BKGTH.shape[3], k_BKSH.shape[2], spec))


def _core_fwd(spec, plan, q_BKGTH, k_BKSH, v_BKSP, index):
    out_BKGTP, lse_BKGT = kept(_core(spec, plan, q_BKGTH, k_BKSH, v_BKSP, index))
    return (out_BKGTP, lse_BKGT), (q_BKGTH, k_BKSH, v_BKSP, index, out_BKGTP, lse_BKGT)


def _core_bwd(spec, plan, residuals, cotangents):
    q_BKGTH, k_BKSH, v_BKSP, index, out_BKGTP, lse_BKGT = residuals
    do_BKGTP, dlse_BKGT = cotangents
    delta_BKGT = (out_BKGTP * do_BKGTP).sum(-1) - dlse_BKGT
    dq, dk, dv = _gradients(spec, plan, q_BKGTH, k_BKSH, v_BKSP, index, lse_BKGT, do_BKGTP.astype(q_BKGTH.dtype), delta_BKGT)
    return dq.astype(q_BKGTH.dtype), dk.swapaxes(2, 3).astype(k_BKSH.dtype), dv.swapaxes(2, 3).astype(v_BKSP.dtype), None


def _gradients(spec, plan, q_BKGTH, k_BKSH, v_BKSP, index, lse_BKGT, do_BKGTP, delta_BKGT):
    """(dq, dk transposed, dv transposed) in the accumulator's dtype."""
    backward = _backward_scanned if plan is None else functools.partial(_backward_unrolled, plan)
    return backward(spec, q_BKGTH, k_BKSH, v_BKSP, *sides(index, q_BKGTH.shape[3], k_BKSH.shape[2], spec), lse_BKGT, do_BKGTP, delta_BKGT)


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


def _forward_unrolled(plan, spec, q_BKGTH, k_BKSH, v_BKSP, q_side, k_side):
    outs, lses = [], []
    for (q0, q1), tiles in plan:
        carry = None
        for (k0, k1), masked in tiles:
            see = visible(cut(q_side, slice(q0, q1)), cut(k_side, slice(k0, k1)), spec) if masked else None
            carry = _forward_tile(carry, q_BKGTH[..., q0:q1, :], k_BKSH[:, :, k0:k1], v_BKSP[:, :, k0:k1], see, spec)
        out, lse = _finish(*(carry or _nothing_seen(q_BKGTH[..., q0:q1, :], v_BKSP)))
        outs.append(out)
        lses.append(lse)
    return jnp.concatenate(outs, axis=3), jnp.concatenate(lses, axis=3)


def _nothing_seen(q_BKGQH, v_BKSP):
    """The carry of `_forward_tile` before the first tile, as arrays."""
    dtype, rows = accumulator(q_BKGQH.dtype), q_BKGQH.shape[:-1]
    return jnp.full(rows, -jnp.inf, dtype), jnp.zeros(rows, dtype), jnp.zeros((*rows, v_BKSP.shape[-1]), dtype)


def _backward_unrolled(plan, spec, q_BKGTH, k_BKSH, v_BKSP, q_side, k_side, lse_BKGT, do_BKGTP, delta_BKGT):
    dtype = delta_BKGT.dtype
    dk_BKHS, dv_BKPS = (jnp.zeros((*x.shape[:2], x.shape[3], x.shape[2]), dtype) for x in (k_BKSH, v_BKSP))
    dqs = []
    for (q0, q1), tiles in plan:
        q, do, lse, delta = q_BKGTH[..., q0:q1, :], do_BKGTP[..., q0:q1, :], lse_BKGT[..., q0:q1], delta_BKGT[..., q0:q1]
        dq_sum = jnp.zeros(q.shape, dtype)
        for (k0, k1), masked in tiles:
            see = visible(cut(q_side, slice(q0, q1)), cut(k_side, slice(k0, k1)), spec) if masked else None
            dq, dk, dv = _backward_tile(q, k_BKSH[:, :, k0:k1], v_BKSP[:, :, k0:k1], see, lse, do, delta, spec)
            dq_sum += dq
            dk_BKHS, dv_BKPS = dk_BKHS.at[..., k0:k1].add(dk), dv_BKPS.at[..., k0:k1].add(dv)
        dqs.append(dq_sum)
    return jnp.concatenate(dqs, axis=3), dk_BKHS, dv_BKPS


# The scanned schedule: leading axis n counts blocks.


def _blocks(x, axis, block, fill=0):
    """Pads `axis` to whole blocks and moves the block number to the front."""
    block = min(block, x.shape[axis])
    pad = -x.shape[axis] % block
    x = jnp.pad(x, [(0, pad if a == axis % x.ndim else 0) for a in range(x.ndim)], constant_values=fill)
    axis %= x.ndim
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :]), axis, 0)


def _joined(x_n, axis, length):
    """Undoes `_blocks`: `axis` is the position of time in the result."""
    x = jnp.moveaxis(x_n, 0, axis)
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return jax.lax.slice_in_dim(x, 0, length, axis=axis)


def _side_blocks(side, block):
    """Blocks of a Side; the padding is empty slots (position -1)."""
    return Side(*(None if x is None else _blocks(x, -1, block, fill) for x, fill in zip(side, (-1, 0, False))))


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


def _forward_scanned(spec, q_BKGTH, k_BKSH, v_BKSP, q_side, k_side):
    T = q_BKGTH.shape[3]
    cut_n = functools.partial(_blocks, block=FORWARD_BLOCK)
    q_n, q_side_n, k_side_n = cut_n(q_BKGTH, 3), _side_blocks(q_side, FORWARD_BLOCK), _side_blocks(k_side, FORWARD_BLOCK)
    keys_n = (cut_n(k_BKSH, 2), cut_n(v_BKSP, 2), k_side_n)
    k_extent = _extent(k_side_n)

    def one_block(_, xs):
        q, side, extent = xs
        order, number = _visits(extent, k_extent, spec)

        def one_tile(i, carry):
            k, v, k_side = _pick(keys_n, order[i])
            return _forward_tile(carry, q, k, v, visible(side, k_side, spec), spec)

        return None, _finish(*jax.lax.fori_loop(0, number, one_tile, _nothing_seen(q, v_BKSP)))

    _, (out_n, lse_n) = jax.lax.scan(one_block, None, (q_n, q_side_n, _extent(q_side_n)))
    return _joined(out_n, 3, T), _joined(lse_n, 3, T)


def _backward_scanned(spec, q_BKGTH, k_BKSH, v_BKSP, q_side, k_side, lse_BKGT, do_BKGTP, delta_BKGT):
    dtype, T, S = delta_BKGT.dtype, q_BKGTH.shape[3], k_BKSH.shape[2]
    cut_n = functools.partial(_blocks, block=BACKWARD_BLOCK)
    q_side_n, k_side_n = _side_blocks(q_side, BACKWARD_BLOCK), _side_blocks(k_side, BACKWARD_BLOCK)
    keys_n = (cut_n(k_BKSH, 2), cut_n(v_BKSP, 2), k_side_n)
    k_extent = _extent(k_side_n)
    rows_n = (cut_n(q_BKGTH, 3), cut_n(lse_BKGT, 3, fill=-jnp.inf), cut_n(do_BKGTP, 3), cut_n(delta_BKGT, 3))

    def one_block(sums_n, xs):
        (q, lse, do, delta), side, extent = xs
        order, number = _visits(extent, k_extent, spec)

        def one_tile(i, carry):
            dq_sum, dk_n, dv_n = carry
            j = order[i]
            k, v, k_side = _pick(keys_n, j)
            dq, dk, dv = _backward_tile(q, k, v, visible(side, k_side, spec), lse, do, delta, spec)
            return dq_sum + dq, dk_n.at[j].add(dk), dv_n.at[j].add(dv)

        dq, *sums_n = jax.lax.fori_loop(0, number, one_tile, (jnp.zeros(q.shape, dtype), *sums_n))
        return tuple(sums_n), dq

    zeros_n = tuple(jnp.zeros((*x.shape[:-2], x.shape[-1], x.shape[-2]), dtype) for x in keys_n[:2])
    (dk_n, dv_n), dq_n = jax.lax.scan(one_block, zeros_n, (rows_n, q_side_n, _extent(q_side_n)))
    return _joined(dq_n, 3, T), _joined(dk_n, 3, S), _joined(dv_n, 3, S)

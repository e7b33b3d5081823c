"""Retention chunk by chunk in plain jnp: matmuls inside chunks, all chunks at once, and a short scan over chunk states. The CPU path.

Long rows go block by block, since the chunks of a whole row would leave the cache; the backward pass computes each block again.

B batch (b: B or 1), T time, N heads, H head dim, P value dim, n chunks, C tokens of a chunk, s and t tokens of one chunk.
RetNet (arXiv:2307.08621) eq. 7, with any decay and with packed segments:
  out_t = sum_{s <= t} w(t,s) (q_t k_s) v_s + exp(sum_{u <= t} g_u) q_t S,     w(t,s) = exp(sum_{s < u <= t} g_u)
Every exponent is a sum of log decays g <= 0 of the tokens between, added up as such and never a difference of two cumulative
sums: nothing overflows, and a strong decay beside a weak one costs no digits.
"""
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.checks import accumulator
from pallas_kernels.products import product
from pallas_kernels.retention.summary import Summary, combine, runs

CHUNK = 64  # measured on a two-core CPU, H = P = 64
WHOLE = 4096  # up to here all chunks at once: backward, doing the blocks again would cost more than the cache gives
BLOCK = 1024


class _Decay(NamedTuple):
    """Log decays inside chunks; the axes b and n are 1 where nothing depends on them. -inf: not the same segment, or padding."""
    pair_bNnts: jax.Array  # from key s to query t
    from_start_bNnC: jax.Array  # from the state before the chunk to query t
    to_end_bNnC: jax.Array  # from key s to the state after the chunk
    total_bNn: jax.Array  # from the state before to the state after


def retain(q_BTNH, k_BTNH, v_BTNP, log_decay, initial_state, segment_ids, chunk_size, scale):
    """(out [B,T,N,P], final state [B,N,H,P], Summary)."""
    T = q_BTNH.shape[1]
    if T <= WHOLE or (chunk_size or CHUNK) > BLOCK:
        return _retain_whole(q_BTNH, k_BTNH, v_BTNP, log_decay, initial_state, segment_ids, chunk_size, scale)
    B, N, H, P = *q_BTNH.shape[::2], q_BTNH.shape[3], v_BTNP.shape[3]
    dtype, end = accumulator(q_BTNH.dtype), T // BLOCK * BLOCK
    by_token = {"q": q_BTNH, "k": k_BTNH, "v": v_BTNP}
    by_token |= {"segments": segment_ids} if segment_ids is not None else {}
    by_token |= {"decay": log_decay} if log_decay.ndim == 3 else {}
    # m counts the blocks of all rows, one row after the other, and no axis has length 1: XLA copies the operand of a loop where the
    # blocks of several rows lie side by side, and where such an axis leaves a choice of layouts.
    blocks_m = {name: x[:, :end].reshape(-1, BLOCK, *x.shape[2:]) for name, x in by_token.items()}

    def step(before, xs):
        m, block = xs
        before = jax.tree.map(lambda x: jnp.where(m % (T // BLOCK) == 0, 0, x), before)  # a row begins
        initial_1NHP = None if initial_state is None else jax.lax.dynamic_index_in_dim(initial_state, m // (T // BLOCK))
        after, out_1CNP = _block(log_decay, chunk_size, scale, initial_1NHP, before, {name: x[None] for name, x in block.items()})
        return after, (after, out_1CNP[0])

    nothing = Summary(jnp.zeros((1, N, H, P), dtype), jnp.zeros((1, N), dtype), jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32))
    xs = jnp.arange(B * (T // BLOCK)), blocks_m
    _, (summary_m, out_mCNP) = jax.lax.scan(jax.checkpoint(step, prevent_cse=False), nothing, xs)
    summary, out_BTNP = jax.tree.map(lambda x: x.reshape(B, -1, *x.shape[2:])[:, -1], summary_m), out_mCNP.reshape(B, end, N, P)
    if end < T:
        rest = {name: x[:, end:] for name, x in by_token.items()}
        summary, rest_BTNP = _block(log_decay, chunk_size, scale, initial_state, summary, rest)
        out_BTNP = jnp.concatenate([out_BTNP, rest_BTNP], axis=1)
    return out_BTNP, _after(initial_state, summary), summary


def _block(log_decay_N, chunk_size, scale, initial_state, before, block):
    """(Summary of everything up to the end of a block, the block's output) from the Summary of everything before it."""
    segments, state_BNHP = block.get("segments"), _after(initial_state, before)
    if segments is not None:
        _, first_B, _ = runs(segments)
        goes_on_B = (before.last_segment_B == 0) | (before.last_segment_B == first_B)
        state_BNHP = jnp.where(goes_on_B[:, None, None, None], state_BNHP, 0.0)
    log_decay = block.get("decay", log_decay_N)
    out_BCNP, _, alone = _retain_whole(block["q"], block["k"], block["v"], log_decay, state_BNHP, segments, chunk_size, scale)
    return combine(before, alone), out_BCNP


def _after(initial_state, summary):
    """The state after a stretch that begins with `initial_state` (None: zeros)."""
    if initial_state is None:
        return summary.state_BNHP
    nothing_BN, first_B = jnp.zeros_like(summary.log_decay_BN), summary.first_segment_B
    return combine(Summary(initial_state.astype(summary.state_BNHP.dtype), nothing_BN, first_B, first_B), summary).state_BNHP


def _retain_whole(q_BTNH, k_BTNH, v_BTNP, log_decay, initial_state, segment_ids, chunk_size, scale):
    """`retain` with all chunks at once."""
    B, T, N, _ = q_BTNH.shape
    dtype = accumulator(q_BTNH.dtype)
    C = min(chunk_size or CHUNK, T)
    q, k, v = (_chunks(x, C).transpose(0, 3, 1, 2, 4) for x in (q_BTNH, k_BTNH, v_BTNP))
    if segment_ids is None:
        run_bT, first_B, last_B = None, jnp.ones(B, jnp.int32), jnp.ones(B, jnp.int32)
        valid_bT = None if T % C == 0 else jnp.ones((1, T), bool)
    else:
        run_bT, first_B, last_B = runs(segment_ids)
        valid_bT = segment_ids != 0
    decay = _decay(log_decay, valid_bT, run_bT, T, C, dtype)
    before_BNnHP, alone_BNHP = _states(k, v, decay, dtype)
    passed_bNn = jnp.cumsum(decay.total_bNn * jnp.ones(k.shape[2], dtype), axis=2)
    state_BNHP = alone_BNHP
    if initial_state is not None:
        initial_BNHP = initial_state.astype(dtype)
        kept_bNn = jnp.exp(jnp.pad(passed_bNn, ((0, 0), (0, 0), (1, 0))))
        before_BNnHP = before_BNnHP + kept_bNn[:, :, :-1, None, None] * initial_BNHP[:, :, None]
        state_BNHP = alone_BNHP + kept_bNn[:, :, -1, None, None] * initial_BNHP
    out_BNnCP = _outputs(q, k, v, before_BNnHP, decay, scale, dtype)
    out_BTNP = out_BNnCP.astype(q_BTNH.dtype).transpose(0, 2, 3, 1, 4).reshape(B, -1, N, v.shape[-1])[:, :T]
    return out_BTNP, state_BNHP, Summary(alone_BNHP, jnp.broadcast_to(passed_bNn[:, :, -1], (B, N)), first_B, last_B)


def _chunks(x_BT, C, edge=False):
    """[B, T, ...] -> [B, n, C, ...]; the last chunk is filled with zeros or, with `edge`, with the last value."""
    pad = -x_BT.shape[1] % C
    if pad:
        x_BT = jnp.pad(x_BT, [(0, pad if axis == 1 else 0) for axis in range(x_BT.ndim)], mode="edge" if edge else "constant")
    return x_BT.reshape(x_BT.shape[0], -1, C, *x_BT.shape[2:])


def _decay(log_decay, valid_bT, run_bT, T, C, dtype):
    # exp() of less than this is zero, and a sum over -inf tokens would be nan where it meets zero.
    log_decay = jnp.maximum(log_decay.astype(dtype), -104.0 if dtype == jnp.float32 else -746.0)
    valid_bnC = jnp.ones((1, 1, C), bool) if valid_bT is None else _chunks(valid_bT, C)
    if log_decay.ndim == 1:
        # A constant decay counts tokens: small whole numbers, exact.
        count_bnC = jnp.cumsum(valid_bnC.astype(dtype), axis=-1)[:, None]
        g_N11 = log_decay[:, None, None]
        decay = _Decay(
            g_N11[..., None] * (count_bnC[..., :, None] - count_bnC[..., None, :]),
            g_N11 * count_bnC,
            g_N11 * (count_bnC[..., -1:] - count_bnC),
            log_decay[:, None] * count_bnC[..., -1],
        )
    else:
        g_bNnC = jnp.where(valid_bnC[:, None], _chunks(log_decay, C).transpose(0, 3, 1, 2), 0.0)
        later = jnp.tril(jnp.ones((C, C), bool), -1)  # u > s
        between_bNnus = jnp.where(later, g_bNnC[..., :, None], 0.0)
        up_to_tu = jnp.tril(jnp.ones((C, C), dtype))
        from_start_bNnC = jnp.cumsum(g_bNnC, axis=-1)
        decay = _Decay(
            jnp.einsum("tu,bNnus->bNnts", up_to_tu, between_bNnus, precision="highest"),
            from_start_bNnC,
            between_bNnus.sum(-2),
            from_start_bNnC[..., -1],
        )
    return _masked(decay, valid_bnC, None if run_bT is None else _chunks(run_bT, C, edge=True))


def _masked(decay, valid_bnC, run_bnC):
    """-inf wherever nothing passes: from the future, from or to padding, from another run."""
    see_bnts = jnp.tril(jnp.ones(valid_bnC.shape[-1:] * 2, bool)) & valid_bnC[..., :, None] & valid_bnC[..., None, :]
    reads_bnC = writes_bnC = valid_bnC
    total_bNn = decay.total_bNn
    if run_bnC is not None:
        before_bn = jnp.pad(run_bnC[:, :-1, -1], ((0, 0), (1, 0)))  # run 0 is that of the initial state
        see_bnts &= run_bnC[..., :, None] == run_bnC[..., None, :]
        reads_bnC &= run_bnC == before_bn[..., None]
        writes_bnC &= run_bnC == run_bnC[..., -1:]
        total_bNn = jnp.where((run_bnC[..., -1] == before_bn)[:, None], total_bNn, -jnp.inf)
    keep = lambda mask, x: jnp.where(mask[:, None], x, -jnp.inf)  # noqa: E731
    return _Decay(keep(see_bnts, decay.pair_bNnts), keep(reads_bnC, decay.from_start_bNnC), keep(writes_bnC, decay.to_end_bNnC), total_bNn)


def _states(k_BNnCH, v_BNnCP, decay, dtype):
    """(state before each chunk [B,N,n,H,P], state after the last [B,N,H,P]), both from zero."""
    weighted_BNnCH = (k_BNnCH * jnp.exp(decay.to_end_bNnC)[..., None]).astype(k_BNnCH.dtype)
    write_BNnHP = product("bNnch,bNncp->bNnhp", weighted_BNnCH, v_BNnCP, dtype)
    if write_BNnHP.shape[2] == 1:
        return jnp.zeros_like(write_BNnHP), write_BNnHP[:, :, 0]

    def step(state_BNHP, xs):
        write_BNHP, keep_bN = xs
        return keep_bN[..., None, None] * state_BNHP + write_BNHP, state_BNHP

    n = write_BNnHP.shape[2]
    keep_bNn = jnp.broadcast_to(jnp.exp(decay.total_bNn), (*decay.total_bNn.shape[:2], n))
    xs = jnp.moveaxis(write_BNnHP, 2, 0), jnp.moveaxis(keep_bNn, 2, 0)
    last_BNHP, before_nBNHP = jax.lax.scan(step, jnp.zeros_like(write_BNnHP[:, :, 0]), xs)
    return jnp.moveaxis(before_nBNHP, 0, 2), last_BNHP


def _outputs(q_BNnCH, k_BNnCH, v_BNnCP, before_BNnHP, decay, scale, dtype):
    scores_BNnts = product("bNnth,bNnsh->bNnts", q_BNnCH, k_BNnCH, dtype)
    scores_BNnts = (scale * scores_BNnts * jnp.exp(decay.pair_bNnts)).astype(v_BNnCP.dtype)
    inside_BNnCP = product("bNnts,bNnsp->bNntp", scores_BNnts, v_BNnCP, dtype)
    # The state stays in the accumulator's dtype: it is the long memory.
    reading_BNnCH = q_BNnCH.astype(dtype) * (scale * jnp.exp(decay.from_start_bNnC))[..., None]
    return inside_BNnCP + product("bNnth,bNnhp->bNntp", reading_BNnCH, before_BNnHP, dtype)

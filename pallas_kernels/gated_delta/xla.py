"""The gated delta rule chunk by chunk in plain jnp: matrix products inside all chunks at once, and a short scan over chunk states.

B batch, T time, N heads, H head dim, P value dim, n chunks, C tokens of a chunk, s and t tokens of one chunk.
With w(t,s) the decay from token s to token t and d(t) that from the state S before the chunk to t, every token writes b_t k_t^T times
  u_t = v_t - d(t) k_t S - sum_{s < t} w(t,s) (k_t k_s) b_s u_s
which is a unit lower triangular system (the WY form of DeltaNet, arXiv:2406.06484, with the decays of arXiv:2412.06464, section 3.2):
  b u = X (b v) - X (b d k) S,    X = (I + A)^-1,    A(t,s) = b_t w(t,s) (k_t k_s) for s < t
Every exponent is a sum of log decays g <= 0 of the tokens between, added up as such. Sums, inverses and states are in float32.
"""
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.checks import accumulator
from pallas_kernels.products import product
from pallas_kernels.retention.summary import runs

CHUNK = 64
WHOLE = 4096  # up to here all chunks at once; longer rows go block by block, and the backward pass computes each block again
BLOCK = 1024


class _Decay(NamedTuple):
    """Log decays inside chunks. -inf: not the same segment, or padding."""
    pair_BNnts: jax.Array  # from token s to token t
    from_start_BNnC: jax.Array  # from the state before the chunk to token t
    to_end_BNnC: jax.Array  # from token s to the state after the chunk
    total_BNn: jax.Array  # from the state before to the state after


def delta(q_BTNH, k_BTNH, v_BTNP, log_decay_BTN, beta_BTN, initial_state, segment_ids, chunk_size, scale):
    """(out [B,T,N,P], final state [B,N,H,P])."""
    B, T, N, H = q_BTNH.shape
    dtype, C = accumulator(q_BTNH.dtype), min(chunk_size or CHUNK, 1 << (T - 1).bit_length())
    state = jnp.zeros((B, N, H, v_BTNP.shape[-1]), dtype) if initial_state is None else initial_state.astype(dtype)
    segments = jnp.ones((B, T), jnp.int32) if segment_ids is None else segment_ids.astype(jnp.int32)
    block = functools.partial(_block, C=C, scale=scale, packed=segment_ids is not None)
    by_token = (q_BTNH, k_BTNH, v_BTNP, log_decay_BTN, beta_BTN, segments)
    if T <= max(WHOLE, C):
        (state, _), out_BTNP = block((state, jnp.zeros(B, jnp.int32)), by_token)
        return out_BTNP, state
    size = max(BLOCK, C)
    end = T // size * size
    blocks = tuple(x[:, :end].reshape(B, -1, size, *x.shape[2:]).swapaxes(0, 1) for x in by_token)
    carry, out = jax.lax.scan(jax.checkpoint(block, prevent_cse=False), (state, jnp.zeros(B, jnp.int32)), blocks)
    out_BTNP = out.swapaxes(0, 1).reshape(B, end, *out.shape[3:])
    if end < T:
        carry, rest_BTNP = block(carry, tuple(x[:, end:] for x in by_token))
        out_BTNP = jnp.concatenate([out_BTNP, rest_BTNP], axis=1)
    return out_BTNP, carry[0]


def _block(carry, by_token, *, C, scale, packed):
    """((state, last nonzero segment), out [B,T,N,P]) of some tokens, all their chunks at once."""
    (state, last_B), (q, k, v, log_decay, beta, segments) = carry, by_token
    B, T, N, H = q.shape
    dtype = state.dtype
    if packed:
        run_BT, first_B, end_B = runs(segments)
        goes_on_B = (last_B == 0) | (first_B == 0) | (last_B == first_B)
        state, last_B = jnp.where(goes_on_B[:, None, None, None], state, 0.0), jnp.where(end_B == 0, last_B, end_B)
    else:
        run_BT = None
    decay = _decay(log_decay, segments != 0, run_BT, C, dtype)
    q, k, v = (_chunks(x, C).transpose(0, 3, 1, 2, 4) for x in (q, k, v))
    beta_BNnC1 = (_chunks(beta * (segments != 0)[..., None], C).transpose(0, 3, 1, 2)[..., None]).astype(dtype)
    wide_k, wide_v = k.astype(dtype), v.astype(dtype)
    pair_BNnts = jnp.exp(decay.pair_BNnts)
    scores_BNnts = scale * product("BNnth,BNnsh->BNnts", q, k, dtype) * pair_BNnts
    keys_BNnts = beta_BNnC1 * product("BNnth,BNnsh->BNnts", k, k, dtype) * pair_BNnts
    inverse_BNnts = unit_lower_inverse(jnp.tril(keys_BNnts, -1))
    # One product for both right-hand sides of the triangular system.
    sides = jnp.concatenate([beta_BNnC1 * wide_v, beta_BNnC1 * jnp.exp(decay.from_start_BNnC)[..., None] * wide_k], axis=-1)
    solved = product("BNnts,BNnsx->BNntx", inverse_BNnts, sides, dtype)
    values, reads = solved[..., : v.shape[-1]], solved[..., v.shape[-1] :]
    queries = (scale * jnp.exp(decay.from_start_BNnC))[..., None] * q.astype(dtype)
    writes = jnp.exp(decay.to_end_BNnC)[..., None] * wide_k

    def chunk(state, xs):
        value, read, score, query, write, kept = xs
        value = value - product("BNch,BNhp->BNcp", read, state, dtype)
        out = product("BNch,BNhp->BNcp", query, state, dtype) + product("BNts,BNsp->BNtp", score, value, dtype)
        return kept[..., None, None] * state + product("BNch,BNcp->BNhp", write, value, dtype), out

    by_chunk = (values, reads, scores_BNnts, queries, writes, jnp.exp(decay.total_BNn))
    state, out_nBNCP = jax.lax.scan(chunk, state, jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), by_chunk))
    out_BTNP = out_nBNCP.transpose(1, 0, 3, 2, 4).reshape(B, -1, N, v.shape[-1])[:, :T]
    return (state, last_B), out_BTNP.astype(q.dtype)


def _chunks(x_BT, C, edge=False):
    """[B, T, ...] -> [B, n, C, ...]; the last chunk is filled with zeros or, with `edge`, with the last value."""
    pad = -x_BT.shape[1] % C
    if pad:
        x_BT = jnp.pad(x_BT, [(0, pad if axis == 1 else 0) for axis in range(x_BT.ndim)], mode="edge" if edge else "constant")
    return x_BT.reshape(x_BT.shape[0], -1, C, *x_BT.shape[2:])


def _decay(log_decay_BTN, valid_BT, run_BT, C, dtype):
    # exp() of less than this is zero, and a sum over -inf tokens would be nan where it meets zero.
    log_decay_BTN = jnp.maximum(log_decay_BTN.astype(dtype), -104.0 if dtype == jnp.float32 else -746.0)
    g_BNnC = _chunks(jnp.where(valid_BT[..., None], log_decay_BTN, 0.0), C).transpose(0, 3, 1, 2)
    valid_BnC = _chunks(valid_BT, C)[:, None]
    between_BNnus = jnp.where(jnp.tril(jnp.ones((C, C), bool), -1), g_BNnC[..., :, None], 0.0)  # g_u for u > s
    pair_BNnts = jnp.einsum("tu,BNnus->BNnts", jnp.tril(jnp.ones((C, C), dtype)), between_BNnus, precision="highest")
    from_start_BNnC = jnp.cumsum(g_BNnC, axis=-1)
    to_end_BNnC, total_BNn = between_BNnus.sum(-2), from_start_BNnC[..., -1]
    see = jnp.tril(jnp.ones((C, C), bool)) & valid_BnC[..., :, None] & valid_BnC[..., None, :]
    reads = writes = valid_BnC
    if run_BT is not None:
        run_BnC = _chunks(run_BT, C, edge=True)[:, None]
        before_Bn = jnp.pad(run_BnC[:, :, :-1, -1], ((0, 0), (0, 0), (1, 0)))  # run 0 is that of the initial state
        see &= run_BnC[..., :, None] == run_BnC[..., None, :]
        reads &= run_BnC == before_Bn[..., None]
        writes &= run_BnC == run_BnC[..., -1:]
        total_BNn = jnp.where(run_BnC[..., -1] == before_Bn, total_BNn, -jnp.inf)
    mask = lambda keep, x: jnp.where(keep, x, -jnp.inf)  # noqa: E731
    return _Decay(mask(see, pair_BNnts), mask(reads, from_start_BNnC), mask(writes, to_end_BNnC), total_BNn)


@jax.custom_vjp
def unit_lower_inverse(a):
    """(I + a)^-1 for strictly lower triangular a [..., C, C], C a power of two, from the inverses of both halves.

    As stable as forward substitution. The product of (I + (-a)^(2^i)), as short, is not: its powers grow before they cancel.
    """
    *lead, C, _ = a.shape
    inverse, b = jnp.ones((*lead, C, 1, 1), a.dtype), 1
    while b < C:
        m = C // (2 * b)
        diagonal = jnp.moveaxis(jnp.diagonal(a.reshape(*lead, m, 2 * b, m, 2 * b), axis1=-4, axis2=-2), -1, -3)
        first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        corner = product("...xy,...yz->...xz", product("...xy,...yz->...xz", second, diagonal[..., b:, :b], a.dtype), first, a.dtype)
        upper = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        inverse, b = jnp.concatenate([upper, jnp.concatenate([-corner, second], axis=-1)], axis=-2), 2 * b
    return inverse[..., 0, :, :]


def _inverse_forward(a):
    inverse = unit_lower_inverse(a)
    return inverse, inverse


def _inverse_backward(inverse, d_inverse):
    right = product("...ts,...us->...tu", d_inverse, inverse, inverse.dtype)
    return (-jnp.tril(product("...ut,...us->...ts", inverse, right, inverse.dtype), -1),)


unit_lower_inverse.defvjp(_inverse_forward, _inverse_backward)

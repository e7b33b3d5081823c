"""Attention with the whole T x S matrix in float32: the slow twin of every other implementation.

B batch, T query, S key, N heads, K kv heads, H head dim, P value dim.
"""
import jax
import jax.numpy as jnp

from pallas_kernels.checks import accumulator
from pallas_kernels.flash_attention.mask import sides, visible


def attend(query_BTNH, key_BSKH, value_BSKP, index, sinks_N, spec):
    """(out [B,T,N,P], logsumexp [B,T,N])."""
    dtype, heads = accumulator(query_BTNH.dtype), query_BTNH.shape[2]
    q_BTNH, k_BSNH, v_BSNP = (_per_head(x, heads, dtype) for x in (query_BTNH, key_BSKH, value_BSKP))
    s_BNTS = _scores(q_BTNH, k_BSNH, spec)
    see_BNTS = _see(s_BNTS, index, spec)
    seen_BNT = see_BNTS.any(-1)
    # Rows that see nothing keep finite scores, so that no NaN meets the zero that multiplies it, in values or gradients.
    s_BNTS = jnp.where(see_BNTS, s_BNTS, jnp.where(seen_BNT[..., None], -jnp.inf, 0.0))
    sink_N11 = None if sinks_N is None else sinks_N.astype(dtype)[:, None, None]
    m_BNT1 = s_BNTS.max(-1, keepdims=True)
    m_BNT1 = m_BNT1 if sinks_N is None else jnp.maximum(m_BNT1, sink_N11)
    p_BNTS = jnp.exp(s_BNTS - m_BNT1)
    l_BNT1 = p_BNTS.sum(-1, keepdims=True)
    l_BNT1 = l_BNT1 if sinks_N is None else l_BNT1 + jnp.exp(sink_N11 - m_BNT1)
    p_BNTS = jnp.where(seen_BNT[..., None], p_BNTS / l_BNT1, 0.0)
    lse_BNT = jnp.where(seen_BNT, (m_BNT1 + jnp.log(l_BNT1))[..., 0], -jnp.inf)
    out_BTNP = jnp.einsum("bnts,bsnp->btnp", p_BNTS, v_BSNP, precision="highest")
    return out_BTNP.astype(spec.out_dtype or query_BTNH.dtype), lse_BNT.swapaxes(1, 2)


def gradients(query_BTNH, key_BSKH, value_BSKP, index, lse_BTN, delta_BTN, d_out_BTNP, spec):
    """(dq, dk, dv) in the accumulator's dtype, from a logsumexp over these keys and perhaps others."""
    dtype, heads = lse_BTN.dtype, query_BTNH.shape[2]
    q_BTNH, k_BSNH, v_BSNP = (_per_head(x, heads, dtype) for x in (query_BTNH, key_BSKH, value_BSKP))
    s_BNTS, pull = jax.vjp(lambda q, k: _scores(q, k, spec), q_BTNH, k_BSNH)
    lse_BNT1, delta_BNT1 = (x.swapaxes(1, 2)[..., None] for x in (lse_BTN, delta_BTN))
    p_BNTS = jnp.where(_see(s_BNTS, index, spec), jnp.exp(s_BNTS - lse_BNT1), 0.0)
    d_out_BTNP = d_out_BTNP.astype(dtype)
    dp_BNTS = jnp.einsum("btnp,bsnp->bnts", d_out_BTNP, v_BSNP, precision="highest")
    dq_BTNH, dk_BSNH = pull(p_BNTS * (dp_BNTS - delta_BNT1))
    dv_BSNP = jnp.einsum("bnts,btnp->bsnp", p_BNTS, d_out_BTNP, precision="highest")
    B, S, K, _ = key_BSKH.shape
    return dq_BTNH, *(x.reshape(B, S, K, heads // K, -1).sum(3) for x in (dk_BSNH, dv_BSNP))


def _per_head(x_BTKH, heads, dtype):
    return jnp.repeat(x_BTKH.astype(dtype), heads // x_BTKH.shape[2], axis=2)


def _scores(q_BTNH, k_BSNH, spec):
    s_BNTS = spec.scale * jnp.einsum("btnh,bsnh->bnts", q_BTNH, k_BSNH, precision="highest")
    return s_BNTS if spec.soft_cap is None else spec.soft_cap * jnp.tanh(s_BNTS / spec.soft_cap)


def _see(s_BNTS, index, spec):
    see = visible(*sides(index, *s_BNTS.shape[2:], spec), spec)
    return jnp.broadcast_to(see if see.ndim == 2 else see[:, None], s_BNTS.shape)

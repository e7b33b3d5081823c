"""Attention with the whole T x S matrix in float32: the slow twin of every other implementation.

B batch, T query, S key, N heads, K kv heads, H head dim, P value dim.
"""
import jax.numpy as jnp

from pallas_kernels.checks import accumulator
from pallas_kernels.flash_attention.mask import sides, visible


def attend(query_BTNH, key_BSKH, value_BSKP, index, sinks_N, spec):
    """(out [B,T,N,P] in the query's dtype, logsumexp [B,T,N])."""
    B, T, N, _ = query_BTNH.shape
    S, K = key_BSKH.shape[1:3]
    dtype = accumulator(query_BTNH.dtype)
    q_BTNH = query_BTNH.astype(dtype)
    k_BSNH, v_BSNP = (jnp.repeat(x.astype(dtype), N // K, axis=2) for x in (key_BSKH, value_BSKP))
    s_BNTS = spec.scale * jnp.einsum("btnh,bsnh->bnts", q_BTNH, k_BSNH, precision="highest")
    if spec.soft_cap is not None:
        s_BNTS = spec.soft_cap * jnp.tanh(s_BNTS / spec.soft_cap)
    see = visible(*sides(index, T, S, spec), spec)
    see_BNTS = jnp.broadcast_to(see if see.ndim == 2 else see[:, None], s_BNTS.shape)
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
    return out_BTNP.astype(query_BTNH.dtype), lse_BNT.swapaxes(1, 2)

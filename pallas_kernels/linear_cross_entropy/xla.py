"""Cross entropy with the logits of one chunk of tokens at a time in plain jnp. The CPU path.

T tokens, D model, V vocab, C tokens of a chunk, n chunks.
While T * V <= KEEP_LOGITS the logits are kept for the backward pass (and there is one chunk): computing them again is a fourth
matmul beside the three that are needed. Above it memory stays at one chunk whatever T is.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.checks import accumulator
from pallas_kernels.products import product

KEEP_LOGITS = 2**25  # elements of T x V: 128 MiB in float32
CHUNK_LOGITS = 2**22  # elements of a chunk above that


def lse_and_label_logit(x_TD, w, labels_T, soft_cap, w_layout):
    """(logsumexp [T], logit of the label [T], 0 where the label is outside [0, V))."""
    T, V = x_TD.shape[0], w.shape[w_layout.index("V")]
    if T * V <= KEEP_LOGITS:
        return _kept((soft_cap, w_layout), x_TD, w, labels_T)
    chunk = min(T, max(64, CHUNK_LOGITS // V))
    pad = -T % chunk
    # Padded tokens have the label -1 (no label logit) and zero cotangents.
    x_nCD = jnp.pad(x_TD, ((0, pad), (0, 0))).reshape(-1, chunk, x_TD.shape[1])
    labels_nC = jnp.pad(labels_T, (0, pad), constant_values=-1).reshape(-1, chunk)
    lse_nC, label_logit_nC = _chunked((soft_cap, w_layout), x_nCD, w, labels_nC)
    return lse_nC.reshape(-1)[:T], label_logit_nC.reshape(-1)[:T]


# One chunk.


def _logits(static, x_CD, w):
    soft_cap, w_layout = static
    logits_CV = product(f"td,{w_layout.lower()}->tv", x_CD, w, accumulator(x_CD.dtype))
    return logits_CV if soft_cap is None else soft_cap * jnp.tanh(logits_CV / soft_cap)


def _statistics(logits_CV, labels_C):
    m_C = logits_CV.max(1)
    m_C = jnp.where(jnp.isfinite(m_C), m_C, 0.0)
    lse_C = m_C + jnp.log(jnp.exp(logits_CV - m_C[:, None]).sum(1))
    V = logits_CV.shape[1]
    label_logit_C = jnp.take_along_axis(logits_CV, jnp.clip(labels_C, 0, V - 1)[:, None], axis=1)[:, 0]
    return lse_C, jnp.where((labels_C >= 0) & (labels_C < V), label_logit_C, 0.0)


def _backward(static, x_CD, w, labels_C, logits_CV, lse_C, dlse_C, dlabel_C):
    """(dx [C,D], dw [D,V] whatever the layout: the other product would transpose the logits)."""
    soft_cap, w_layout = static
    is_label_CV = jax.lax.broadcasted_iota(labels_C.dtype, logits_CV.shape, 1) == labels_C[:, None]
    dlogits_CV = dlse_C[:, None] * jnp.exp(logits_CV - lse_C[:, None]) + jnp.where(is_label_CV, dlabel_C[:, None], 0.0)
    if soft_cap is not None:
        dlogits_CV = dlogits_CV * (1.0 - (logits_CV / soft_cap) ** 2)
    dlogits_CV = dlogits_CV.astype(x_CD.dtype)
    dtype = lse_C.dtype
    return product(f"tv,{w_layout.lower()}->td", dlogits_CV, w, dtype), product("td,tv->dv", x_CD, dlogits_CV, dtype)


# Logits kept.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kept(static, x_TD, w, labels_T):
    return _statistics(_logits(static, x_TD, w), labels_T)


def _kept_fwd(static, x_TD, w, labels_T):
    logits_TV = _logits(static, x_TD, w)
    lse_T, label_logit_T = _statistics(logits_TV, labels_T)
    return (lse_T, label_logit_T), (x_TD, w, labels_T, logits_TV, lse_T)


def _kept_bwd(static, residuals, cotangents):
    x_TD, w, labels_T, logits_TV, lse_T = residuals
    dx_TD, dw_DV = _backward(static, x_TD, w, labels_T, logits_TV, lse_T, *cotangents)
    return dx_TD.astype(x_TD.dtype), _as_layout(dw_DV, static, w), np.zeros(labels_T.shape, jax.dtypes.float0)


_kept.defvjp(_kept_fwd, _kept_bwd)


def _as_layout(dw_DV, static, w):
    return (dw_DV if static[1] == "DV" else dw_DV.T).astype(w.dtype)


# Logits recomputed chunk by chunk.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(static, x_nCD, w, labels_nC):
    return jax.lax.map(lambda xs: _statistics(_logits(static, xs[0], w), xs[1]), (x_nCD, labels_nC))


def _chunked_fwd(static, x_nCD, w, labels_nC):
    lse_nC, label_logit_nC = _chunked(static, x_nCD, w, labels_nC)
    return (lse_nC, label_logit_nC), (x_nCD, w, labels_nC, lse_nC)


def _chunked_bwd(static, residuals, cotangents):
    x_nCD, w, labels_nC, lse_nC = residuals

    def one_chunk(dw_DV, xs):
        x_CD, labels_C, lse_C, dlse_C, dlabel_C = xs
        dx_CD, dw = _backward(static, x_CD, w, labels_C, _logits(static, x_CD, w), lse_C, dlse_C, dlabel_C)
        return dw_DV + dw, dx_CD.astype(x_CD.dtype)

    D, V = x_nCD.shape[-1], w.shape[static[1].index("V")]
    dw_DV, dx_nCD = jax.lax.scan(one_chunk, jnp.zeros((D, V), lse_nC.dtype), (x_nCD, labels_nC, lse_nC, *cotangents))
    return dx_nCD, _as_layout(dw_DV, static, w), np.zeros(labels_nC.shape, jax.dtypes.float0)


_chunked.defvjp(_chunked_fwd, _chunked_bwd)

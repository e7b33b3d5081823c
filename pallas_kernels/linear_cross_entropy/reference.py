"""Cross entropy from the whole matrix of logits in float32: the slow twin.

T tokens, D model, V vocab.
"""
import jax
import jax.numpy as jnp

from pallas_kernels.checks import accumulator


def lse_and_label_logit(x_TD, w, labels_T, soft_cap, w_layout):
    """(logsumexp [T], logit of the label [T], 0 where the label is outside [0, V))."""
    dtype = accumulator(x_TD.dtype)
    w_DV = w if w_layout == "DV" else w.T
    logits_TV = jnp.einsum("td,dv->tv", x_TD.astype(dtype), w_DV.astype(dtype), precision="highest")
    if soft_cap is not None:
        logits_TV = soft_cap * jnp.tanh(logits_TV / soft_cap)
    is_label_TV = jnp.arange(w_DV.shape[1]) == labels_T[:, None]
    return jax.nn.logsumexp(logits_TV, axis=1), jnp.where(is_label_TV, logits_TV, 0).sum(1)

"""The public door of the fused linear + cross entropy: checks, choice of implementation, weights and z-loss.

T tokens, D model, V vocab.
"""
import jax.numpy as jnp

from pallas_kernels import checks, dispatch

_OP = "linear_cross_entropy"


def linear_cross_entropy(x_TD, w, labels_T, *, w_layout="DV", weights_T=None, z_loss=0.0, logits_soft_cap=None, implementation=None,
                         interpret=None):
    """(loss_T, lse_T): loss = weights * (lse - logit[label] + z_loss * lse^2), lse = logsumexp over the vocabulary, both float32.

    A label outside [0, V) contributes no label logit (loss = lse without z_loss): a shard of the vocabulary calls the op with shifted
    labels, and the shards combine as logsumexp of lse and sum of (lse - loss). Both results are differentiable in x, w and weights.

    Args:
      x_TD: floating.
      w: same dtype, [D,V] for w_layout="DV" or [V,D] for "VD" (a tied embedding).
      labels_T: int.
      weights_T: floating [T], or None for ones.
      z_loss: coefficient, a Python number.
      logits_soft_cap: logits become cap * tanh(logit / cap).
      implementation: None, "reference", "xla", "pallas_tpu" or "pallas_gpu".
      interpret: for Pallas kernels; None interprets where the named kernel has no hardware.

    >>> import jax.numpy as jnp
    >>> loss_T, lse_T = linear_cross_entropy(jnp.zeros((2, 3)), jnp.ones((3, 4)), jnp.array([1, 7]))
    >>> [round(float(x), 3) for x in loss_T]
    [1.386, 1.386]
    """
    if w_layout not in ("DV", "VD"):
        raise ValueError(f"{_OP}: w_layout={w_layout!r} is unknown; expected 'DV' or 'VD'.")
    checks.rank(_OP, "x_TD", x_TD, "TD")
    checks.floating(_OP, "x_TD", x_TD)
    checks.rank(_OP, "w", w, w_layout)
    checks.floating(_OP, "w", w, like=("x_TD", x_TD))
    T, D = x_TD.shape
    V = w.shape[w_layout.index("V")]
    checks.shape(_OP, "w", w, (D, V) if w_layout == "DV" else (V, D), f"D of x_TD, w_layout={w_layout!r}")
    checks.shape(_OP, "labels_T", labels_T, (T,), "T of x_TD")
    checks.integer(_OP, "labels_T", labels_T)
    if 0 in (T, D, V):
        raise ValueError(f"{_OP}: empty operand, T={T} D={D} V={V}; all must be at least 1.")
    if weights_T is not None:
        checks.shape(_OP, "weights_T", weights_T, (T,), "T of x_TD")
        checks.floating(_OP, "weights_T", weights_T)
    checks.number(_OP, "z_loss", z_loss)
    if logits_soft_cap is not None:
        checks.number(_OP, "logits_soft_cap", logits_soft_cap, positive=True)
    arguments = (*(jnp.asarray(x) for x in (x_TD, w, labels_T)), logits_soft_cap, w_layout)
    lse_T, label_logit_T = dispatch.pick(_OP, "lse_and_label_logit", implementation, interpret, arguments)(*arguments)
    loss_T = lse_T - label_logit_T
    if z_loss:
        loss_T = loss_T + z_loss * lse_T**2
    return (loss_T if weights_T is None else weights_T.astype(loss_T.dtype) * loss_T), lse_T

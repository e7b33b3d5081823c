"""Token mixers written from their papers, in the plainest form: whole score matrices, loops over heads, complex rotations.

They share no code with the package. `xp` is numpy (values) or jax.numpy (so that gradients come from autodiff of the plain form).
"""


def rms(xp, x, eps, scale=1.0):
    return x / xp.sqrt(xp.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def retention(xp, p, x_TD, gammas, theta):
    """RetNet (arXiv:2307.08621) eq. 5, one row: O_n = sum over m <= n of gamma^(n-m) Re(q_n conj(k_m) e^(i(n-m)theta)) v_m / sqrt(d_k)."""
    T, heads = x_TD.shape[0], []
    n_m = xp.arange(T)[:, None] - xp.arange(T)[None, :]
    for h, gamma in enumerate(gammas):
        q, k, v = x_TD @ p["wq"][:, h], x_TD @ p["wk"][:, h], x_TD @ p["wv"][:, h]
        d_k = q.shape[1]
        scores = 0.0
        for i in range(d_k // 2):
            angle = float(theta) ** -(i / (d_k // 2 - 1) if d_k > 2 else 0.0)
            q_i, k_i = q[:, 2 * i] + 1j * q[:, 2 * i + 1], k[:, 2 * i] + 1j * k[:, 2 * i + 1]
            scores = scores + xp.real(q_i[:, None] * xp.conj(k_i)[None, :] * xp.exp(1j * angle * n_m))
        decay = xp.where(n_m >= 0, gamma ** xp.maximum(n_m, 0), 0.0)
        heads.append((scores * decay / d_k**0.5) @ v)
    return xp.stack(heads, axis=1)


def retention_layer(xp, p, x_TD, gammas, theta, eps):
    """Eq. 8: (swish(x W_g) * headnorm(retention)) W_o."""
    y = rms(xp, retention(xp, p, x_TD, gammas, theta), eps)
    gate = xp.einsum("td,dnp->tnp", x_TD, p["wg"])
    return xp.einsum("tnp,npd->td", y * gate / (1 + xp.exp(-gate)), p["wo"])


def attention_layer(xp, p, x_TD, c):
    """One row of softmax attention; key s is seen by query t iff 0 <= t - s <= window.

    c: dict with heads, kv_heads, theta, rotary (rotated dims), window, cap, scale, eps, qk_norm.
    """
    T, outputs = x_TD.shape[0], 0.0
    t_s = xp.arange(T)[:, None] - xp.arange(T)[None, :]
    seen = (t_s >= 0) & (t_s <= (c["window"] if c["window"] is not None else T))
    for n in range(c["heads"]):
        g = n * c["kv_heads"] // c["heads"]
        q, k, v = x_TD @ p["wq"][:, n], x_TD @ p["wk"][:, g], x_TD @ p["wv"][:, g]
        if "bq" in p:
            q, k, v = q + p["bq"][n], k + p["bk"][g], v + p["bv"][g]
        if c["qk_norm"]:
            q, k = rms(xp, q, c["eps"], p["q_norm.scale"]), rms(xp, k, c["eps"], p["k_norm.scale"])
        half = c["rotary"] // 2
        scores = q[:, 2 * half :] @ k[:, 2 * half :].T
        for i in range(half):
            q_i, k_i = q[:, i] + 1j * q[:, i + half], k[:, i] + 1j * k[:, i + half]
            scores = scores + xp.real(q_i[:, None] * xp.conj(k_i)[None, :] * xp.exp(1j * c["theta"] ** (-i / half) * t_s))
        scores = scores * (q.shape[1] ** -0.5 if c["scale"] is None else c["scale"])
        if c["cap"] is not None:
            scores = c["cap"] * xp.tanh(scores / c["cap"])
        weights = xp.where(seen, xp.exp(scores), 0.0)
        total = weights.sum(axis=1, keepdims=True) + (xp.exp(p["sinks"][n]) if "sinks" in p else 0.0)
        y = (weights / total) @ v
        if "wg" in p:
            y = y / (1 + xp.exp(-(x_TD @ p["wg"][:, n] + (p["bg"][n] if "bg" in p else 0.0))))
        outputs = outputs + y @ p["wo"][n]
    return outputs

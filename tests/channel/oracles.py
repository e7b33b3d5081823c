"""Mixture of experts written from the papers: who goes where, in loops over tokens (numpy), and the dense sum over all experts (xp)."""
import numpy as np


def scores_of(logits_E, router):
    if router == "sigmoid":
        return 1 / (1 + np.exp(-logits_E))
    shifted = np.exp(logits_E - logits_E.max())
    return shifted / shifted.sum()


def choose(logits_E, bias_E, c):
    """Expert ids of one token, best first (DeepSeek-V3, arXiv:2412.19437 section 2.1.2)."""
    E, groups = len(logits_E), c.get("groups", 1)
    choice = scores_of(logits_E, c.get("router", "softmax")) + bias_E
    size = E // groups
    if groups > 1:
        value = [sum(sorted(choice[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
        allowed = sorted(range(groups), key=lambda g: -value[g])[: c["top_groups"]]
        choice = np.array([choice[e] if e // size in allowed else -np.inf for e in range(E)])
    return sorted(range(E), key=lambda e: -choice[e])[: c["top_k"]]


def route(logits_BTE, bias_E, valid_BT, c, capacity=None):
    """(one-hot of kept choices [B,T,E], of all choices, number dropped): in order of the row, an expert takes `capacity` tokens."""
    B, T, E = logits_BTE.shape
    kept, routed, dropped = np.zeros((B, T, E)), np.zeros((B, T, E)), 0
    for b in range(B):
        taken = np.zeros(E, int)
        for t in range(T):
            if not valid_BT[b, t]:
                continue
            for e in choose(logits_BTE[b, t], bias_E, c):
                routed[b, t, e] = 1
                if capacity is not None and taken[e] >= capacity:
                    dropped += 1
                else:
                    kept[b, t, e] = 1
                taken[e] += 1
    return kept, routed, dropped


def activation(xp, name, h, swiglu_alpha=1.702, swiglu_limit=7.0):
    """h: the products with each input matrix."""
    if name == "swiglu_clamped":  # gpt-oss's: the gate is cut from above, the rest from both sides and raised by one
        gate, up = xp.where(h[0] > swiglu_limit, swiglu_limit, h[0]), xp.where(abs(h[1]) > swiglu_limit, swiglu_limit * xp.sign(h[1]), h[1])
        return gate / (1 + xp.exp(-swiglu_alpha * gate)) * (up + 1)
    if name == "swiglu":
        return h[0] / (1 + xp.exp(-h[0])) * h[1]
    if name == "relu2":
        return xp.maximum(h[0], 0) ** 2
    tanh = xp.tanh((2 / np.pi) ** 0.5 * (h[0] + 0.044715 * h[0] ** 3))
    gelu = 0.5 * h[0] * (1 + tanh)
    return gelu * h[1] if name == "geglu" else gelu


def mlp(xp, p, x, name, prefix="", **fields):
    def linear(x, part):
        return x @ p[f"{prefix}w_{part}"] + p.get(f"{prefix}b_{part}", 0.0)

    return linear(activation(xp, name, [linear(x, part) for part in ("in", "up") if f"{prefix}w_{part}" in p], **fields), "out")


def moe(xp, p, x_BTD, kept_BTE, routed_BTE, c):
    """Every expert on every token; weights one-hot by choice. Weights are normalised over all choices, dropped ones included."""
    logits = x_BTD @ p["router"] + p.get("router_bias", 0.0)
    if c.get("router", "softmax") == "sigmoid":
        scores = 1 / (1 + xp.exp(-logits))
    else:
        scores = xp.exp(logits - logits.max(axis=-1, keepdims=True))
        scores = scores / scores.sum(axis=-1, keepdims=True)
    weights = scores * routed_BTE
    if c.get("normalize_weights", True):
        weights = weights / (weights.sum(axis=-1, keepdims=True) + c.get("weights_eps", 1e-20))
    weights = weights * kept_BTE * c.get("routed_scaling", 1.0)
    name, y = c.get("activation", "swiglu"), 0.0
    fields = {n: c[n] for n in ("swiglu_alpha", "swiglu_limit") if n in c}
    for e in range(p["router"].shape[1]):
        own = {w: p[w][e] for w in ("w_in", "w_up", "w_out", "b_in", "b_up", "b_out") if w in p}
        y = y + weights[..., e : e + 1] * mlp(xp, own, x_BTD, name, **fields)
    return y + (mlp(xp, p, x_BTD, name, "shared.", **fields) if "shared.w_in" in p else 0.0)

"""Ling and Ring linear 2.0 (arXiv:2510.19338) in numpy float64, token by token, from the paper and what the authors' code is known to do.

Their code comes with the weights and needs a GPU. Known of it: of L layers in groups of g, layer l attends if (l + 1) % g == 0 or
l >= L // g * g; a head decays by exp(-slope (1 - (l - 1) / (L - 1) + 1e-5)) with ALiBi's slopes; queries and keys are normed, then part of
them rotates; the group norm comes before the sigmoid gate.
"""
import math

import numpy as np


def shapes(f):
    """{name: shape} of a checkpoint."""
    D, V, N, K, H = (f[k] for k in ("hidden_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim"))
    found = {"model.word_embeddings.weight": (V, D), "model.norm.weight": (D,)}
    found |= {} if f.get("tie_word_embeddings") else {"lm_head.weight": (V, D)}
    for i in range(f["num_hidden_layers"]):
        at = f"model.layers.{i}."
        found |= {at + "input_layernorm.weight": (D,), at + "post_attention_layernorm.weight": (D,)}
        rows = (N + 2 * K) * H if attends(i, f) else 3 * N * H
        found |= {at + "attention.query_key_value.weight": (rows, D), at + "attention.dense.weight": (D, N * H)}
        if f["use_qk_norm"]:
            found |= {at + "attention.query_layernorm.weight": (H,), at + "attention.key_layernorm.weight": (H,)}
        if not attends(i, f):
            found |= {at + "attention.g_proj.weight": (N * H, D), at + "attention.g_norm.weight": (N * H,)}
        widths = {"mlp.": f["intermediate_size"]}
        if i >= f["first_k_dense_replace"]:
            E, F = f["num_experts"], f["moe_intermediate_size"]
            widths = {f"mlp.experts.{e}.": F for e in range(E)}
            widths |= {"mlp.shared_experts.": F * f["num_shared_experts"]} if f["num_shared_experts"] else {}
            found |= {at + "mlp.gate.weight": (E, D)}
            found |= {at + "mlp.gate.expert_bias": (E,)} if f["moe_router_enable_expert_bias"] else {}
        for part, F in widths.items():
            found |= {f"{at}{part}{x}_proj.weight": s for x, s in (("gate", (F, D)), ("up", (F, D)), ("down", (D, F)))}
    return found


def attends(i, f):
    group = f["layer_group_size"]
    return (i + 1) % group == 0 or i >= f["num_hidden_layers"] // group * group


def slopes(n):
    """ALiBi's (arXiv:2108.12409): of n heads, those of the power of two below n and then every second one of twice as many."""
    if n & (n - 1) == 0:
        return [2 ** (-8 * (h + 1) / n) for h in range(n)]
    below = 2 ** math.floor(math.log2(n))
    return slopes(below) + slopes(2 * below)[::2][: n - below]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def normed(x, scale, groups=1):
    parts = x.reshape(*x.shape[:-1], groups, -1)
    return (parts / np.sqrt(np.mean(parts * parts, -1, keepdims=True) + 1e-6)).reshape(x.shape) * scale


def rotated(x, t, f):
    """The first part of every head, in halves; position interpolation (arXiv:2306.15595) where a factor is given."""
    dims = int(f["head_dim"] * f["partial_rotary_factor"])
    angle = t / f.get("rope_scaling", {}).get("factor", 1.0) * f["rope_theta"] ** (-np.arange(0, dims, 2) / dims)
    a, b = x[:, : dims // 2], x[:, dims // 2 : dims]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle), x[:, dims:]], -1)


def mix(h_TD, i, w, f):
    """The token mixer of layer i on one row."""
    N, K, H, L = (f[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim", "num_hidden_layers"))
    softmax = attends(i, f)
    K = K if softmax else N
    keys, values, out, state = [], [], [], np.zeros((N, H, H))
    decay = np.exp(-np.array(slopes(N)) * (1 - (i - 1) / (L - 1) + 1e-5))
    for t, x in enumerate(h_TD):
        parts = (w["attention.query_key_value.weight"] @ x).reshape(-1, H)
        parts = silu(parts) if f["linear_silu"] and not softmax else parts
        q, k, v = parts[:N], parts[N : N + K], parts[N + K :]
        if f["use_qk_norm"]:
            q, k = normed(q, w["attention.query_layernorm.weight"]), normed(k, w["attention.key_layernorm.weight"])
        q, k = rotated(q, t, f) * H**-0.5, rotated(k, t, f)
        if softmax:
            keys.append(np.repeat(k, N // K, 0))
            values.append(np.repeat(v, N // K, 0))
            scores = np.exp(np.einsum("nh,snh->ns", q, np.stack(keys)))
            y = np.einsum("ns,snh->nh", scores / scores.sum(-1, keepdims=True), np.stack(values)).reshape(-1)
        else:
            state = decay[:, None, None] * state + k[:, :, None] * v[:, None, :]
            y = normed(np.einsum("nh,nhp->np", q, state).reshape(-1), w["attention.g_norm.weight"], f["group_norm_size"])
            y = y * sigmoid(w["attention.g_proj.weight"] @ x)
        out.append(w["attention.dense.weight"] @ y)
    return np.stack(out)


def ffn(x, w, at):
    return w[at + "down_proj.weight"] @ (silu(w[at + "gate_proj.weight"] @ x) * (w[at + "up_proj.weight"] @ x))


def experts(x, w, f):
    """One token: the best groups by their two best choices, the best experts in them; the bias moves the choice, not the weight."""
    E, groups, logits = f["num_experts"], f["n_group"], w["mlp.gate.weight"] @ x
    scores = sigmoid(logits) if f["score_function"] == "sigmoid" else np.exp(logits) / np.exp(logits).sum()
    choice = scores + w.get("mlp.gate.expert_bias", 0.0)
    worth = [sum(sorted(choice[g * E // groups : (g + 1) * E // groups])[-2:]) for g in range(groups)]
    best = sorted(range(groups), key=lambda g: -worth[g])[: f["topk_group"]]
    order = sorted((e for e in range(E) if e * groups // E in best), key=lambda e: -choice[e])[: f["num_experts_per_tok"]]
    total = sum(scores[e] for e in order) if f["norm_topk_prob"] else 1.0
    y = sum(scores[e] / total * ffn(x, w, f"mlp.experts.{e}.") for e in order) * f["routed_scaling_factor"]
    return y + (ffn(x, w, "mlp.shared_experts.") if f["num_shared_experts"] else 0.0)


def bailing(fields, weights, rows):
    """({name: [dtype, *shape]}, logits of every row). weights(name, shape)."""
    f, held = fields, {n: weights(n, s).astype(np.float64) for n, s in shapes(fields).items()}

    def logits(row):
        x = held["model.word_embeddings.weight"][np.asarray(row)]
        for i in range(f["num_hidden_layers"]):
            at = f"model.layers.{i}."
            w = {n.removeprefix(at): a for n, a in held.items() if n.startswith(at)}
            x = x + mix(normed(x, w["input_layernorm.weight"]), i, w, f)
            h = normed(x, w["post_attention_layernorm.weight"])
            x = x + np.stack([experts(t, w, f) if i >= f["first_k_dense_replace"] else ffn(t, w, "mlp.") for t in h])
        return normed(x, held["model.norm.weight"]) @ held.get("lm_head.weight", held["model.word_embeddings.weight"]).T

    return {n: ["float32", *s] for n, s in shapes(f).items()}, [logits(row) for row in rows]


ORACLES = {"bailing_moe_linear": bailing}

"""MiniMax-Text-01 (arXiv:2501.08313) in numpy float64, token by token, from the paper and what the authors' code is known to do.

Their code comes with the weights and needs a GPU. Known of it: layer l of L decays by exp(-slope (1 - l / (L - 1) + 1e-5)) with ALiBi's
slopes; queries, keys and values of lightning layers pass through SiLU, lie head by head in one tensor and are not scaled; with `postnorm`
the residual is of the normed input.
"""
import numpy as np

from tests.interop.bailing_oracle import sigmoid, silu, slopes

LIGHTNING_EPS = 1e-6


def shapes(f):
    """{name: shape} of a checkpoint."""
    D, V, N, K = (f[k] for k in ("hidden_size", "vocab_size", "num_attention_heads", "num_key_value_heads"))
    H, F = f.get("head_dim") or D // N, f["intermediate_size"]
    found = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    found |= {} if f.get("tie_word_embeddings") else {"lm_head.weight": (V, D)}
    for i, softmax in enumerate(f["attn_type_list"]):
        at = f"model.layers.{i}."
        found |= {at + "input_layernorm.weight": (D,), at + "post_attention_layernorm.weight": (D,)}
        if softmax:
            found |= {f"{at}self_attn.{x}_proj.weight": (n * H, D) for x, n in (("q", N), ("k", K), ("v", K))}
            found |= {at + "self_attn.o_proj.weight": (D, N * H)}
        else:
            found |= {at + "self_attn.qkv_proj.weight": (3 * N * H, D), at + "self_attn.output_gate.weight": (N * H, D)}
            found |= {at + "self_attn.norm.weight": (N * H,), at + "self_attn.out_proj.weight": (D, N * H)}
        found |= {at + "block_sparse_moe.gate.weight": (f["num_local_experts"], D)}
        for e in range(f["num_local_experts"]):
            expert = f"{at}block_sparse_moe.experts.{e}."
            found |= {expert + "w1.weight": (F, D), expert + "w3.weight": (F, D), expert + "w2.weight": (D, F)}
    return found


def normed(x, scale, eps):
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps) * scale


def rotated(x, t, dims, theta):
    """The first dims of every head, in halves."""
    angle = t * theta ** (-np.arange(0, dims, 2) / dims)
    a, b = x[:, : dims // 2], x[:, dims // 2 : dims]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle), x[:, dims:]], -1)


def softmax_attention(h_TD, w, f):
    N, K = f["num_attention_heads"], f["num_key_value_heads"]
    H = f.get("head_dim") or f["hidden_size"] // N
    dims, theta, keys, values, out = f.get("rotary_dim", H), f["rope_theta"], [], [], []
    for t, x in enumerate(h_TD):
        q, k, v = ((w[f"self_attn.{y}_proj.weight"] @ x).reshape(-1, H) for y in "qkv")
        keys.append(np.repeat(rotated(k, t, dims, theta), N // K, 0))
        values.append(np.repeat(v, N // K, 0))
        scores = np.exp(np.einsum("nh,snh->ns", rotated(q, t, dims, theta) * H**-0.5, np.stack(keys)))
        y = np.einsum("ns,snh->nh", scores / scores.sum(-1, keepdims=True), np.stack(values))
        out.append(w["self_attn.o_proj.weight"] @ y.reshape(-1))
    return np.stack(out)


def lightning(h_TD, i, w, f):
    N, L = f["num_attention_heads"], f["num_hidden_layers"]
    H = f.get("head_dim") or f["hidden_size"] // N
    state, out = np.zeros((N, H, H)), []
    decay = np.exp(-np.array(slopes(N)) * (1 - i / max(L - 1, 1) + 1e-5))
    for x in h_TD:
        q, k, v = np.split(silu(w["self_attn.qkv_proj.weight"] @ x).reshape(N, 3 * H), 3, axis=1)
        state = decay[:, None, None] * state + k[:, :, None] * v[:, None, :]
        y = normed(np.einsum("nh,nhp->np", q, state).reshape(-1), w["self_attn.norm.weight"], LIGHTNING_EPS)
        out.append(w["self_attn.out_proj.weight"] @ (sigmoid(w["self_attn.output_gate.weight"] @ x) * y))
    return np.stack(out)


def experts(x, w, f):
    """One token: the softmax of all experts' logits, the best ones with their weights normalised."""
    logits = w["block_sparse_moe.gate.weight"] @ x
    scores = np.exp(logits) / np.exp(logits).sum()
    best = np.argsort(-scores)[: f["num_experts_per_tok"]]
    parts = {e: [w[f"block_sparse_moe.experts.{e}.w{k}.weight"] for k in (1, 2, 3)] for e in best}
    return sum(scores[e] / scores[best].sum() * (w2 @ (silu(w1 @ x) * (w3 @ x))) for e, (w1, w2, w3) in parts.items())


def minimax(fields, weights, rows):
    """({name: [dtype, *shape]}, logits of every row). weights(name, shape)."""
    f, held = fields, {n: weights(n, s).astype(np.float64) for n, s in shapes(fields).items()}
    eps, postnorm = f["rms_norm_eps"], f.get("postnorm", False)

    def add(x, branch, name, norm, w):
        h = normed(x, w[norm], eps)
        kept, added = (f.get(f"layernorm_{name}_{y}", 1.0) for y in ("alpha", "beta"))
        return kept * (h if postnorm else x) + added * branch(h)

    def logits(row):
        x = held["model.embed_tokens.weight"][np.asarray(row)]
        for i, softmax in enumerate(f["attn_type_list"]):
            at = f"model.layers.{i}."
            w = {n.removeprefix(at): a for n, a in held.items() if n.startswith(at)}
            mix = (lambda h, w=w: softmax_attention(h, w, f)) if softmax else (lambda h, w=w, i=i: lightning(h, i, w, f))
            x = add(x, mix, "full_attention" if softmax else "linear_attention", "input_layernorm.weight", w)
            x = add(x, lambda h, w=w: np.stack([experts(t, w, f) for t in h]), "mlp", "post_attention_layernorm.weight", w)
        return normed(x, held["model.norm.weight"], eps) @ held.get("lm_head.weight", held["model.embed_tokens.weight"]).T

    return {n: ["float32", *s] for n, s in shapes(f).items()}, [logits(row) for row in rows]


ORACLES = {"minimax_text_01": minimax}

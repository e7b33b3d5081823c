"""RetNets by other code than ours: torchscale's own decoder, and flash-linear-attention's forward, whose kernels need a GPU, in numpy."""
import math
import sys
import types

import numpy as np


def torchscale(fields, weights, rows):
    """({name: shape} of its state, logits of every row) by torchscale 0.3, whose optional imports are stubbed. weights(name, shape)."""
    import torch

    for name, members in (("fairscale.nn", ("checkpoint_wrapper", "wrap")), ("timm.models.layers", ("drop_path",))):
        parts = name.split(".")
        for i in range(len(parts)):
            sys.modules.setdefault(".".join(parts[: i + 1]), types.ModuleType(parts[i]))
        for member in members:
            setattr(sys.modules[name], member, lambda x, *_, **__: x)
    from torchscale.architecture.config import RetNetConfig
    from torchscale.architecture.retnet import RetNetDecoder

    arguments = {k: v for k, v in fields.items() if k != "model_type"}
    config = RetNetConfig(**arguments)
    table = torch.nn.Embedding(config.vocab_size, config.decoder_embed_dim)
    model = RetNetDecoder(config, embed_tokens=table).float().eval()
    state = {n: a for n, a in model.state_dict().items() if not (config.share_decoder_input_output_embed and n.startswith("output_proj"))}
    drawn = {n: a if "rel_pos" in n else torch.from_numpy(weights(n, tuple(a.shape))) for n, a in state.items()}
    model.load_state_dict(drawn, strict=False)
    with torch.no_grad():
        logits = [model(torch.tensor([row]))[0][0].numpy() for row in rows]
    return {n: ["float32", *a.shape] for n, a in state.items()}, logits


def fla(fields, weights, rows):
    """The same of flash-linear-attention's RetNetForCausalLM, from its layer file: RoPE over halves, queries scaled, gated head norm."""
    D, N, L, V = (fields[k] for k in ("hidden_size", "num_heads", "num_hidden_layers", "vocab_size"))
    F = fields["intermediate_size"] or 256 * math.ceil(int(D * fields.get("hidden_ratio", 2) * 2 / 3) / 256)
    K, P = round(D * fields.get("expand_k", 1.0)), round(D * fields.get("expand_v", 2.0))
    shapes = {"model.embeddings.weight": (V, D), "model.norm.weight": (D,)}
    shapes |= {} if fields.get("tie_word_embeddings") else {"lm_head.weight": (V, D)}
    for i in range(L):
        at = f"model.layers.{i}."
        shapes |= {at + "attn_norm.weight": (D,), at + "mlp_norm.weight": (D,), at + "attn.g_norm_swish_gate.weight": (P // N,)}
        shapes |= {at + f"attn.{x}_proj.weight": s for x, s in zip("qkvgo", ((K, D), (K, D), (P, D), (P, D), (D, P)))}
        shapes |= {at + f"mlp.{x}_proj.weight": s for x, s in zip(("gate", "up", "down"), ((F, D), (F, D), (D, F)))}
    w = {n: weights(n, s).astype(np.float64) for n, s in shapes.items()}
    eps, gammas = fields.get("norm_eps", 1e-6), 1 - 2.0 ** (-5 - np.arange(N))

    def norm(x, scale):
        return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps) * scale

    def silu(x):
        return x / (1 + np.exp(-x))

    def rotated(x, t):
        half = x.shape[-1] // 2
        angle = t * 10_000.0 ** (-np.arange(half) / half)
        a, b = x[:, :half], x[:, half:]
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)

    def retention(h, at):
        state, out = np.zeros((N, K // N, P // N)), []
        for t, x in enumerate(h):
            q, k, v, g = ((w[at + f"attn.{y}_proj.weight"] @ x).reshape(N, -1) for y in "qkvg")
            q, k = rotated(q, t) * (K // N) ** -0.5, rotated(k, t)
            state = gammas[:, None, None] * state + k[:, :, None] * v[:, None, :]
            y = norm(np.einsum("nk,nkp->np", q, state), w[at + "attn.g_norm_swish_gate.weight"]) * silu(g)
            out.append(w[at + "attn.o_proj.weight"] @ y.reshape(-1))
        return np.stack(out)

    def logits(row):
        x = w["model.embeddings.weight"][np.asarray(row)]
        for i in range(L):
            at = f"model.layers.{i}."
            x = x + retention(norm(x, w[at + "attn_norm.weight"]), at)
            h = norm(x, w[at + "mlp_norm.weight"])
            gate, up = (h @ w[at + f"mlp.{n}_proj.weight"].T for n in ("gate", "up"))
            x = x + (silu(gate) * up) @ w[at + "mlp.down_proj.weight"].T
        return norm(x, w["model.norm.weight"]) @ w.get("lm_head.weight", w["model.embeddings.weight"]).T

    return {n: ["float32", *s] for n, s in shapes.items()}, [logits(row) for row in rows]


ORACLES = {"torchscale_retnet": torchscale, "retnet": fla}

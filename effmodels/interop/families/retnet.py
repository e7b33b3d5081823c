"""RetNet (arXiv:2307.08621) as torchscale and as flash-linear-attention write it.

torchscale divides the retention by normalisers that its head norm undoes but for its eps: one of the decays alone (`decay_norm`), and, in
its parallel form only, the row's sum where that exceeds one, which has no chunkwise form and is left out (docs/interop.md gives the gap).
torchscale has no config.json of its own: its
arguments are expected there, with model_type "torchscale_retnet".
"""
from effmodels.channel.mlp import MLP, hidden_size
from effmodels.interop.errors import InteropError
from effmodels.interop.families import common
from effmodels.interop.table import Family, Rule
from effmodels.mixers.retention import Retention

OURS = "layers.{i}."


def _matrices(theirs, out, on=()):
    """Projections of queries, keys, values, gate and output."""
    return (
        *(Rule(f"{theirs}{x}_proj.weight", f"{OURS}mixer.w{x}", "(N H) D -> D N H", on) for x in "qkvg"),
        Rule(f"{theirs}{out}.weight", OURS + "mixer.wo", "D (N P) -> N P D", on),
    )


TORCHSCALE_RULES = (
    Rule("embed_tokens.weight", "embed"),
    Rule("layers.{i}.retention_layer_norm.weight", OURS + "norm_mixer.scale"),
    *_matrices("layers.{i}.retention.", "out_proj"),
    Rule("layers.{i}.final_layer_norm.weight", OURS + "norm_channel.scale"),
    Rule("layers.{i}.ffn.fc1.weight", OURS + "channel.w_in", "F D -> D F"),
    Rule("layers.{i}.ffn.gate.weight", OURS + "channel.w_up", "F D -> D F"),
    Rule("layers.{i}.ffn.fc2.weight", OURS + "channel.w_out", "D F -> F D"),
    Rule("layer_norm.weight", "final_norm.scale"),
    Rule("output_projection.weight", "head", "V D -> D V"),
)
FLA_RULES = (
    Rule("model.embeddings.weight", "embed"),
    Rule("model.layers.{i}.attn_norm.weight", OURS + "norm_mixer.scale"),
    *_matrices("model.layers.{i}.attn.", "o_proj"),
    Rule("model.layers.{i}.attn.g_norm_swish_gate.weight", OURS + "mixer.head_norm_scale"),
    Rule("model.layers.{i}.mlp_norm.weight", OURS + "norm_channel.scale"),
    *common.mlp("model.layers.{i}.mlp."),
    Rule("model.norm.weight", "final_norm.scale"),
    Rule("lm_head.weight", "head", "V D -> D V"),
)
ACTIVATIONS = {"gelu": "geglu_exact", "swish": "swiglu"}
MLP_MULTIPLE = 256  # flash-linear-attention rounds the width of its MLP up to a multiple of it


def read_torchscale(c):
    """ModelConfig's fields from torchscale's arguments."""
    for name, value in (
        ("decoder_normalize_before", True), ("layernorm_embedding", False), ("moe_freq", 0), ("multiway", False), ("deepnorm", False),
        ("no_output_layer", False),
    ):  # fmt: skip
        c.only(name, value)
    for name in ("subln", "moe_expert_count", "max_target_positions", "chunkwise_recurrent", "recurrent_chunk_size"):
        c.get(name, None)  # no part of the parallel form
    width, heads = c.get("decoder_embed_dim", 768), c.get("decoder_retention_heads", 3)
    eps, activation = float(c.get("layernorm_eps", 1e-6)), c.only("activation_fn", *ACTIVATIONS)
    return {
        "vocab_size": c.get("vocab_size"), "d_model": width, "num_layers": c.get("decoder_layers", 12), "norm_eps": eps,
        "tie_embeddings": bool(c.get("share_decoder_input_output_embed", False)), "pattern": ("retention",),
        "embed_scale": 1.0 if c.get("no_scale_embedding", True) else float(width) ** 0.5,
        "mixers": {
            "retention": {
                "num_heads": heads, "head_dim": width // heads, "value_dim": c.get("decoder_value_embed_dim", 1280) // heads,
                "head_norm_eps": eps, "decay_norm": True,
            }
        },
        "channels": {"mlp": {"hidden": c.get("decoder_ffn_embed_dim", 1280), "activation": ACTIVATIONS[activation]}},
    }  # fmt: skip


def write_torchscale(resolved):
    """torchscale's arguments."""
    m, a, f = resolved.config, common.part(resolved, "mixer", Retention), common.part(resolved, "channel", MLP)
    names = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    if f.activation not in names:
        raise InteropError(f"its activation is {f.activation}, not {' or '.join(names)}")
    return {
        "vocab_size": m.vocab_size, "decoder_embed_dim": m.d_model, "decoder_layers": m.num_layers, "decoder_retention_heads": a.num_heads,
        "decoder_value_embed_dim": a.num_heads * _value_dim(a, m), "decoder_ffn_embed_dim": hidden_size(f, resolved.env),
        "activation_fn": names[f.activation], "layernorm_eps": m.norm_eps, "no_scale_embedding": m.embed_scale == 1.0,
        "share_decoder_input_output_embed": m.tie_embeddings,
    }  # fmt: skip


def read_fla(c):
    """ModelConfig's fields."""
    c.only("hidden_act", "swish", "silu")
    for name, *allowed in (
        ("feature_map", None), ("use_short_conv", False), ("attn", None), ("attnres_block_size", None), ("elementwise_affine", True),
        ("num_kv_heads", None, c.get("num_heads", 8)),
    ):  # fmt: skip
        c.only(name, *allowed)
    for name in ("attn_mode", "fuse_norm", "fuse_swiglu", "fuse_cross_entropy", "fuse_linear_cross_entropy", "use_l2warp", "conv_size"):
        c.get(name, None)  # how it is computed
    width, heads, gate = c.get("hidden_size", 2048), c.get("num_heads", 8), bool(c.get("use_output_gate", True))
    if not gate:
        raise InteropError("config.json: use_output_gate=False is not supported for retnet; only True is.")
    wide = int(width * (c.get("hidden_ratio", 2) or 4) * 2 / 3)
    hidden = c.get("intermediate_size", None) or MLP_MULTIPLE * -(-wide // MLP_MULTIPLE)
    eps = float(c.get("norm_eps", 1e-6))
    return {
        "vocab_size": c.get("vocab_size", 32000), "d_model": width, "num_layers": c.get("num_hidden_layers", 24), "norm_eps": eps,
        "tie_embeddings": bool(c.get("tie_word_embeddings", False)), "pattern": ("retention",),
        "mixers": {
            "retention": {
                "num_heads": heads, "head_dim": round(width * c.get("expand_k", 1.0)) // heads, "rotary": "rope", "head_norm_eps": eps,
                "value_dim": round(width * c.get("expand_v", 2.0)) // heads, "head_norm_scale": True,
            }
        },
        "channels": {"mlp": {"hidden": hidden, "activation": "swiglu"}},
    }  # fmt: skip


def write_fla(resolved):
    """config.json's fields."""
    m, a, f = resolved.config, common.part(resolved, "mixer", Retention), common.part(resolved, "channel", MLP)
    return {
        "vocab_size": m.vocab_size, "hidden_size": m.d_model, "num_hidden_layers": m.num_layers, "num_heads": a.num_heads,
        "expand_k": a.num_heads * (a.head_dim or m.d_model // a.num_heads) / m.d_model,
        "expand_v": a.num_heads * _value_dim(a, m) / m.d_model, "intermediate_size": hidden_size(f, resolved.env), "hidden_act": "swish",
        "norm_eps": m.norm_eps, "tie_word_embeddings": m.tie_embeddings,
    }  # fmt: skip


def _value_dim(a, m):
    return a.value_dim or 2 * (a.head_dim or m.d_model // a.num_heads)


IGNORE = (r"retnet_rel_pos\.(angle|decay)",)
TORCHSCALE = Family("torchscale_retnet", "RetNetDecoder", TORCHSCALE_RULES, read_torchscale, write_torchscale, ignore=IGNORE)
FLA = Family("retnet", "RetNetForCausalLM", FLA_RULES, read_fla, write_fla, prefix="model.", ignore=(r".*rotary\.inv_freq",))

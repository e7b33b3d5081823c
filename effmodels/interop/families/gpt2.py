"""GPT-2: learned positions, layer norms, biases everywhere, tied embeddings; its matrices are stored [in, out]."""
import dataclasses

from effmodels.channel.mlp import MLP, hidden_size
from effmodels.interop.errors import InteropError
from effmodels.interop.families import common
from effmodels.interop.table import Family, Rule
from effmodels.mixers.attention import Attention

THEIRS, OURS = "transformer.h.{i}.", "layers.{i}."
QKV = tuple(OURS + "mixer." + x for x in ("wq", "wk", "wv")), tuple(OURS + "mixer." + x for x in ("bq", "bk", "bv"))
RULES = (
    Rule("transformer.wte.weight", "embed"),
    Rule("transformer.wpe.weight", "positions"),
    Rule(THEIRS + "ln_1.weight", OURS + "norm_mixer.scale"),
    Rule(THEIRS + "ln_1.bias", OURS + "norm_mixer.bias"),
    Rule(THEIRS + "attn.c_attn.weight", QKV[0], "D [N H] -> D N H"),
    Rule(THEIRS + "attn.c_attn.bias", QKV[1], "[N H] -> N H"),
    Rule(THEIRS + "attn.c_proj.weight", OURS + "mixer.wo", "(N H) D -> N H D"),
    Rule(THEIRS + "attn.c_proj.bias", OURS + "mixer.bo"),
    Rule(THEIRS + "ln_2.weight", OURS + "norm_channel.scale"),
    Rule(THEIRS + "ln_2.bias", OURS + "norm_channel.bias"),
    Rule(THEIRS + "mlp.c_fc.weight", OURS + "channel.w_in"),
    Rule(THEIRS + "mlp.c_fc.bias", OURS + "channel.b_in"),
    Rule(THEIRS + "mlp.c_proj.weight", OURS + "channel.w_out"),
    Rule(THEIRS + "mlp.c_proj.bias", OURS + "channel.b_out"),
    Rule("transformer.ln_f.weight", "final_norm.scale"),
    Rule("transformer.ln_f.bias", "final_norm.bias"),
    Rule("lm_head.weight", "head", "V D -> D V"),
)
# Causal masks that old files hold.
IGNORE = (r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias",)
# Names of a field, its alias and its default.
SIZES = (
    ("n_embd", "hidden_size", 768), ("n_layer", "num_hidden_layers", 12), ("n_head", "num_attention_heads", 12),
    ("n_positions", "max_position_embeddings", 1024),
)  # fmt: skip
ACTIVATIONS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_exact"}


def read(c):
    """ModelConfig's fields."""
    activation = c.only("activation_function", *ACTIVATIONS)
    c.only("reorder_and_upcast_attn", False, True)  # computed in another order, the same function
    c.get("n_ctx", None)
    width, layers, heads, positions = (c.get(name, c.get(alias, default)) for name, alias, default in SIZES)
    return {
        "vocab_size": c.get("vocab_size", 50257), "d_model": width, "num_layers": layers, "learned_positions": positions,
        "norm": "layernorm", "norm_eps": float(c.get("layer_norm_epsilon", 1e-5)),
        "tie_embeddings": bool(c.get("tie_word_embeddings", True)),
        **_read_attention(c, width, layers, {"num_heads": heads, "rotary_fraction": 0.0, "bias": True, "out_bias": True}),
        "channels": {"mlp": {"hidden": c.get("n_inner", None) or 4 * width, "activation": ACTIVATIONS[activation], "bias": True}},
    }  # fmt: skip


def _read_attention(c, width, layers, fields):
    """pattern and mixers: scores may be of plain products, and divided by the number of the layer, from 1."""
    scaled, by_layer = bool(c.get("scale_attn_weights", True)), bool(c.get("scale_attn_by_inverse_layer_idx", False))
    if not by_layer:
        return {"mixers": {"attention": fields | ({} if scaled else {"scale": 1.0})}}
    base, names = (width // fields["num_heads"]) ** -0.5 if scaled else 1.0, tuple(f"attention_{i}" for i in range(layers))
    scales = [None if scaled and i == 0 else base / (i + 1) for i in range(layers)]
    return {"pattern": names, "mixers": {name: {"kind": "attention", **fields, "scale": s} for name, s in zip(names, scales)}}


def _write_attention(resolved):
    """The inverse of `_read_attention`; InteropError for layers that differ in more than the division."""
    configs = [common.layer_config(kind.mixer, Attention) for kind in resolved.layers]
    first, plain = configs[0], (resolved.config.d_model // configs[0].num_heads) ** -0.5
    scales = [plain if c.scale is None else c.scale for c in configs]
    by_layer = len(set(scales)) > 1
    wanted = [scales[0] / (i + 1 if by_layer else 1) for i in range(len(configs))]
    if scales != wanted or scales[0] not in (1.0, plain) or len({dataclasses.replace(c, scale=None) for c in configs}) > 1:
        raise InteropError("its layers of attention differ in more than a scale divided by the number of the layer")
    return {"scale_attn_weights": scales[0] == plain, "scale_attn_by_inverse_layer_idx": by_layer, "n_head": first.num_heads}


def write(resolved):
    """config.json's fields."""
    m, f = resolved.config, common.part(resolved, "channel", MLP)
    attention = _write_attention(resolved)
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    if f.activation not in names:
        raise InteropError(f"its activation is {f.activation}, not {' or '.join(names)}")
    return {
        "vocab_size": m.vocab_size, "n_embd": m.d_model, "n_layer": m.num_layers, "n_positions": m.learned_positions, **attention,
        "n_inner": hidden_size(f, resolved.env), "layer_norm_epsilon": m.norm_eps, "activation_function": names[f.activation],
        "tie_word_embeddings": m.tie_embeddings,
    }  # fmt: skip


GPT2 = Family("gpt2", "GPT2LMHeadModel", RULES, read, write, prefix="transformer.", ignore=IGNORE)

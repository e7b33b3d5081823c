"""GPT-2: learned positions, layer norms, biases everywhere, tied embeddings; its matrices are stored [in, out]."""
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
ACTIVATIONS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_exact"}


def read(c):
    """ModelConfig's fields."""
    activation = c.only("activation_function", *ACTIVATIONS)
    c.only("scale_attn_weights", True)
    c.only("scale_attn_by_inverse_layer_idx", False)
    c.only("reorder_and_upcast_attn", False, True)  # computed in another order, the same function
    c.get("n_ctx", None)
    width = c.get("n_embd", 768)
    return {
        "vocab_size": c.get("vocab_size", 50257), "d_model": width, "num_layers": c.get("n_layer", 12),
        "learned_positions": c.get("n_positions", 1024), "norm": "layernorm", "norm_eps": float(c.get("layer_norm_epsilon", 1e-5)),
        "tie_embeddings": bool(c.get("tie_word_embeddings", True)),
        "mixers": {"attention": {"num_heads": c.get("n_head", 12), "rotary_fraction": 0.0, "bias": True, "out_bias": True}},
        "channels": {"mlp": {"hidden": c.get("n_inner", None) or 4 * width, "activation": ACTIVATIONS[activation], "bias": True}},
    }  # fmt: skip


def write(resolved):
    """config.json's fields."""
    m, a, f = resolved.config, common.part(resolved, "mixer", Attention), common.part(resolved, "channel", MLP)
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    if f.activation not in names:
        raise InteropError(f"its activation is {f.activation}, not {' or '.join(names)}")
    return {
        "vocab_size": m.vocab_size, "n_embd": m.d_model, "n_layer": m.num_layers, "n_head": a.num_heads, "n_positions": m.learned_positions,
        "n_inner": hidden_size(f, resolved.env), "layer_norm_epsilon": m.norm_eps, "activation_function": names[f.activation],
        "tie_word_embeddings": m.tie_embeddings,
    }  # fmt: skip


GPT2 = Family("gpt2", "GPT2LMHeadModel", RULES, read, write, prefix="transformer.", ignore=IGNORE)

"""GPT-NeoX (arXiv:2204.06745) and Pythia: queries, keys and values interleaved by head, partial rotary, serial or parallel residual."""
from effmodels.channel.mlp import MLP, hidden_size
from effmodels.interop.errors import InteropError
from effmodels.interop.families import common
from effmodels.interop.table import Family, Rule
from effmodels.mixers.attention import Attention

THEIRS, OURS = "gpt_neox.layers.{i}.", "layers.{i}."
QKV = tuple(OURS + "mixer." + x for x in ("wq", "wk", "wv")), tuple(OURS + "mixer." + x for x in ("bq", "bk", "bv"))
RULES = (
    Rule("gpt_neox.embed_in.weight", "embed"),
    Rule(THEIRS + "input_layernorm.weight", OURS + "norm_mixer.scale"),
    Rule(THEIRS + "input_layernorm.bias", OURS + "norm_mixer.bias"),
    Rule(THEIRS + "attention.query_key_value.weight", QKV[0], "(N [H]) D -> D N H"),
    Rule(THEIRS + "attention.query_key_value.bias", QKV[1], "(N [H]) -> N H"),
    Rule(THEIRS + "attention.dense.weight", OURS + "mixer.wo", "D (N H) -> N H D"),
    Rule(THEIRS + "attention.dense.bias", OURS + "mixer.bo"),
    Rule(THEIRS + "post_attention_layernorm.weight", OURS + "norm_channel.scale"),
    Rule(THEIRS + "post_attention_layernorm.bias", OURS + "norm_channel.bias"),
    Rule(THEIRS + "mlp.dense_h_to_4h.weight", OURS + "channel.w_in", "F D -> D F"),
    Rule(THEIRS + "mlp.dense_h_to_4h.bias", OURS + "channel.b_in"),
    Rule(THEIRS + "mlp.dense_4h_to_h.weight", OURS + "channel.w_out", "D F -> F D"),
    Rule(THEIRS + "mlp.dense_4h_to_h.bias", OURS + "channel.b_out"),
    Rule("gpt_neox.final_layer_norm.weight", "final_norm.scale"),
    Rule("gpt_neox.final_layer_norm.bias", "final_norm.bias"),
    Rule("embed_out.weight", "head", "V D -> D V"),
)
# Causal masks and rotary tables that old files hold.
IGNORE = (r"(gpt_neox\.)?layers\.\d+\.attention\.((masked_)?bias|rotary_emb\.inv_freq)",)
ACTIVATIONS = {"gelu": "gelu_exact", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_fast": "gelu"}


def read(c):
    """ModelConfig's fields."""
    activation = c.only("hidden_act", *ACTIVATIONS)
    bias = bool(c.get("attention_bias", True))
    base, fraction = c.get("rotary_emb_base", 10_000), c.get("rotary_pct", 0.25)
    if not c.given("rope_parameters"):  # other names that old files repeat them under
        c.only("rope_theta", base), c.only("partial_rotary_factor", fraction)
    rotation = common.rope(c, base, fraction)
    common.check_rotated(c.get("hidden_size") // c.get("num_attention_heads"), rotation)
    return {
        "vocab_size": c.get("vocab_size", 50432), "d_model": c.get("hidden_size"), "num_layers": c.get("num_hidden_layers"),
        "norm": "layernorm", "norm_eps": float(c.get("layer_norm_eps", 1e-5)), "tie_embeddings": bool(c.get("tie_word_embeddings", False)),
        "residual": "parallel" if c.get("use_parallel_residual", True) else "serial",
        "mixers": {
            "attention": {"num_heads": c.get("num_attention_heads"), "bias": bias, "out_bias": bias, **rotation}
        },
        "channels": {"mlp": {"hidden": c.get("intermediate_size"), "activation": ACTIVATIONS[activation], "bias": True}},
    }  # fmt: skip


def write(resolved):
    """config.json's fields."""
    m, a, f = resolved.config, common.part(resolved, "mixer", Attention), common.part(resolved, "channel", MLP)
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    if f.activation not in names:
        raise InteropError(f"its activation is {f.activation}, not {' or '.join(names)}")
    rope = common.write_rope(a)
    rope["rope_parameters"]["partial_rotary_factor"] = a.rotary_fraction
    return {
        "vocab_size": m.vocab_size, "hidden_size": m.d_model, "num_hidden_layers": m.num_layers, "num_attention_heads": a.num_heads,
        "intermediate_size": hidden_size(f, resolved.env), "layer_norm_eps": m.norm_eps, "hidden_act": names[f.activation],
        "use_parallel_residual": m.residual == "parallel", "attention_bias": a.bias, "tie_word_embeddings": m.tie_embeddings, **rope,
    }  # fmt: skip


GPT_NEOX = Family("gpt_neox", "GPTNeoXForCausalLM", RULES, read, write, prefix="gpt_neox.", ignore=IGNORE)

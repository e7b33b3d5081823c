"""Mamba-2 (arXiv:2405.21060): layers of a state space mixer alone, all of its projections in one tensor."""
from effmodels.channel.none import NoChannel
from effmodels.interop.errors import InteropError
from effmodels.interop.families import common
from effmodels.interop.table import Family, Rule
from effmodels.mixers.ssd import SSD

LAYER, OURS = "backbone.layers.{i}.", common.OURS + "mixer."
PARTS = (("z", "[N P]", "N P"), ("x", "[N P]", "N P"), ("b", "[G H]", "G H"), ("c", "[G H]", "G H"), ("dt", "[N]", "N"))
CONVOLVED = PARTS[1:4]
RULES = (
    Rule("backbone.embeddings.weight", "embed"),
    Rule(LAYER + "norm.weight", common.OURS + "norm_mixer.scale"),
    Rule(LAYER + "mixer.in_proj.weight", tuple(OURS + "w" + n for n, _, _ in PARTS), tuple(f"{a} D -> D {b}" for _, a, b in PARTS)),
    Rule(LAYER + "mixer.in_proj.bias", tuple(OURS + "b" + n for n, _, _ in PARTS), tuple(f"{a} -> {b}" for _, a, b in PARTS)),
    Rule(
        LAYER + "mixer.conv1d.weight", tuple(f"{OURS}conv_{n}.weight" for n, _, _ in CONVOLVED),
        tuple(f"{a} 1 W -> {b} W" for _, a, b in CONVOLVED),
    ),
    Rule(
        LAYER + "mixer.conv1d.bias", tuple(f"{OURS}conv_{n}.bias" for n, _, _ in CONVOLVED),
        tuple(f"{a} -> {b}" for _, a, b in CONVOLVED),
    ),
    Rule(LAYER + "mixer.dt_bias", OURS + "dt_bias"),
    Rule(LAYER + "mixer.A_log", OURS + "a_log"),
    Rule(LAYER + "mixer.D", OURS + "skip"),
    Rule(LAYER + "mixer.norm.weight", OURS + "norm_scale", "(N P) -> N P"),
    Rule(LAYER + "mixer.out_proj.weight", OURS + "wo", "D (N P) -> N P D"),
    Rule(LAYER + "mixer.out_proj.bias", OURS + "bo"),
    Rule("backbone.norm_f.weight", "final_norm.scale"),
    Rule("lm_head.weight", "head", "V D -> D V"),
)  # fmt: skip
# How weights were drawn, how the sum is cut into chunks, and in which dtype the residual stream is where weights are in bfloat16;
# norm_before_gate is what converters write and no reader of this layout asks for: the gate always comes first.
RUNNING = (
    "norm_before_gate", "chunk_size", "time_step_min", "time_step_max", "time_step_floor", "time_step_rank", "rescale_prenorm_residual",
    "residual_in_fp32",
)  # fmt: skip
NO_LIMIT = float("inf")


def read(c):
    """ModelConfig's fields."""
    c.only("hidden_act", "silu", "swish")
    c.only("rms_norm", True)
    for name in RUNNING:
        c.get(name, None)
    width, expand = c.get("hidden_size", 4096), c.get("expand", 2)
    heads, head_dim, groups = c.get("num_heads", 128), c.get("head_dim", 64), c.get("n_groups", 8)
    if int(expand * width) != heads * head_dim:
        raise InteropError(
            f"config.json: expand={expand} times hidden_size={width} is not num_heads={heads} times head_dim={head_dim}, as it must be."
        )
    low, high = (_number(x) for x in c.get("time_step_limit", None) or (0.0, NO_LIMIT))
    eps = float(c.get("layer_norm_epsilon", 1e-5))
    ssd = {
        "num_heads": heads, "head_dim": head_dim, "state_dim": c.get("state_size", 128), "groups": groups, "norm_groups": groups,
        "conv_width": c.get("conv_kernel", 4), "conv_bias": bool(c.get("use_conv_bias", True)), "bias": bool(c.get("use_bias", False)),
        "dt_min": low, "dt_max": None if high == NO_LIMIT else high, "norm": "gated",
    }  # fmt: skip
    return {
        "vocab_size": c.get("vocab_size", 32768), "d_model": width, "num_layers": c.get("num_hidden_layers", 64), "norm_eps": eps,
        "tie_embeddings": bool(c.get("tie_word_embeddings", False)), "pattern": ("ssd",), "channel": ("none",), "mixers": {"ssd": ssd},
    }  # fmt: skip


def _number(value):
    """A float of config.json; transformers 5 writes an infinite one as an object."""
    return float(value["__float__"] if isinstance(value, dict) else value)


def write(resolved):
    """config.json's fields."""
    m, a = resolved.config, common.part(resolved, "mixer", SSD)
    common.part(resolved, "channel", NoChannel)
    head_dim = a.head_dim or 2 * m.d_model // a.num_heads
    if a.num_heads * head_dim % m.d_model:
        raise InteropError(f"its inner width of {a.num_heads * head_dim} is no multiple of d_model={m.d_model}")
    limited = a.dt_min > 0 or a.dt_max is not None
    limits = {"time_step_limit": [a.dt_min, NO_LIMIT if a.dt_max is None else a.dt_max]} if limited else {}
    return {
        "vocab_size": m.vocab_size, "hidden_size": m.d_model, "num_hidden_layers": m.num_layers, "layer_norm_epsilon": m.norm_eps,
        "tie_word_embeddings": m.tie_embeddings, "num_heads": a.num_heads, "head_dim": head_dim, "state_size": a.state_dim,
        "expand": a.num_heads * head_dim // m.d_model, "n_groups": a.groups, "conv_kernel": a.conv_width, "use_conv_bias": a.conv_bias,
        "use_bias": a.bias, "hidden_act": "silu", **limits,
    }  # fmt: skip


MAMBA2 = Family("mamba2", "Mamba2ForCausalLM", RULES, read, write, prefix="backbone.")

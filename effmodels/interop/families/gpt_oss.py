"""gpt-oss (arXiv:2508.10925): sinks, biases everywhere, clamped SwiGLU, every second layer with a window; as bfloat16, not as MXFP4."""
from effmodels.channel.mlp import hidden_size
from effmodels.channel.moe import MoE
from effmodels.interop.families import common, llama
from effmodels.interop.table import Family, Rule

THEIRS, OURS = common.LAYER + "mlp.", common.OURS + "channel."
GATE_UP = OURS + "w_in", OURS + "w_up"
RULES = (
    *common.TOP, *common.NORMS, *common.attention(), common.router(THEIRS + "router.weight"),
    Rule(common.LAYER + "self_attn.sinks", common.OURS + "mixer.sinks"),
    Rule(THEIRS + "router.bias", OURS + "router_bias"),
    Rule(THEIRS + "experts.gate_up_proj", GATE_UP, "E D (F [1]) -> E D F"),
    Rule(THEIRS + "experts.gate_up_proj_bias", (OURS + "b_in", OURS + "b_up"), "E (F [1]) -> E F"),
    Rule(THEIRS + "experts.down_proj", OURS + "w_out"),
    Rule(THEIRS + "experts.down_proj_bias", OURS + "b_out"),
)  # fmt: skip
YARN = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False, "original_max_position_embeddings": 4096,
}  # fmt: skip


def read(c):
    """ModelConfig's fields."""
    for name in ("hidden_act", "experts_per_token", "initial_context_length"):
        c.get(name, None)  # not used, or said twice
    bias = bool(c.get("attention_bias", True))
    base = common.read_attention(c, 150_000.0, kv_heads=8, head_dim=64, rope_default=YARN, bias=bias, out_bias=bias, sinks=True)
    by_layer = lambda layers: ("full_attention" if i % 2 else "sliding_attention" for i in range(layers))  # noqa: E731
    types = common.layer_types(c, common.WINDOWED, by_layer)
    experts = c.get("num_experts", 128)  # another name that transformers takes
    moe = {
        "num_experts": c.get("num_local_experts", experts), "top_k": c.get("num_experts_per_tok", 4), "hidden": c.get("intermediate_size"),
        "router": "softmax", "normalize_weights": True, "router_bias": True, "bias": True, "activation": "swiglu_clamped",
        "swiglu_alpha": float(c.get("swiglu_alpha", 1.702)), "swiglu_limit": float(c.get("swiglu_limit", 7.0)),
    }  # fmt: skip
    layers = common.windowed(base, types, common.window(c.get("sliding_window", 128)))
    return common.read_top(c, norm_eps=1e-5, channel=("moe",), channels={"moe": moe}, **layers)


def write(resolved):
    """config.json's fields."""
    f = common.part(resolved, "channel", MoE)
    attention, types, size = common.write_windowed(resolved)
    return {
        **common.write_top(resolved.config), **common.write_attention(attention, resolved), "attention_bias": attention.bias,
        "layer_types": types, "sliding_window": size, "num_local_experts": f.num_experts, "num_experts_per_tok": f.top_k,
        "intermediate_size": hidden_size(f, resolved.env), "swiglu_alpha": f.swiglu_alpha, "swiglu_limit": f.swiglu_limit,
        "hidden_act": "silu",
    }  # fmt: skip


GPT_OSS = Family("gpt_oss", "GptOssForCausalLM", RULES, read, write, prefix="model.", ignore=llama.IGNORE)

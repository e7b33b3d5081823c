"""Qwen2-MoE (arXiv:2407.10671), Qwen3-MoE (arXiv:2505.09388) and OLMoE (arXiv:2409.02060): softmax routers over many small experts."""
from effmodels.channel.mlp import MLP, hidden_size
from effmodels.channel.moe import MoE
from effmodels.interop.errors import InteropError
from effmodels.interop.families import common, llama, qwen
from effmodels.interop.table import Family, Rule

SHARED = common.OURS + "channel.shared."
SHARED_EXPERT = (
    *common.mlp(common.LAYER + "mlp.shared_expert.", SHARED),
    Rule(common.LAYER + "mlp.shared_expert_gate.weight", common.OURS + "channel.shared_gate", "[1] D -> D"),
)
RULES = (
    *common.TOP, *common.NORMS, *common.attention(), *common.mlp(on=("mlp",)), common.router(), *common.experts(), *SHARED_EXPERT,
)  # fmt: skip


def read_qwen2_moe(c):
    """ModelConfig's fields."""
    shared = {"shared_experts": 1, "shared_hidden": c.get("shared_expert_intermediate_size", 5632), "shared_gate": True}
    moe = _experts(c, c.get("num_experts", 60), c.get("num_experts_per_tok", 4), c.get("moe_intermediate_size", 1408)) | shared
    base = common.read_attention(c, kv_heads=16, bias=bool(c.get("qkv_bias", True)))
    layers = common.windowed(base, *qwen.sliding(c, lambda i, first: i % 2 == 0 and i < first))
    return common.read_top(c, **layers, **common.read_sparse(c, moe, _dense(c)))


def read_qwen3_moe(c):
    """ModelConfig's fields."""
    experts = c.get("num_experts", None) or c.get("num_local_experts", 128)
    c.get("num_local_experts", None)
    moe = _experts(c, experts, c.get("num_experts_per_tok", 8), c.get("moe_intermediate_size", 768))
    bias = bool(c.get("attention_bias", False))
    size = c.get("sliding_window", 4096)
    size = size if c.get("use_sliding_window", False) else None
    c.get("max_window_layers", None)  # all layers slide or none, whatever it says
    common.one_type(c, sliding=size is not None)
    base = common.read_attention(c, kv_heads=4, bias=bias, out_bias=bias, qk_norm=True, window=common.window(size))
    return common.read_top(c, mixers={"attention": base}, **common.read_sparse(c, moe, _dense(c)))


def read_olmoe(c):
    """ModelConfig's fields."""
    c.only("clip_qkv", None)
    common.one_type(c, sliding=False)
    moe = _experts(c, c.get("num_experts", 64), c.get("num_experts_per_tok", 8), c.get("intermediate_size"))
    bias = bool(c.get("attention_bias", False))
    base = common.read_attention(c, bias=bias, out_bias=bias, qk_norm=True, qk_norm_whole=True)
    return common.read_top(c, channel=("moe",), mixers={"attention": base}, channels={"moe": moe}) | {
        "norm_eps": float(c.get("rms_norm_eps", 1e-5))
    }


def write_qwen2_moe(resolved):
    """config.json's fields."""
    fields, attention, moe = _write(resolved)
    shared = moe.shared_hidden or moe.shared_experts * fields["moe_intermediate_size"]
    return fields | {"qkv_bias": attention.bias, "num_experts": moe.num_experts, "shared_expert_intermediate_size": shared}


def write_qwen3_moe(resolved):
    """config.json's fields."""
    fields, attention, moe = _write(resolved)
    types = fields.pop("layer_types")
    if len(set(types)) > 1:
        raise InteropError("some of its layers have a window and some have none")
    return fields | {"attention_bias": attention.bias, "num_experts": moe.num_experts}


def write_olmoe(resolved):
    """config.json's fields."""
    fields, attention, moe = _write(resolved)
    width = fields.pop("moe_intermediate_size")
    for name in ("mlp_only_layers", "decoder_sparse_step", "use_sliding_window", "sliding_window", "layer_types"):
        fields.pop(name)
    return fields | {"attention_bias": attention.bias, "num_experts": moe.num_experts, "intermediate_size": width}


def _experts(c, experts, top_k, hidden):
    return {
        "num_experts": experts, "top_k": top_k, "hidden": hidden, "activation": common.gated(c), "router": "softmax",
        "normalize_weights": bool(c.get("norm_topk_prob", False)),
    }  # fmt: skip


def _dense(c):
    return {"hidden": c.get("intermediate_size"), "activation": common.gated(c)}


def _write(resolved):
    """(fields, Attention.Config, MoE.Config) that the three have in common."""
    moe, dense, plain = common.write_sparse(resolved, MoE, MLP)
    fields, attention = qwen.write_attention(resolved)
    width = hidden_size(moe, resolved.env)
    return {
        **common.write_top(resolved.config), **fields, "num_experts_per_tok": moe.top_k, "norm_topk_prob": moe.normalize_weights,
        "moe_intermediate_size": width, "intermediate_size": hidden_size(dense, resolved.env) if dense else width,
        "mlp_only_layers": plain, "decoder_sparse_step": 1, **common.write_gated(moe),
    }, attention, moe  # fmt: skip


COMMON = {"prefix": "model.", "ignore": llama.IGNORE}
QWEN2_MOE = Family("qwen2_moe", "Qwen2MoeForCausalLM", RULES, read_qwen2_moe, write_qwen2_moe, **COMMON)
QWEN3_MOE = Family("qwen3_moe", "Qwen3MoeForCausalLM", RULES, read_qwen3_moe, write_qwen3_moe, **COMMON)
OLMOE = Family("olmoe", "OlmoeForCausalLM", RULES, read_olmoe, write_olmoe, **COMMON)

"""Mixtral (arXiv:2401.04088): Mistral with eight experts of which two are used, their weights normalised."""
from effmodels.channel.mlp import hidden_size
from effmodels.channel.moe import MoE
from effmodels.interop.families import common, llama
from effmodels.interop.table import Family
from effmodels.mixers.attention import Attention

SPARSE = common.LAYER + "block_sparse_moe."
EXPERTS = (common.router(SPARSE + "gate.weight"), *common.experts(SPARSE + "experts.{e}.", names=("w1", "w3", "w2")))
RULES = (*common.TOP, *common.NORMS, *common.attention(), *EXPERTS)


def read(c):
    """ModelConfig's fields."""
    size = c.get("sliding_window", None)
    common.one_type(c, sliding=size is not None)
    return common.read_top(
        c,
        norm_eps=1e-5,
        channel=("moe",),
        mixers={"attention": common.read_attention(c, 1e6, kv_heads=8, window=common.window(size))},
        channels={"moe": read_experts(c, common.gated(c))},
    )


def read_experts(c, activation):
    """The fields of a MoE."""
    experts = c.get("num_experts", 8)  # another name that transformers takes
    return {
        "num_experts": c.get("num_local_experts", experts), "top_k": c.get("num_experts_per_tok", 2), "hidden": c.get("intermediate_size"),
        "activation": activation, "router": "softmax", "normalize_weights": True,
    }  # fmt: skip


def write(resolved):
    """config.json's fields."""
    a, f = common.part(resolved, "mixer", Attention), common.part(resolved, "channel", MoE)
    return {
        **common.write_top(resolved.config), **common.write_attention(a, resolved), "sliding_window": common.write_window(a.window),
        "num_local_experts": f.num_experts, "num_experts_per_tok": f.top_k, "intermediate_size": hidden_size(f, resolved.env),
        **common.write_gated(f),
    }  # fmt: skip


MIXTRAL = Family("mixtral", "MixtralForCausalLM", RULES, read, write, prefix="model.", ignore=llama.IGNORE)

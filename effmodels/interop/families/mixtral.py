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
    return common.read_top(
        c,
        channel=("moe",),
        mixers={"attention": common.read_attention(c, 1e6, window=common.window(c.get("sliding_window", None)))},
        channels={"moe": read_experts(c)},
    )


def read_experts(c):
    """The fields of a MoE."""
    c.only("hidden_act", "silu")
    return {
        "num_experts": c.get("num_local_experts", 8), "top_k": c.get("num_experts_per_tok", 2), "hidden": c.get("intermediate_size"),
        "activation": "swiglu", "router": "softmax", "normalize_weights": True,
    }  # fmt: skip


def write(resolved):
    """config.json's fields."""
    a, f = common.part(resolved, "mixer", Attention), common.part(resolved, "channel", MoE)
    return {
        **common.write_top(resolved.config), **common.write_attention(a, resolved), "sliding_window": common.write_window(a.window),
        "num_local_experts": f.num_experts, "num_experts_per_tok": f.top_k, "intermediate_size": hidden_size(f, resolved.env),
        "hidden_act": "silu",
    }  # fmt: skip


MIXTRAL = Family("mixtral", "MixtralForCausalLM", RULES, read, write, prefix="model.", ignore=llama.IGNORE)

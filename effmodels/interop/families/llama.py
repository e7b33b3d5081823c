"""Llama (arXiv:2302.13971) and what shares its layout: RMSNorm, rotary grouped-query attention, SwiGLU."""
from effmodels.channel.mlp import MLP, hidden_size
from effmodels.interop.families import common
from effmodels.interop.table import Family
from effmodels.mixers.attention import Attention

RULES = (*common.TOP, *common.NORMS, *common.attention(), *common.mlp())
IGNORE = (r".*rotary_emb\.inv_freq",)


def read(c):
    """ModelConfig's fields."""
    common.one_type(c, sliding=False)
    bias = bool(c.get("attention_bias", False))
    return common.read_top(
        c,
        mixers={"attention": common.read_attention(c, bias=bias, out_bias=bias)},
        channels={"mlp": {"hidden": c.get("intermediate_size"), "activation": common.gated(c), "bias": bool(c.get("mlp_bias", False))}},
    )


def write(resolved):
    """config.json's fields."""
    a, f = common.part(resolved, "mixer", Attention), common.part(resolved, "channel", MLP)
    return {
        **common.write_top(resolved.config), **common.write_attention(a, resolved), "attention_bias": a.bias, "mlp_bias": f.bias,
        "intermediate_size": hidden_size(f, resolved.env), **common.write_gated(f),
    }  # fmt: skip


LLAMA = Family("llama", "LlamaForCausalLM", RULES, read, write, prefix="model.", ignore=IGNORE)

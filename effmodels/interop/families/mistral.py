"""Mistral (arXiv:2310.06825): Llama with a sliding window, whose W counts the query itself."""
from effmodels.channel.mlp import MLP, hidden_size
from effmodels.interop.families import common, llama
from effmodels.interop.table import Family
from effmodels.mixers.attention import Attention


def read(c):
    """ModelConfig's fields."""
    size = c.get("sliding_window", 4096)
    common.one_type(c, sliding=size is not None)
    return common.read_top(
        c,
        mixers={"attention": common.read_attention(c, kv_heads=8, window=common.window(size))},
        channels={"mlp": {"hidden": c.get("intermediate_size"), "activation": common.gated(c)}},
    )


def write(resolved):
    """config.json's fields."""
    a, f = common.part(resolved, "mixer", Attention), common.part(resolved, "channel", MLP)
    return {
        **common.write_top(resolved.config), **common.write_attention(a, resolved), "sliding_window": common.write_window(a.window),
        "intermediate_size": hidden_size(f, resolved.env), **common.write_gated(f),
    }  # fmt: skip


MISTRAL = Family("mistral", "MistralForCausalLM", llama.RULES, read, write, prefix="model.", ignore=llama.IGNORE)

"""Qwen2 (arXiv:2407.10671) and Qwen3 (arXiv:2505.09388), dense: Llama with biases of q, k and v, or with norms of q and k."""
from effmodels.channel.mlp import MLP, hidden_size
from effmodels.interop.families import common, llama
from effmodels.interop.table import Family


def read_qwen2(c):
    """ModelConfig's fields."""
    return _read(c, common.read_attention(c, kv_heads=32, bias=True))


def read_qwen3(c):
    """ModelConfig's fields."""
    bias = bool(c.get("attention_bias", False))
    return _read(c, common.read_attention(c, kv_heads=32, head_dim=128, bias=bias, out_bias=bias, qk_norm=True))


def write_qwen2(resolved):
    """config.json's fields."""
    return _write(resolved)[0]


def write_qwen3(resolved):
    """config.json's fields."""
    fields, attention = _write(resolved)
    return fields | {"attention_bias": attention.bias}


def _read(c, base):
    return common.read_top(
        c,
        **common.windowed(base, *sliding(c, lambda i, first: i >= first)),
        channels={"mlp": {"hidden": c.get("intermediate_size"), "activation": common.gated(c)}},
    )


def sliding(c, default):
    """(layer_types, keys before the query of a window); default(layer, max_window_layers): which layers slide where no list says so."""
    size, first = c.get("sliding_window", 4096), c.get("max_window_layers", 28)
    size = size if c.get("use_sliding_window", False) else None

    def by_layer(layers):
        return ("sliding_attention" if size is not None and default(i, first) else "full_attention" for i in range(layers))

    return common.layer_types(c, common.WINDOWED, by_layer), common.window(size)


def _write(resolved):
    f = common.part(resolved, "channel", MLP)
    fields, attention = write_attention(resolved)
    fields |= {"intermediate_size": hidden_size(f, resolved.env), **common.write_gated(f)}
    return {**common.write_top(resolved.config), **fields}, attention


def write_attention(resolved):
    """(fields of config.json, Attention.Config) of layers with one window or none."""
    attention, types, size = common.write_windowed(resolved)
    return {
        **common.write_attention(attention, resolved), "use_sliding_window": size is not None, "sliding_window": size, "layer_types": types,
    }, attention  # fmt: skip


QWEN2 = Family("qwen2", "Qwen2ForCausalLM", llama.RULES, read_qwen2, write_qwen2, prefix="model.", ignore=llama.IGNORE)
QWEN3 = Family("qwen3", "Qwen3ForCausalLM", llama.RULES, read_qwen3, write_qwen3, prefix="model.", ignore=llama.IGNORE)

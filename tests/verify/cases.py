"""A run small enough to verify in seconds: both mixers, dense and routed channels, on any mesh of eight devices."""
from configs import common


def tiny(mesh=None, parallel=None, seq_len=32, **model_fields):
    """A run's config as a dict; model_fields override the model's, mesh and parallel those sections."""
    c = common.base().to_dict()
    c["batch_size"], c["seq_len"], c["steps"] = 8, seq_len, 10
    c["mesh"], c["parallel"] = {"data": -1, **(mesh or {})}, {**c["parallel"], **(parallel or {})}
    c["optim"]["warmup_steps"] = 0
    c["model"] |= {
        "vocab_size": 48, "d_model": 16, "num_layers": 2, "pattern": ("retention", "attention"), "channel": ("mlp", "moe"),
        "mixers": {"retention": {"num_heads": 2, "head_dim": 8, "value_dim": 8}, "attention": {"num_heads": 2}},
        "channels": {"mlp": {"hidden": 24}, "moe": {"num_experts": 4, "top_k": 2, "hidden": 16}}, **model_fields,
    }  # fmt: skip
    return c


ATTENTION_ONLY = {
    "pattern": ("attention",), "channel": ("mlp",), "mixers": {"attention": {"num_heads": 2}}, "channels": {"mlp": {"hidden": 24}},
}  # fmt: skip
RETENTION_ONLY = {
    "pattern": ("retention",), "channel": ("mlp",), "mixers": {"retention": {"num_heads": 2, "head_dim": 8, "value_dim": 8}},
    "channels": {"mlp": {"hidden": 24}},
}  # fmt: skip
EXPERTS_ONLY = {
    "pattern": ("attention",), "channel": ("moe",), "mixers": {"attention": {"num_heads": 4}},
    "channels": {"moe": {"num_experts": 4, "top_k": 2, "hidden": 16, "balance_coef": 0.1}},
}  # fmt: skip

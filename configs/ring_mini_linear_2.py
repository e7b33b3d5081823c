"""Ring-mini-linear-2.0 (arXiv:2510.19338): four lightning layers to one of attention, 256 experts of which 8, one shared.

16.4 B parameters; 0.957 B per token besides the embeddings, the count of the paper.
"""
from configs import common


def get_config(arg=None):
    c = common.ring_linear(layers=20, d_model=2048, heads=16, group=5, inner=5120, expert=512)
    c.expect.params, c.expect.active_params = 16_423_443_456, 1_600_773_120
    if arg == "small":
        common.small(c)
        c.model.mixers.lightning.update({"num_heads": 4, "norm_groups": 2, "head_dim": None})
        c.model.mixers.attention.update({"num_heads": 4, "num_kv_heads": 2, "head_dim": None})
        c.model.channels.mlp.hidden = 256
        c.model.channels.moe.update({"num_experts": 16, "top_k": 4, "hidden": 32, "groups": 4, "top_groups": 2})
        c.model.num_layers = 5
    elif arg:
        raise ValueError(f"configs/ring_mini_linear_2.py: unknown argument {arg!r}; expected nothing or 'small'.")
    return c

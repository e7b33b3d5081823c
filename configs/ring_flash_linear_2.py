"""Ring-flash-linear-2.0 (arXiv:2510.19338): seven lightning layers to one of attention, 256 experts of which 8, one shared.

104.2 B parameters; 6.16 B per token besides the embeddings, the count of the paper.
"""
from configs import common


def get_config(arg=None):
    c = common.ring_linear(layers=32, d_model=4096, heads=32, group=8, inner=9216, expert=1024)
    c.expect.params, c.expect.active_params = 104_181_657_600, 7_444_230_144
    c.mesh.data, c.mesh.fsdp = 1, -1
    if arg == "small":
        common.small(c)
        c.model.mixers.lightning.update({"num_heads": 4, "norm_groups": 2, "head_dim": None})
        c.model.mixers.attention.update({"num_heads": 4, "num_kv_heads": 2, "head_dim": None})
        c.model.channels.mlp.hidden = 256
        c.model.channels.moe.update({"num_experts": 16, "top_k": 4, "hidden": 32, "groups": 4, "top_groups": 2})
        c.model.num_layers = 8
    elif arg:
        raise ValueError(f"configs/ring_flash_linear_2.py: unknown argument {arg!r}; expected nothing or 'small'.")
    return c

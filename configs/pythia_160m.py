"""Pythia of 162,322,944 parameters (arXiv:2304.01373, table 1)."""
from configs import common


def get_config(arg=None):
    c = common.pythia(layers=12, d_model=768, heads=12, lr=6e-4)
    c.expect.params = c.expect.active_params = 162_322_944
    if arg == "small":
        common.small(c)
        c.model.mixers.attention.num_heads, c.model.channels.mlp.hidden = 4, 512
    elif arg:
        raise ValueError(f"configs/pythia_160m.py: unknown argument {arg!r}; expected nothing or 'small'.")
    return c

"""Pythia of 405,334,016 parameters (arXiv:2304.01373, table 1)."""
from configs import common


def get_config(arg=None):
    c = common.pythia(layers=24, d_model=1024, heads=16, lr=3e-4)
    c.expect.params = c.expect.active_params = 405_334_016
    if arg == "small":
        common.small(c)
        c.model.mixers.attention.num_heads, c.model.channels.mlp.hidden = 4, 512
    elif arg:
        raise ValueError(f"configs/pythia_410m.py: unknown argument {arg!r}; expected nothing or 'small'.")
    return c

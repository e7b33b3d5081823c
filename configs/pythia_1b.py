"""Pythia of 1,011,781,632 parameters (arXiv:2304.01373, table 1)."""
from configs import common


def get_config(arg=None):
    c = common.pythia(layers=16, d_model=2048, heads=8, lr=3e-4)
    c.expect.params = c.expect.active_params = 1_011_781_632
    if arg == "small":
        common.small(c)
        c.model.mixers.attention.num_heads, c.model.channels.mlp.hidden = 4, 512
    elif arg:
        raise ValueError(f"configs/pythia_1b.py: unknown argument {arg!r}; expected nothing or 'small'.")
    return c

"""Pythia of 1,414,647,808 parameters (arXiv:2304.01373, table 1)."""
from configs import common


def get_config(arg=None):
    c = common.pythia(layers=24, d_model=2048, heads=16, lr=2e-4)
    c.expect.params = c.expect.active_params = 1_414_647_808
    if arg == "small":
        common.small(c)
        c.model.mixers.attention.num_heads, c.model.channels.mlp.hidden = 4, 512
    elif arg:
        raise ValueError(f"configs/pythia_1p4b.py: unknown argument {arg!r}; expected nothing or 'small'.")
    return c

"""Pythia of 70,426,624 parameters (arXiv:2304.01373, table 1)."""
from configs import common


def get_config(arg=None):
    c = common.pythia(layers=6, d_model=512, heads=8, lr=1e-3)
    c.expect.params = c.expect.active_params = 70_426_624
    if arg == "small":
        common.small(c)
        c.model.mixers.attention.num_heads, c.model.channels.mlp.hidden = 4, 512
    elif arg:
        raise ValueError(f"configs/pythia_70m.py: unknown argument {arg!r}; expected nothing or 'small'.")
    return c

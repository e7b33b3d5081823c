"""Pythia of 6,857,302,016 parameters (arXiv:2304.01373, table 1)."""
from configs import common


def get_config(arg=None):
    c = common.pythia(layers=32, d_model=4096, heads=32, lr=1.2e-4, vocab_size=50_432)
    c.expect.params = c.expect.active_params = 6_857_302_016
    c.mesh.data, c.mesh.fsdp = 1, -1
    if arg == "small":
        common.small(c)
        c.model.mixers.attention.num_heads, c.model.channels.mlp.hidden = 4, 512
    elif arg:
        raise ValueError(f"configs/pythia_6p9b.py: unknown argument {arg!r}; expected nothing or 'small'.")
    return c

"""Pythia of 2,775,208,960 parameters (arXiv:2304.01373, table 1)."""
from configs import common


def get_config(arg=None):
    c = common.pythia(layers=32, d_model=2560, heads=32, lr=1.6e-4)
    c.expect.params = c.expect.active_params = 2_775_208_960
    c.mesh.data, c.mesh.fsdp = 1, -1
    if arg == "small":
        common.small(c)
        c.model.mixers.attention.num_heads, c.model.channels.mlp.hidden = 4, 512
    elif arg:
        raise ValueError(f"configs/pythia_2p8b.py: unknown argument {arg!r}; expected nothing or 'small'.")
    return c

"""Pythia of 11,846,072,320 parameters (arXiv:2304.01373, table 1)."""
from configs import common


def get_config(arg=None):
    c = common.pythia(layers=36, d_model=5120, heads=40, lr=1.2e-4, vocab_size=50_688)
    c.expect.params = c.expect.active_params = 11_846_072_320
    c.mesh.data, c.mesh.fsdp = 1, -1
    if arg == "small":
        common.small(c)
        c.model.mixers.attention.num_heads, c.model.channels.mlp.hidden = 4, 512
    elif arg:
        raise ValueError(f"configs/pythia_12b.py: unknown argument {arg!r}; expected nothing or 'small'.")
    return c

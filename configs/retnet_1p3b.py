"""RetNet of 1.3B parameters (arXiv:2307.08621, table 2), heads of 256 x 512."""
from configs import common


def get_config(arg=None):
    c = common.retnet(layers=24, d_model=2048, heads=8, lr=6e-4)
    c.expect.params = c.expect.active_params = 1_339_232_256
    if arg == "small":
        common.small(c)
        c.model.mixers.retention.num_heads, c.model.channels.mlp.hidden = 4, 256
    elif arg:
        raise ValueError(f"configs/retnet_1p3b.py: unknown argument {arg!r}; expected nothing or 'small'.")
    return c

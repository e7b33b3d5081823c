"""RetNet of 2.7B parameters (arXiv:2307.08621, table 2), heads of 256 x 512."""
from configs import common


def get_config(arg=None):
    c = common.retnet(layers=32, d_model=2560, heads=10, lr=3e-4)
    c.expect.params = c.expect.active_params = 2_680_755_200
    if arg == "small":
        common.small(c)
        c.model.mixers.retention.num_heads, c.model.channels.mlp.hidden = 4, 256
    elif arg:
        raise ValueError(f"configs/retnet_2p7b.py: unknown argument {arg!r}; expected nothing or 'small'.")
    return c

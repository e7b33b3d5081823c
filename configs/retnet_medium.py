"""torchscale's RetNet preset medium: 16 layers of width 1,024, values and feed-forward layers 1,728 wide."""
from configs import common


def get_config(arg=None):
    c = common.torchscale_retnet(layers=16, d_model=1024, inner=1728, heads=4, lr=6e-4)
    c.expect.params = c.expect.active_params = 268_993_536
    if arg == "small":
        common.small(c)
        c.model.mixers.retention.update({"num_heads": 4, "value_dim": 54, "chunk": 64})
        c.model.channels.mlp.hidden = 216
    elif arg:
        raise ValueError(f"configs/retnet_medium.py: unknown argument {arg!r}; expected nothing or 'small'.")
    return c

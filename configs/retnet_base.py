"""torchscale's RetNet preset base: 6 layers of width 512, values and feed-forward layers 864 wide."""
from configs import common


def get_config(arg=None):
    c = common.torchscale_retnet(layers=6, d_model=512, inner=864, heads=2, lr=6e-4)
    c.expect.params = c.expect.active_params = 51_845_632
    if arg == "small":
        common.small(c)
        c.model.mixers.retention.update({"num_heads": 4, "value_dim": 54, "chunk": 64})
        c.model.channels.mlp.hidden = 216
    elif arg:
        raise ValueError(f"configs/retnet_base.py: unknown argument {arg!r}; expected nothing or 'small'.")
    return c

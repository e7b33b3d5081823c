"""torchscale's RetNet preset xl: 24 layers of width 2,048, values and feed-forward layers 3,456 wide."""
from configs import common


def get_config(arg=None):
    c = common.torchscale_retnet(layers=24, d_model=2048, inner=3456, heads=8, lr=6e-4)
    c.expect.params = c.expect.active_params = 1_351_714_816
    if arg == "small":
        common.small(c)
        c.model.mixers.retention.update({"num_heads": 4, "value_dim": 54, "chunk": 64})
        c.model.channels.mlp.hidden = 216
    elif arg:
        raise ValueError(f"configs/retnet_xl.py: unknown argument {arg!r}; expected nothing or 'small'.")
    return c

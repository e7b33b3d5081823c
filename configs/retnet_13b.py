"""torchscale's RetNet preset 13b: 40 layers of width 5,120, values and feed-forward layers 8,560 wide."""
from configs import common


def get_config(arg=None):
    c = common.torchscale_retnet(layers=40, d_model=5120, inner=8560, heads=20, lr=3e-4)
    c.expect.params = c.expect.active_params = 12_943_774_720
    c.mesh.data, c.mesh.fsdp = 1, -1
    if arg == "small":
        common.small(c)
        c.model.mixers.retention.update({"num_heads": 4, "value_dim": 54, "chunk": 64})
        c.model.channels.mlp.hidden = 216
    elif arg:
        raise ValueError(f"configs/retnet_13b.py: unknown argument {arg!r}; expected nothing or 'small'.")
    return c

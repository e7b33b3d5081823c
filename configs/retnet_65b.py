"""torchscale's RetNet preset 65b: 64 layers of width 8,192, values and feed-forward layers 13,824 wide: 52.6 B parameters."""
from configs import common


def get_config(arg=None):
    c = common.torchscale_retnet(layers=64, d_model=8192, inner=13824, heads=32, lr=1.5e-4)
    c.expect.params = c.expect.active_params = 52_601_823_232
    c.mesh.data, c.mesh.fsdp = 1, -1
    if arg == "small":
        common.small(c)
        c.model.mixers.retention.update({"num_heads": 4, "value_dim": 54, "chunk": 64})
        c.model.channels.mlp.hidden = 216
    elif arg:
        raise ValueError(f"configs/retnet_65b.py: unknown argument {arg!r}; expected nothing or 'small'.")
    return c

"""torchscale's RetNet preset 3b: 32 layers of width 2,560, values and feed-forward layers 4,280 wide."""
from configs import common


def get_config(arg=None):
    c = common.torchscale_retnet(layers=32, d_model=2560, inner=4280, heads=10, lr=3e-4)
    c.expect.params = c.expect.active_params = 2_687_142_400
    c.mesh.data, c.mesh.fsdp = 1, -1
    if arg == "small":
        common.small(c)
        c.model.mixers.retention.update({"num_heads": 4, "value_dim": 54, "chunk": 64})
        c.model.channels.mlp.hidden = 216
    elif arg:
        raise ValueError(f"configs/retnet_3b.py: unknown argument {arg!r}; expected nothing or 'small'.")
    return c

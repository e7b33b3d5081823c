"""The channel mixers by name. A new one is a file beside this one and a line here."""
from effmodels.registry import load

CHANNELS = {
    "gated_mlp": "effmodels.channel.gated_mlp:GatedMLP",
    "mlp": "effmodels.channel.mlp:MLP",
    "moe": "effmodels.channel.moe:MoE",
    "none": "effmodels.channel.none:NoChannel",
}


def get_channel(kind):
    """The ChannelMixer class of a registry name; ConfigError with the nearest name if unknown."""
    return load(CHANNELS, kind, "channel mixer")

"""The token mixers by name. A new one is a file beside this one and a line here."""
from effmodels.registry import load

MIXERS = {
    "attention": "effmodels.mixers.attention:Attention",
    "retention": "effmodels.mixers.retention:Retention",
}


def get_mixer(kind):
    """The TokenMixer class of a registry name; ConfigError with the nearest name if unknown."""
    return load(MIXERS, kind, "token mixer")

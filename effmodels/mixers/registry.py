"""The token mixers by name. A new one is a file beside this one and a line here."""
from effmodels.registry import load

MIXERS = {
    "attention": "effmodels.mixers.attention:Attention",
    "block_sparse": "effmodels.mixers.block_sparse:BlockSparse",
    "lightning": "effmodels.mixers.lightning:Lightning",
    "local_global": "effmodels.mixers.local_global:LocalGlobal",
    "cross_attention": "effmodels.mixers.cross_attention:CrossAttention",
    "gated_delta": "effmodels.mixers.gated_delta:GatedDelta",
    "latent": "effmodels.mixers.latent:Latent",
    "retention": "effmodels.mixers.retention:Retention",
    "topk_sparse": "effmodels.mixers.topk_sparse:TopkSparse",
    "ssd": "effmodels.mixers.ssd:SSD",
    "short_conv": "effmodels.mixers.short_conv:ShortConv",
}


def get_mixer(kind):
    """The TokenMixer class of a registry name; ConfigError with the nearest name if unknown."""
    return load(MIXERS, kind, "token mixer")

"""Encoders, resamplers and fusions by name. A new one is a file beside this one and a line here."""
from effmodels.registry import load

ENCODERS = {
    "vit": "effmodels.multimodal.vit:ViT",
}
RESAMPLERS = {
    "perceiver": "effmodels.multimodal.perceiver:Perceiver",
}
FUSIONS = {
    "concat": "effmodels.multimodal.concat:Concat",
    "cross_attention": "effmodels.multimodal.cross:Cross",
    "gate": "effmodels.multimodal.gate:Gate",
    "soft_tokens": "effmodels.multimodal.soft_tokens:SoftTokens",
}


def get_encoder(kind):
    """The Encoder class of a registry name; ConfigError with the nearest name if unknown."""
    return load(ENCODERS, kind, "encoder")


def get_resampler(kind):
    """The Resampler class of a registry name; ConfigError with the nearest name if unknown."""
    return load(RESAMPLERS, kind, "resampler")


def get_fusion(kind):
    """The Fusion class of a registry name; ConfigError with the nearest name if unknown."""
    return load(FUSIONS, kind, "fusion")

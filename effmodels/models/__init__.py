"""Models: a pattern of mixers made into a decoder, its loss, its decoding state and its cost."""
from effmodels.config import ModelConfig
from effmodels.models.cost import ModelCost, cost
from effmodels.models.decoder import Decoder
from effmodels.models.recursive import recursive
from effmodels.models.resolve import resolve

__all__ = ["Decoder", "ModelConfig", "ModelCost", "cost", "recursive", "resolve"]

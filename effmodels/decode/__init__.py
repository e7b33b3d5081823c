"""Decoding with a carried state: prefill once, then one step per token; never the prefix again."""
from effmodels.decode.generate import generate, stream
from effmodels.decode.sampling import sample
from effmodels.decode.speculative import Speculation, speculate
from effmodels.decode.weights import served

__all__ = ["Speculation", "generate", "sample", "served", "speculate", "stream"]

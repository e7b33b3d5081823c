"""Images that layers of the model attend to."""
from effmodels.multimodal.base import Fusion, Work


class Cross(Fusion):
    """Nothing at the input: `cross_attention` layers of the pattern read the memory (Flamingo, arXiv:2204.14198)."""

    at_input = False

    def __init__(self, width, env, *, rngs):
        del width, env, rngs

    @classmethod
    def work(cls, width, d_model, images, tokens):
        return Work(0, 0)

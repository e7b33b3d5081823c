"""Concatenation of a token and its image, the rival of a gate. Letters: B rows, T time, I images, D model, E width of the memory."""
import jax

from effmodels.layers.linear import dot
from effmodels.layers.param import param, zeros
from effmodels.multimodal.base import OnePerToken, Work


class Concat(OnePerToken):
    """y = W [t; v] + b: the token's embedding and its latest image beside each other, projected back; v = 0 before the first image."""

    def __init__(self, width, env, *, rngs):
        D = env.d_model
        self.project = param(jax.random.normal, rngs.params(), (width, D), (None, "embed"), in_dims=(None,), dtype=env.param_dtype)
        self.w_text, self.w_image = (
            param(jax.random.normal, rngs.params(), (D, D), ("embed", None), in_dims=("embed",), dtype=env.param_dtype) for _ in range(2)
        )
        self.bias = param(zeros, rngs.params(), (D,), ("norm",), in_dims=(), dtype=env.param_dtype)

    def image_side(self, pooled_BIE):
        return dot("BID,DG->BIG", dot("BIE,ED->BID", pooled_BIE, self.project), self.w_image)

    def join(self, x_BTD, chosen_BTV):
        return self.without(x_BTD) + chosen_BTV

    def without(self, x_BTD):
        return dot("BTD,DG->BTG", x_BTD, self.w_text) + self.bias[...].astype(x_BTD.dtype)

    @classmethod
    def work(cls, width, d_model, images, tokens):
        square = d_model**2
        flops = 2 * images * (width * d_model + square)
        return Work(width * d_model + 2 * square + d_model, flops, 2 * square, images * d_model, images)

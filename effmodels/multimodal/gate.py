"""A learned modality gate per channel. Letters: B rows, T time, I images, D model, E width of the memory."""
import jax
import jax.numpy as jnp

from effmodels.layers.linear import dot
from effmodels.multimodal.base import OnePerToken, Work


class Gate(OnePerToken):
    """y = g t + (1 - g) v with g = sigmoid(W [t; v] + b) for every channel (a gated multimodal unit, arXiv:1702.01992).

    t: the token's embedding, v: its latest image; y = t before the first image.
    """

    def image_side(self, pooled_BIE):
        v_BID = dot("BIE,ED->BID", pooled_BIE, self.project)
        return jnp.concatenate([v_BID, dot("BID,DG->BIG", v_BID, self.w_image)], axis=-1)

    def join(self, x_BTD, chosen_BTV):
        g_BTD, v_BTD = self.openness(x_BTD, chosen_BTV), chosen_BTV[..., : x_BTD.shape[-1]]
        return g_BTD * x_BTD + (1 - g_BTD) * v_BTD

    def openness(self, x_BTD, chosen_BTV):
        """g [B, T, D]: the share of every channel that is the text's."""
        z_BTD = dot("BTD,DG->BTG", x_BTD, self.w_text) + chosen_BTV[..., x_BTD.shape[-1] :] + self.bias[...].astype(x_BTD.dtype)
        return jax.nn.sigmoid(z_BTD)

    def without(self, x_BTD):
        return x_BTD

    @classmethod
    def work(cls, width, d_model, images, tokens):
        square = d_model**2
        flops = 2 * images * (width * d_model + square)
        return Work(width * d_model + 2 * square + d_model, flops, 2 * square, 2 * images * d_model, images)

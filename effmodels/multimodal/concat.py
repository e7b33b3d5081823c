"""Concatenation of a token and its image, the rival of a gate. Letters: B rows, T time, I images, D model, E width of the memory."""

from effmodels.layers.linear import dot
from effmodels.multimodal.base import OnePerToken, Work


class Concat(OnePerToken):
    """y = W [t; v] + b: the token's embedding and its latest image beside each other, projected back; v = 0 before the first image."""

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

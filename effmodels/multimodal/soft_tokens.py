"""Images in the sequence. Letters: B rows, T time, I images, M entries of an image, D model, E width of the memory."""
import jax
import jax.numpy as jnp

from effmodels.layers.context import Memory
from effmodels.layers.linear import dot
from effmodels.layers.param import param
from effmodels.multimodal.base import Fusion, Work, latest, per_image, take


class SoftTokens(Fusion):
    """The projected entries of an image take the places of its M placeholder tokens, of which its index is the first (arXiv:2209.06794)."""

    def __init__(self, width, env, *, rngs):
        self.project = param(
            jax.random.normal, rngs.params(), (width, env.d_model), (None, "embed"), in_dims=(None,), dtype=env.param_dtype
        )  # fmt: skip

    @staticmethod
    def placeholders(tokens):
        return tokens

    def prepare(self, memory, tokens):
        _, ids_BI, index_BI = per_image(memory, tokens)
        return Memory(dot("BSE,ED->BSD", memory.x_BSD, self.project), ids_BI, index_BI)

    def fuse(self, x_BTD, images, ctx):
        if images is None:
            return x_BTD
        tokens = images.x_BSD.shape[1] // images.index_BS.shape[1]
        image_BT, since_BT, seen_BT = latest(x_BTD, ctx, images.segment_ids_BS, images.index_BS)
        inside_BT = seen_BT & (since_BT < tokens)
        entry_BT = image_BT * tokens + jnp.where(inside_BT, since_BT, 0)
        return jnp.where(inside_BT[..., None], take(images.x_BSD, entry_BT).astype(x_BTD.dtype), x_BTD)

    @classmethod
    def work(cls, width, d_model, images, tokens):
        return Work(width * d_model, 2 * images * tokens * width * d_model, 0.0, images * tokens * d_model, images)

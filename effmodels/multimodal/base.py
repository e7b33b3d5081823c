"""The contracts of an encoder, a resampler and a fusion, and which image a token of a row sees.

Letters: B rows, T time, I images of a row, F frames of an image, P patches, C values of a patch, E width of an encoder, M entries of an
image after the resampler, D model.
"""
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effmodels.layers.context import Memory
from effmodels.layers.param import param, zeros
from effmodels.parallel import ops


@dataclasses.dataclass(frozen=True)
class Work:
    """Parameters, and FLOPs of the forward pass (a multiply-add is two; matmuls only): of all images of a row, and of each token.

    kept_values, kept_images: activations that a row's decoding state keeps for its embedding, and of how many images.
    """

    params: int
    flops: float
    flops_per_token: float = 0.0
    kept_values: int = 0
    kept_images: int = 0


class Encoder(nnx.Module):
    """From the patches of one frame to activations: a subclass has a frozen `Config` with `patch_shape`, `tokens` and `width`.

    `__init__(self, config, env, *, rngs)`, where env.d_model is not its width; `__call__(x_BPC, remat)` returns [B, tokens, width].
    """

    Config: Any = None

    @classmethod
    def check(cls, config):
        """Raises ConfigError when the fields do not fit together."""

    @classmethod
    def work(cls, config):
        """The `Work` of one frame."""
        raise NotImplementedError


class Resampler(nnx.Module):
    """From all frames of an image, [B, F, P, E], to a fixed number of entries [B, tokens, width]; `Config` has `tokens` and `width`."""

    Config: Any = None

    @classmethod
    def check(cls, config):
        """Raises ConfigError when the fields do not fit together."""

    @classmethod
    def work(cls, config, frames, patches, width):
        """The `Work` of one image of `frames` frames, each of `patches` activations of this width."""
        raise NotImplementedError


class Fusion(nnx.Module):
    """How tokens learn of images: `__init__(self, width, env, *, rngs)` with the width of the memory.

    at_input: the embedding of every token is joined with images by `fuse`, to which `prepare` gives what does not depend on tokens: it
    is computed once, kept while decoding. Otherwise layers of the model attend to the memory.
    """

    at_input = True

    @staticmethod
    def placeholders(tokens):
        """How many tokens of the row stand for an image of so many entries."""
        del tokens
        return 1

    def prepare(self, memory, tokens):
        """Memory(x [B, I or I * M, ...], segment_ids [B, I] or None, index [B, I]) of a memory with `tokens` entries per image."""
        raise NotImplementedError

    def fuse(self, x_BTD, images, ctx):
        """x_BTD of tokens that have seen images; images: what `prepare` returns, or None."""
        raise NotImplementedError

    @classmethod
    def work(cls, width, d_model, images, tokens):
        """The `Work` for `images` images in a row, of `tokens` entries of this width each."""
        raise NotImplementedError


def per_image(memory, tokens):
    """(x [B, I, M, E], segment_ids [B, I] or None, index [B, I]) of a memory whose images have `tokens` entries each.

    Raises ValueError when the entries are not whole images, or have no index.
    """
    B, S, E = memory.x_BSD.shape
    if S % tokens:
        raise ValueError(f"memory: {S} entries are no images of {tokens} entries each; give what `model.media` returns.")
    if memory.index_BS is None:
        raise ValueError("memory: index_BS is missing; give every entry the index of the first token that sees it.")
    ids = None if memory.segment_ids_BS is None else memory.segment_ids_BS[:, ::tokens]
    return memory.x_BSD.reshape(B, S // tokens, tokens, E), ids, memory.index_BS[:, ::tokens]


def latest(x_BTD, ctx, segment_ids_BI, index_BI):
    """(which image int32 [B, T], tokens since its first one [B, T], whether there is one [B, T]): the latest of the same document.

    Raises ValueError when the rows have documents and the images have none.
    """
    index_BT = ops.layout_positions(x_BTD) if ctx.index_BT is None else ctx.index_BT
    decoding = ctx.mode in ("prefill", "step")  # one document in a row; its segment ids say which tokens are valid
    if segment_ids_BI is None and ctx.segment_ids_BT is not None and not decoding:
        raise ValueError("images: the rows have segment ids and the images have none; give the document of every image.")
    seen_BTI = index_BI[:, None] <= index_BT[..., None]
    if segment_ids_BI is not None:
        seen_BTI &= segment_ids_BI[:, None] != 0
        if ctx.segment_ids_BT is not None and not decoding:
            seen_BTI &= ctx.segment_ids_BT[..., None] == segment_ids_BI[:, None]
    if decoding and ctx.segment_ids_BT is not None:
        seen_BTI &= ctx.segment_ids_BT[..., None] != 0
    image_BT = jnp.argmax(jnp.where(seen_BTI, index_BI[:, None], -1), axis=-1).astype(jnp.int32)
    return image_BT, index_BT - take(index_BI, image_BT), jnp.any(seen_BTI, axis=-1)


def take(table_BS, index_BT):
    """table[b, index[b, t]] for every token; [B, T, ...]."""
    return jax.vmap(lambda table, index: table[index])(table_BS, index_BT)


class OnePerToken(Fusion):
    """Base of fusions that join each token with one vector: the mean of the entries of its latest image, projected to the model's width.

    Its parameters: that projection, and W of [t; v] in two parts, with a bias.
    """

    def __init__(self, width, env, *, rngs):
        D = env.d_model
        self.project = param(jax.random.normal, rngs.params(), (width, D), (None, "embed"), in_dims=(None,), dtype=env.param_dtype)
        self.w_text, self.w_image = (
            param(jax.random.normal, rngs.params(), (D, D), ("embed", None), in_dims=("embed",), dtype=env.param_dtype) for _ in range(2)
        )
        self.bias = param(zeros, rngs.params(), (D,), ("norm",), in_dims=(), dtype=env.param_dtype)

    def prepare(self, memory, tokens):
        x_BIME, ids_BI, index_BI = per_image(memory, tokens)
        return Memory(self.image_side(jnp.mean(x_BIME, axis=2)), ids_BI, index_BI)

    def fuse(self, x_BTD, images, ctx):
        if images is None:
            return self.without(x_BTD)
        image_BT, _, seen_BT = latest(x_BTD, ctx, images.segment_ids_BS, images.index_BS)
        chosen = take(images.x_BSD, image_BT).astype(x_BTD.dtype)
        return jnp.where(seen_BT[..., None], self.join(x_BTD, chosen), self.without(x_BTD))

    def image_side(self, pooled_BIE):
        """What joins need of an image: any number of values."""
        raise NotImplementedError

    def join(self, x_BTD, chosen_BTV):
        """Tokens joined with the `image_side` of their images."""
        raise NotImplementedError

    def without(self, x_BTD):
        """Tokens before which there is no image."""
        raise NotImplementedError

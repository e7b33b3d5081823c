"""Rotary positions, in float32: bfloat16 rounds 257 to 256, and a position multiplies an angle.

Letters: B batch, T time, N heads, H head dim.
"""
import jax.numpy as jnp
import numpy as np


def rope_frequencies(dims, theta):
    """RoPE (arXiv:2104.09864): theta^(-2i/dims) for i = 0 .. dims/2 - 1; float64 numpy [dims/2]."""
    return theta ** -(np.arange(0, dims, 2, dtype=np.float64) / dims)


def retnet_frequencies(dims, theta):
    """RetNet (arXiv:2307.08621, torchscale): theta^(-linspace(0, 1, dims/2)); unlike RoPE the end point is included."""
    return theta ** -np.linspace(0.0, 1.0, dims // 2, dtype=np.float64)


def halves(weight):
    """The last dim reordered from pairs (2i, 2i + 1) to pairs (i, i + half): a product with it rotates without taking pairs apart.

    Of a few megabytes of weights that costs nothing; of activations it is a relayout on a TPU (docs/log.md).
    """
    *lead, dims = weight.shape
    return weight.reshape(*lead, dims // 2, 2).swapaxes(-1, -2).reshape(*lead, dims)


def rotate(x_BTNH, positions_BT, frequencies, *, interleaved=False):
    """x with its first 2 * len(frequencies) dims rotated by positions * frequencies; the rest passes through.

    Pairs are (i, i + half) or, interleaved, (2i, 2i + 1). Computed in float32 (float64 stays), returned in x's dtype.
    """
    if len(frequencies) == 0:
        return x_BTNH
    dims, wide = 2 * len(frequencies), jnp.promote_types(x_BTNH.dtype, jnp.float32)
    angles_BTF = positions_BT.astype(wide)[..., None] * jnp.asarray(frequencies, wide)
    cos, sin = jnp.cos(angles_BTF)[:, :, None], jnp.sin(angles_BTF)[:, :, None]
    turned = x_BTNH[..., :dims].astype(wide)
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
        pairs = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
        result = pairs.reshape(turned.shape)
    else:
        first, second = jnp.split(turned, 2, axis=-1)
        result = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([result.astype(x_BTNH.dtype), x_BTNH[..., dims:]], axis=-1)

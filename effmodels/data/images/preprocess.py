"""From an image to the numbers that an encoder reads: resized, normalised, cut into patches. Numpy only, nothing is random.

Letters: H height, W width, S side of the square, C channels, P patches, V values of a patch.
"""
import dataclasses

import numpy as np

from effmodels.data.options import DataError


@dataclasses.dataclass(frozen=True)
class ImageSpec:
    """What a model wants of its images: side and patch in pixels, channels (1 or 3), mean and std of pixels in [0, 1], places in a row.

    placeholders: tokens that stand for one image. images: of one row, at most.
    """

    size: int
    patch: int
    channels: int
    mean: tuple
    std: tuple
    placeholders: int
    images: int


def patches(image, spec):
    """float32 [P, V] of a uint8 image [H, W] or [H, W, C]."""
    return patchify(normalise(square(image, spec), spec), spec.patch)


def square(image, spec):
    """uint8 [S, S, channels]: the centre of an image whose shorter side was resized to the side of the spec."""
    return _channels(resize(image[..., None] if image.ndim == 2 else image, spec.size), spec.channels)


def resize(image_HWC, size):
    """uint8 [size, size, C]: the shorter side becomes `size`, the middle of the longer one is kept.

    Linear between pixels; a triangle as wide as one new pixel where the image becomes smaller. Raises DataError for what is no image.
    """
    if image_HWC.ndim != 3 or image_HWC.dtype != np.uint8 or 0 in image_HWC.shape:
        raise DataError(f"expected an image of uint8 [height, width, channels], got {image_HWC.dtype} {list(image_HWC.shape)}.")
    height, width = image_HWC.shape[:2]
    shorter = min(height, width)
    rows, columns = (_triangles(n, max(size, round(n * size / shorter))) for n in (height, width))
    wide_HWC = columns @ image_HWC.astype(np.float64)
    new_HWC = (rows @ wide_HWC.reshape(height, -1)).reshape(len(rows), *wide_HWC.shape[1:])
    top, left = ((n - size) // 2 for n in new_HWC.shape[:2])
    return np.rint(new_HWC[top : top + size, left : left + size].clip(0, 255)).astype(np.uint8)


def normalise(image_SSC, spec):
    """float32 (x / 255 - mean) / std."""
    mean, std = (np.asarray(v, np.float32) for v in (spec.mean, spec.std))
    return ((image_SSC.astype(np.float32) / np.float32(255) - mean) / std).astype(np.float32)


def patchify(image_SSC, patch):
    """[P, V]: patches row by row, the values of each in the order of its pixels."""
    side, channels = image_SSC.shape[0] // patch, image_SSC.shape[2]
    cut = image_SSC.reshape(side, patch, side, patch, channels).transpose(0, 2, 1, 3, 4)
    return cut.reshape(side * side, patch * patch * channels)


def _channels(image_SSC, channels):
    """Grey to colour and back (ITU-R BT.601 weights); DataError for any other change."""
    have = image_SSC.shape[2]
    if have == channels:
        return image_SSC
    if (have, channels) == (1, 3):
        return np.repeat(image_SSC, 3, axis=2)
    if (have, channels) == (3, 1):
        return np.rint(image_SSC @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)[..., None]
    raise DataError(f"an image has {have} channels and the model's encoder reads {channels}; 1 and 3 can be turned into each other.")


def _triangles(old, new):
    """float64 [new, old]: the weights of old pixels in each new one."""
    centre = (np.arange(new) + 0.5) * old / new - 0.5
    weights = np.maximum(0.0, 1 - np.abs(np.arange(old) - centre[:, None]) / max(1.0, old / new))
    return weights / weights.sum(axis=1, keepdims=True)

"""Rotary positions, in float32: bfloat16 rounds 257 to 256, and a position multiplies an angle.

Letters: B batch, T time, N heads, H head dim.
"""
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from effmodels.config import ConfigError, build, nearest
from effmodels.parallel.hardware import on_tpu


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


def rotate(x_BTNH, positions_BT, frequencies, *, interleaved=False, magnitude=1.0):
    """x with its first 2 * len(frequencies) dims rotated by positions * frequencies, and times magnitude; the rest passes through.

    Pairs are (i, i + half) or, interleaved, (2i, 2i + 1). Computed in float32 (float64 stays), returned in x's dtype.
    """
    if len(frequencies) == 0:
        return x_BTNH
    dims, wide = 2 * len(frequencies), jnp.promote_types(x_BTNH.dtype, jnp.float32)
    if not interleaved and dims == x_BTNH.shape[-1] and x_BTNH.dtype == jnp.bfloat16 and on_tpu():
        angles_BTH = positions_BT.astype(wide)[..., None] * jnp.asarray(np.tile(frequencies, 2), wide)
        return by_product(1, x_BTNH, magnitude * jnp.cos(angles_BTH), magnitude * jnp.sin(angles_BTH))
    angles_BTF = positions_BT.astype(wide)[..., None] * jnp.asarray(frequencies, wide)
    cos, sin = (magnitude * f(angles_BTF)[:, :, None] for f in (jnp.cos, jnp.sin))
    turned = x_BTNH[..., :dims].astype(wide)
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
        pairs = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
        result = pairs.reshape(turned.shape)
    else:
        first, second = jnp.split(turned, 2, axis=-1)
        result = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([result.astype(x_BTNH.dtype), x_BTNH[..., dims:]], axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def by_product(sign, x_BTNH, cos_BTH, sin_BTH):
    """x cos + sign (x S) sin, where S swaps the halves and turns the sign of the second; angles, equal in both halves, get no gradient.

    The same numbers as by slices, since a product with -1, 0 and 1 rounds nothing in bfloat16 (in float32 a TPU would). Slices and
    concatenations of half a register are passes through memory of their own, a small product is part of one (docs/log.md).
    """
    swap = sign * np.kron([[0, 1], [-1, 0]], np.eye(x_BTNH.shape[-1] // 2))
    swapped = jnp.einsum("BTNH,HK->BTNK", x_BTNH, jnp.asarray(swap, x_BTNH.dtype), preferred_element_type=cos_BTH.dtype)
    return (x_BTNH.astype(cos_BTH.dtype) * cos_BTH[:, :, None] + swapped * sin_BTH[:, :, None]).astype(x_BTNH.dtype)


by_product.defvjp(
    lambda sign, x, cos, sin: (by_product(sign, x, cos, sin), (cos, sin)),
    lambda sign, angles, dy: (by_product(-sign, dy, *angles), None, None),  # the same pairs, turned back
)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotations are changed for rows longer than those of the pre-training; a mapping of these fields is a mixer's `rope_scaling`.

    kind: "linear", position interpolation (arXiv:2306.15595): all frequencies / factor. "ntk": the base times factor^(D / (D - 2)), so that
    the slowest of D dims turns factor times more slowly and the fastest as before. "yarn" (arXiv:2309.00071): as "linear" where a dim
    turns less than beta_slow times in original_length tokens, unchanged where more than beta_fast times, a ramp between; scores grow by
    attention_factor^2. "abf" (arXiv:2309.16039): another base, `theta`. "llama3" (Llama 3.1): as "linear" for less than low_factor turns,
    unchanged for more than high_factor, between them linear in the number of turns.
    """

    kind: str
    factor: float = 1.0  # how many times longer rows may get
    original_length: int | None = None  # tokens of a row in pre-training
    theta: float | None = None  # of "abf"
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    ramp: str = "dims"  # of "yarn": linear in the index of the dim, as its public code; "turns": in the number of turns, as its equation
    truncate: bool = True  # the ends of a ramp over dims are whole numbers
    attention_factor: float | None = None  # of "yarn"; None: 0.1 ln(factor) + 1
    low_factor: float = 1.0
    high_factor: float = 4.0


def rope(dims, theta, scaling=None):
    """(frequencies, float64 numpy [dims/2], and what rotated entries are multiplied with); scaling: a mapping of `RopeScaling` or None.

    Raises ConfigError for unknown or missing fields.
    """
    if scaling is None:
        return rope_frequencies(dims, theta), 1.0
    c = rope_scaling(scaling)
    return SCALINGS[c.kind](c, dims, theta)


def rope_scaling(mapping, where="rope_scaling"):
    """The checked `RopeScaling` of a mapping; raises ConfigError naming the field."""
    c = build(RopeScaling, mapping, where)
    if c.kind not in SCALINGS:
        raise ConfigError(f"{where}.kind: unknown {c.kind!r}.{nearest(c.kind, SCALINGS)}")
    if c.factor < 1:
        raise ConfigError(f"{where}.factor: expected a number of at least 1, got {c.factor}.")
    if c.kind == "abf" and (c.theta is None or c.theta <= 0):
        raise ConfigError(f"{where}: kind='abf' needs theta, the new base; got {c.theta}.")
    if c.kind in ("yarn", "llama3") and (c.original_length is None or c.original_length < 1):
        raise ConfigError(f"{where}: kind={c.kind!r} needs original_length, the tokens of a row in pre-training; got {c.original_length}.")
    if c.ramp not in ("dims", "turns"):
        raise ConfigError(f"{where}.ramp: expected 'dims' or 'turns', got {c.ramp!r}.")
    if c.beta_fast <= c.beta_slow or c.high_factor <= c.low_factor:
        raise ConfigError(
            f"{where}: expected beta_slow < beta_fast and low_factor < high_factor, got {c.beta_slow}, {c.beta_fast}, {c.low_factor}, "
            f"{c.high_factor}."
        )
    return c


def _linear(c, dims, theta):
    return rope_frequencies(dims, theta) / c.factor, 1.0


def _ntk(c, dims, theta):
    return rope_frequencies(dims, theta * c.factor ** (dims / (dims - 2)) if dims > 2 else theta), 1.0


def _abf(c, dims, theta):
    return rope_frequencies(dims, c.theta), 1.0


def _yarn(c, dims, theta):
    frequencies = rope_frequencies(dims, theta)
    if c.ramp == "turns":
        kept = np.clip((_turns(c, frequencies) - c.beta_slow) / (c.beta_fast - c.beta_slow), 0, 1)
    else:
        # The (fractional) pair of dims that makes beta turns in original_length tokens.
        turns = (c.beta_fast, c.beta_slow)
        first, last = (dims * math.log(c.original_length / (beta * 2 * math.pi)) / (2 * math.log(theta)) for beta in turns)
        first, last = (math.floor(first), math.ceil(last)) if c.truncate else (first, last)
        first, last = max(first, 0), min(last, dims - 1)
        kept = 1 - np.clip((np.arange(dims // 2) - first) / (last - first if last != first else 1e-3), 0, 1)
    magnitude = 0.1 * math.log(c.factor) + 1 if c.attention_factor is None else c.attention_factor
    return frequencies / c.factor * (1 - kept) + frequencies * kept, magnitude


def _llama3(c, dims, theta):
    frequencies = rope_frequencies(dims, theta)
    kept = np.clip((_turns(c, frequencies) - c.low_factor) / (c.high_factor - c.low_factor), 0, 1)
    return frequencies / c.factor * (1 - kept) + frequencies * kept, 1.0


def _turns(c, frequencies):
    return c.original_length * frequencies / (2 * math.pi)


SCALINGS = {"linear": _linear, "ntk": _ntk, "yarn": _yarn, "abf": _abf, "llama3": _llama3}

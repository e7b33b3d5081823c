"""Parameters: one constructor that fixes the initial variance and names every dim of the array."""
import dataclasses
import math

import jax.numpy as jnp
from flax import nnx


@dataclasses.dataclass(frozen=True)
class ParamInfo:
    """What sharding rules and optimisers need to know of one array; nothing is ever inferred from its number of dims.

    dim_names: logical name of every dim. in_dims: the dims that a matmul sums over (the fan-in); the rest, less
    batch_dims, are its outputs.
    batch_dims: dims that hold independent matrices (`layers` of a scanned stack, `expert`).
    """

    dim_names: tuple[str, ...]
    in_dims: tuple[str, ...] = ()
    batch_dims: tuple[str, ...] = ()

    def stacked(self):
        """The same parameter once per layer of a scanned segment: `layers` goes first."""
        return ParamInfo(("layers", *self.dim_names), self.in_dims, ("layers", *self.batch_dims))

    @property
    def is_matrix(self):
        """True when the array is a linear map per batch entry: it has input dims and output dims."""
        outputs = set(self.dim_names) - set(self.in_dims) - set(self.batch_dims)
        return bool(self.in_dims) and bool(outputs)


class Buffer(nnx.Variable):
    """What is trained by rule instead of by gradient (the MoE balancing bias): no optimiser, no decay, but saved and restored."""


def param(init, key, shape, dim_names, *, in_dims, batch_dims=(), dtype=jnp.float32):
    """A named parameter `init(key, shape, dtype) / sqrt(fan_in)`; with a unit-variance init its std is 1 / sqrt(fan_in).

    fan_in is the product of the sizes of `in_dims`; `in_dims=()` leaves the draw unscaled (norm scales, biases).
    Raises ValueError when shape and dim_names differ in length or a named dim is missing.
    """
    info = ParamInfo(tuple(dim_names), tuple(in_dims), tuple(batch_dims))
    if len(shape) != len(info.dim_names):
        raise ValueError(f"param: shape {tuple(shape)} has {len(shape)} dims but dim_names {info.dim_names} has {len(info.dim_names)}.")
    unknown = [d for d in (*info.in_dims, *info.batch_dims) if d not in info.dim_names]
    if unknown:
        raise ValueError(f"param: {unknown} in in_dims or batch_dims, but dim_names are {info.dim_names}.")
    sizes = dict(zip(info.dim_names, shape))
    fan_in = math.prod(sizes[d] for d in info.in_dims)
    value = init(key, tuple(shape), dtype)
    if fan_in != 1:
        value = (value * fan_in**-0.5).astype(dtype)
    return nnx.Param(value, info=info)


def ones(key, shape, dtype):
    """Initialiser of norm scales."""
    del key
    return jnp.ones(shape, dtype)


def constant(value):
    """Initialiser of a scale that starts at a number."""

    def init(key, shape, dtype):
        del key
        return jnp.full(shape, value, dtype)

    return init


def zeros(key, shape, dtype):
    """Initialiser of biases and zero-gated branches."""
    del key
    return jnp.zeros(shape, dtype)

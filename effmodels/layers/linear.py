"""The one door of every matmul with a weight."""
import functools
import math

import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from effmodels.parallel import ops
from effmodels.parallel.axes import current_mesh


def dot(spec, x, weight, dtype=None, arrange=None):
    """einsum(spec, x, weight) in x's dtype (the compute dtype); `weight` is a Param or an array, cast on the way in.

    spec: "BTD,DNH->BTNH", activations first. Sums run in float32 where the hardware multiplies in less. dtype: of the result (default x's).
    arrange: a function of the weight in the compute dtype that reorders its columns. For `train.remat` the result has the name of the
    weight's first output dim ("heads", "mlp", ...).
    """
    return named(_product(spec, x, weight, dtype, arrange), _output_dim(spec, weight))


def named(x, name):
    """x, which `train.remat=save:<name>` keeps for the backward pass."""
    return x if name is None else checkpoint_name(x, name)


def _product(spec, x, weight, dtype, arrange):
    w = (weight if isinstance(weight, jnp.ndarray) else weight[...]).astype(x.dtype)
    w = w if arrange is None else arrange(w)
    if current_mesh() is not None:
        return ops.project(spec, x, w, _dim_names(spec, weight), dtype)
    inputs = _matrix_inputs(spec)
    if inputs is None:
        return jnp.einsum(spec, x, w, preferred_element_type=dtype)
    # As one matrix product: in the backward pass of the einsum a CPU transposes activations elementwise, which takes longer than the
    # product itself (docs/log.md). Under a mesh the dims stay apart, so that each keeps its sharding.
    lead, out = x.shape[: x.ndim - inputs], w.shape[inputs:]
    y = jnp.matmul(x.reshape(math.prod(lead), -1), w.reshape(-1, math.prod(out)), preferred_element_type=dtype)
    return y.reshape(*lead, *out)


def _dim_names(spec, weight):
    """The names of the weight's dims; None of a bare array."""
    info = getattr(weight, "get_metadata", dict)().get("info")
    letters = spec.split("->")[0].split(",")[1]
    return None if info is None else info.dim_names[-len(letters) :]  # one layer of a stack has the names of the stack


def _output_dim(spec, weight):
    """The dim name of the weight's first dim that is in the result; None of a bare array."""
    operands, result = spec.split("->")
    names = _dim_names(spec, weight) or ()
    return next((name for name, letter in zip(names, operands.split(",")[1]) if letter in result), None)


@functools.cache
def _matrix_inputs(spec):
    """How many dims are summed over if the einsum is x[lead, in] @ w[in, out], else None."""
    operands, result = spec.split("->")
    x_dims, w_dims = operands.split(",")
    summed = "".join(d for d in x_dims if d not in result)
    lead, out = x_dims.removesuffix(summed), w_dims.removeprefix(summed)
    return len(summed) if summed and lead + summed == x_dims and summed + out == w_dims and lead + out == result else None

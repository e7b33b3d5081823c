"""The one door of every matmul with a weight."""
import functools
import math

import jax.numpy as jnp

from effmodels.parallel.axes import current_mesh


def dot(spec, x, weight, dtype=None):
    """einsum(spec, x, weight) in x's dtype (the compute dtype); `weight` is a Param or an array, cast on the way in.

    spec: "BTD,DNH->BTNH", activations first. Sums run in float32 where the hardware multiplies in less. dtype: of the result (default x's).
    """
    w = (weight if isinstance(weight, jnp.ndarray) else weight[...]).astype(x.dtype)
    inputs = _matrix_inputs(spec)
    if inputs is None or current_mesh() is not None:
        return jnp.einsum(spec, x, w, preferred_element_type=dtype)
    # As one matrix product: in the backward pass of the einsum a CPU transposes activations elementwise, which takes longer than the
    # product itself (docs/log.md). Under a mesh the dims stay apart, so that each keeps its sharding.
    lead, out = x.shape[: x.ndim - inputs], w.shape[inputs:]
    y = jnp.matmul(x.reshape(math.prod(lead), -1), w.reshape(-1, math.prod(out)), preferred_element_type=dtype)
    return y.reshape(*lead, *out)


@functools.cache
def _matrix_inputs(spec):
    """How many dims are summed over if the einsum is x[lead, in] @ w[in, out], else None."""
    operands, result = spec.split("->")
    x_dims, w_dims = operands.split(",")
    summed = "".join(d for d in x_dims if d not in result)
    lead, out = x_dims.removesuffix(summed), w_dims.removeprefix(summed)
    return len(summed) if summed and lead + summed == x_dims and summed + out == w_dims and lead + out == result else None

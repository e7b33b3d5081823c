"""The one door of every matmul with a weight."""
import jax.numpy as jnp


def dot(spec, x, weight, dtype=None):
    """einsum(spec, x, weight) in x's dtype (the compute dtype); `weight` is a Param or an array, cast on the way in.

    spec: "BTD,DNH->BTNH", activations first. Sums run in float32 where the hardware multiplies in less. dtype: of the result (default x's).
    """
    w = weight if isinstance(weight, jnp.ndarray) else weight[...]
    return jnp.einsum(spec, x, w.astype(x.dtype), preferred_element_type=dtype)

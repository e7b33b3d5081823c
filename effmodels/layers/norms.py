"""Normalisation in float32, whatever the dtype around it. Letters: D model."""
import jax
import jax.numpy as jnp
from flax import nnx

from effmodels.layers.param import ones, param, zeros


def rms_normalise(x, eps):
    """x / sqrt(mean(x^2) + eps) over the last dim, computed in float32 (float64 stays), returned in x's dtype."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm with a scale (arXiv:1910.07467)."""

    def __init__(self, size, *, rngs, eps=1e-6, param_dtype=jnp.float32):
        self.eps = eps
        self.scale = param(ones, rngs.params(), (size,), ("norm",), in_dims=(), dtype=param_dtype)

    def __call__(self, x):
        return rms_normalise(x, self.eps) * self.scale[...].astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer norm with scale and bias (arXiv:1607.06450)."""

    def __init__(self, size, *, rngs, eps=1e-6, param_dtype=jnp.float32):
        self.eps = eps
        self.scale = param(ones, rngs.params(), (size,), ("norm",), in_dims=(), dtype=param_dtype)
        self.bias = param(zeros, rngs.params(), (size,), ("norm",), in_dims=(), dtype=param_dtype)

    def __call__(self, x):
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        return rms_normalise(centred, self.eps).astype(x.dtype) * self.scale[...].astype(x.dtype) + self.bias[...].astype(x.dtype)


NORMS = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}

"""Normalisation in float32, whatever the dtype around it. Letters: D model."""
import jax
import jax.numpy as jnp
from flax import nnx

from effmodels.layers.param import constant, param, zeros


def rms_normalise(x, eps):
    """x / sqrt(mean(x^2) + eps) over the last dim, computed in float32 (float64 stays), returned in x's dtype."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm with a scale (arXiv:1910.07467); what multiplies is offset + scale, which starts at one."""

    def __init__(self, size, *, rngs, eps=1e-6, param_dtype=jnp.float32, offset=0.0):
        self.eps, self.offset = eps, offset
        self.scale = param(constant(1 - offset), rngs.params(), (size,), ("norm",), in_dims=(), dtype=param_dtype)

    def __call__(self, x):
        if not self.offset:
            return rms_normalise(x, self.eps) * self.scale[...].astype(x.dtype)
        # In float32 up to the end: offset + scale in bfloat16 would lose the scale's last bits.
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return (rms_normalise(wide, self.eps) * (self.offset + self.scale[...].astype(wide.dtype))).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer norm with scale and bias (arXiv:1607.06450); what multiplies is offset + scale, which starts at one."""

    def __init__(self, size, *, rngs, eps=1e-6, param_dtype=jnp.float32, offset=0.0):
        self.eps, self.offset = eps, offset
        self.scale = param(constant(1 - offset), rngs.params(), (size,), ("norm",), in_dims=(), dtype=param_dtype)
        self.bias = param(zeros, rngs.params(), (size,), ("norm",), in_dims=(), dtype=param_dtype)

    def __call__(self, x):
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        if not self.offset:
            return rms_normalise(centred, self.eps).astype(x.dtype) * self.scale[...].astype(x.dtype) + self.bias[...].astype(x.dtype)
        scale, bias = (a[...].astype(wide.dtype) for a in (self.scale, self.bias))
        return (rms_normalise(centred, self.eps) * (self.offset + scale) + bias).astype(x.dtype)


NORMS = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}

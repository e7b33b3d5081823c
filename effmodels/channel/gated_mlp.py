"""The feed-forward layer of a gated cross-attention block. Letters: B batch, T time, D model."""
import dataclasses

import jax.numpy as jnp

from effmodels.channel.mlp import MLP
from effmodels.layers.param import param, zeros


class GatedMLP(MLP):
    """y = tanh(gate) mlp(x) with one number that starts at 0 (Flamingo, arXiv:2204.14198): the layer begins as the identity."""

    def __init__(self, config, env, *, rngs):
        super().__init__(config, env, rngs=rngs)
        self.gate = param(zeros, rngs.params(), (1,), ("norm",), in_dims=(), dtype=env.param_dtype)

    def __call__(self, x_BTD, ctx):
        y_BTD, aux = super().__call__(x_BTD, ctx)
        gate = jnp.tanh(self.gate[...].astype(jnp.promote_types(y_BTD.dtype, jnp.float32))).astype(y_BTD.dtype)
        return gate * y_BTD, aux

    @classmethod
    def cost(cls, config, env, seq_len, dtype_bytes=2):
        cost = MLP.cost(config, env, seq_len, dtype_bytes)
        return dataclasses.replace(cost, params=cost.params + 1, active_params=cost.active_params + 1)

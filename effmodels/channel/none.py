"""No channel mixer: a layer that is its token mixer alone, as in Mamba-2 (arXiv:2405.21060)."""
import dataclasses

import jax.numpy as jnp

from effmodels.channel.base import ChannelMixer
from effmodels.mixers.base import Cost


class NoChannel(ChannelMixer):
    """Nothing: a layer builds no norm for it and adds nothing; called by itself it gives zeros."""

    absent = True

    @dataclasses.dataclass(frozen=True)
    class Config:
        pass

    def __init__(self, config, env, *, rngs):
        self.config = config

    def __call__(self, x_BTD, ctx):
        return jnp.zeros_like(x_BTD), None

    @classmethod
    def cost(cls, config, env, seq_len, dtype_bytes=2):
        return Cost(params=0, flops=0.0, dense_flops=0.0, decode_flops=0.0)

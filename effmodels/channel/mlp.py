"""The dense feed-forward layer. Letters: B batch, T time, D model, F ffn."""
import dataclasses
import functools

import jax

from effmodels.channel.base import ACTIVATIONS, ChannelMixer
from effmodels.config import ConfigError, nearest
from effmodels.layers.linear import dot
from effmodels.layers.param import param
from effmodels.mixers.base import Cost
from effmodels.parallel.axes import shard


class MLP(ChannelMixer):
    """y = activation(x W_in ...) W_out; gated activations (arXiv:2002.05202) have two input matrices."""

    @dataclasses.dataclass(frozen=True)
    class Config:
        hidden: int | None = None  # None: 4 d_model, or 8/3 d_model when gated, rounded up to a multiple of 64
        activation: str = "swiglu"

    @classmethod
    def check(cls, config, env):
        if config.activation not in ACTIVATIONS:
            raise ConfigError(f"mlp.activation: unknown {config.activation!r}.{nearest(config.activation, ACTIVATIONS)}")
        if config.hidden is not None and config.hidden < 1:
            raise ConfigError(f"mlp: expected hidden >= 1 or None, got {config.hidden}.")

    def __init__(self, config, env, *, rngs):
        self.config = config
        D, F = env.d_model, hidden_size(config, env)
        make = functools.partial(param, jax.random.normal, dtype=env.param_dtype)
        self.w_in = make(rngs.params(), (D, F), ("embed", "mlp"), in_dims=("embed",))
        if ACTIVATIONS[config.activation][1] == 2:
            self.w_up = make(rngs.params(), (D, F), ("embed", "mlp"), in_dims=("embed",))
        self.w_out = make(rngs.params(), (F, D), ("mlp", "embed"), in_dims=("mlp",))

    def __call__(self, x_BTD, ctx):
        activation, inputs = ACTIVATIONS[self.config.activation]
        weights = (self.w_in, self.w_up)[:inputs] if inputs == 2 else (self.w_in,)
        h_BTF = shard(activation(*(dot("BTD,DF->BTF", x_BTD, w) for w in weights)), "batch", "seq", "act_mlp")
        return shard(dot("BTF,FD->BTD", h_BTF, self.w_out), "batch", "res_seq", "act_embed"), None

    @classmethod
    def cost(cls, config, env, seq_len, dtype_bytes=2):
        params = (ACTIVATIONS[config.activation][1] + 1) * env.d_model * hidden_size(config, env)
        return Cost(params=params, flops=2 * params * seq_len, dense_flops=2 * params * seq_len, decode_flops=2 * params)


def hidden_size(config, env):
    """The ffn width of a config with `hidden` and `activation`."""
    if config.hidden is not None:
        return config.hidden
    if ACTIVATIONS[config.activation][1] == 1:
        return 4 * env.d_model
    return -(-8 * env.d_model // 3 // 64) * 64

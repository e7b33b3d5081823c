"""The dense feed-forward layer. Letters: B batch, T time, D model, F ffn."""
import dataclasses
import functools

import jax

from effmodels.channel.base import ACTIVATIONS, ChannelMixer, activation
from effmodels.config import ConfigError, nearest
from effmodels.layers.linear import dot
from effmodels.layers.param import param, zeros
from effmodels.mixers.base import Cost
from effmodels.parallel.axes import shard


class MLP(ChannelMixer):
    """y = activation(x W_in ...) W_out; gated activations (arXiv:2002.05202) have two input matrices."""

    @dataclasses.dataclass(frozen=True)
    class Config:
        hidden: int | None = None  # None: 4 d_model, or 8/3 d_model when gated, rounded up to a multiple of 64
        activation: str = "swiglu"
        bias: bool = False
        swiglu_alpha: float = 1.702  # of "swiglu_clamped"
        swiglu_limit: float = 7.0  # likewise

    @classmethod
    def check(cls, config, env):
        if config.activation not in ACTIVATIONS:
            raise ConfigError(f"mlp.activation: unknown {config.activation!r}.{nearest(config.activation, ACTIVATIONS)}")
        if config.hidden is not None and config.hidden < 1:
            raise ConfigError(f"mlp: expected hidden >= 1 or None, got {config.hidden}.")
        if config.swiglu_limit <= 0:
            raise ConfigError(f"mlp: expected swiglu_limit > 0, got {config.swiglu_limit}.")

    def __init__(self, config, env, *, rngs):
        self.config = config
        D, F = env.d_model, hidden_size(config, env)
        make = functools.partial(param, jax.random.normal, dtype=env.param_dtype)
        self.w_in = make(rngs.params(), (D, F), ("embed", "mlp"), in_dims=("embed",))
        if ACTIVATIONS[config.activation][1] == 2:
            self.w_up = make(rngs.params(), (D, F), ("embed", "mlp"), in_dims=("embed",))
        self.w_out = make(rngs.params(), (F, D), ("mlp", "embed"), in_dims=("mlp",))
        if config.bias:
            for name in ("b_in", "b_up")[: ACTIVATIONS[config.activation][1]]:
                setattr(self, name, param(zeros, rngs.params(), (F,), ("mlp",), in_dims=(), dtype=env.param_dtype))
            self.b_out = param(zeros, rngs.params(), (D,), ("norm",), in_dims=(), dtype=env.param_dtype)

    def __call__(self, x_BTD, ctx):
        function, inputs = activation(self.config)
        h_BTF = function(*(self._linear("BTD,DF->BTF", x_BTD, name) for name in ("in", "up")[:inputs]))
        y_BTD = self._linear("BTF,FD->BTD", shard(h_BTF, "batch", "seq", "act_mlp"), "out")
        return shard(y_BTD, "batch", "res_seq", "act_embed"), None

    def _linear(self, spec, x, name):
        y = dot(spec, x, getattr(self, "w_" + name))
        return y + getattr(self, "b_" + name)[...].astype(y.dtype) if self.config.bias else y

    @classmethod
    def cost(cls, config, env, seq_len, dtype_bytes=2):
        params = (ACTIVATIONS[config.activation][1] + 1) * env.d_model * hidden_size(config, env)
        vectors = (ACTIVATIONS[config.activation][1] * hidden_size(config, env) + env.d_model) * config.bias
        return Cost(params=params + vectors, flops=2 * params * seq_len, dense_flops=2 * params * seq_len, decode_flops=2 * params)


def hidden_size(config, env):
    """The ffn width of a config with `hidden` and `activation`."""
    if config.hidden is not None:
        return config.hidden
    if ACTIVATIONS[config.activation][1] == 1:
        return 4 * env.d_model
    return -(-8 * env.d_model // 3 // 64) * 64

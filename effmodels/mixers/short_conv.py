"""The gated short convolution of LFM2 (arXiv:2511.23404): a gate before and one behind a convolution over a few tokens.

Letters: B batch, T time, D model, C channels (as many as D), W taps, w = W - 1 inputs before a convolution.
"""
import dataclasses
import functools
from typing import Any

import jax

from effmodels.config import ConfigError
from effmodels.layers.convolution import ShortConvolution
from effmodels.layers.linear import dot
from effmodels.layers.param import param, zeros
from effmodels.mixers.base import Cost, TokenMixer
from effmodels.parallel.axes import shard


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ShortConvState:
    """The last inputs of the convolution; its size does not depend on the length."""

    x_BwC: Any

    DIMS = {"x_BwC": ("batch", None, "act_mlp")}


class ShortConv(TokenMixer):
    """y = (c * conv(b * x)) W_out with b, c, x = x_in W_b, x_in W_c, x_in W_x; the convolution is causal and has no nonlinearity."""

    layouts, neighbours_only = ("contiguous", "zigzag"), True

    @dataclasses.dataclass(frozen=True)
    class Config:
        conv_width: int = 3  # taps, the token itself included
        bias: bool = False  # of the projections and the convolution

    @classmethod
    def fills(cls, config, max_len):
        return False

    @classmethod
    def check(cls, config, env):
        if config.conv_width < 1:
            raise ConfigError(f"short_conv: expected conv_width >= 1, got conv_width={config.conv_width}.")

    def __init__(self, config, env, *, rngs):
        self.config, self.env = config, env
        C = D = env.d_model
        make = functools.partial(param, jax.random.normal, dtype=env.param_dtype)
        self.wb, self.wc, self.wx = (make(rngs.params(), (D, C), ("embed", "mlp"), in_dims=("embed",)) for _ in range(3))
        self.wo = make(rngs.params(), (C, D), ("mlp", "embed"), in_dims=("mlp",))
        options = {"width": config.conv_width, "bias": config.bias, "swish": False, "param_dtype": env.param_dtype}
        self.conv = ShortConvolution((C,), ("mlp",), ("act_mlp",), rngs=rngs, **options)
        if config.bias:
            none = functools.partial(param, zeros, in_dims=(), dtype=env.param_dtype)
            self.bb, self.bc, self.bx = (none(rngs.params(), (C,), ("mlp",)) for _ in range(3))
            self.bo = none(rngs.params(), (D,), ("norm",))

    def __call__(self, x_BTD, ctx):
        inner_BTC, gate_BTC = self._projected(x_BTD)
        return self._output(self.conv(inner_BTC, ctx.segment_ids_BT), gate_BTC)

    def init_state(self, batch, max_len, dtype):
        return ShortConvState(self.conv.init_state(batch, dtype))

    def prefill(self, x_BTD, ctx, state, valid_BT=None):
        inner_BTC, gate_BTC = self._projected(x_BTD)
        y_BTC, last_BwC = self.conv.prefill(inner_BTC, state.x_BwC, valid_BT)
        return self._output(y_BTC, gate_BTC), ShortConvState(last_BwC)

    def _projected(self, x_BTD):
        """(what goes into the convolution, the gate behind it)."""
        b_BTC, c_BTC, x_BTC = (self._linear("BTD,DC->BTC", x_BTD, name) for name in "bcx")
        return b_BTC * x_BTC, c_BTC

    def _linear(self, spec, x_BTD, name):
        y_BTC = shard(dot(spec, x_BTD, getattr(self, "w" + name)), "batch", "seq", "act_mlp")
        return y_BTC + getattr(self, "b" + name)[...].astype(y_BTC.dtype) if self.config.bias else y_BTC

    def _output(self, y_BTC, gate_BTC):
        y_BTD = dot("BTC,CD->BTD", gate_BTC * y_BTC, self.wo)
        y_BTD = y_BTD + self.bo[...].astype(y_BTD.dtype) if self.config.bias else y_BTD
        return shard(y_BTD, "batch", "res_seq", "act_embed")

    @classmethod
    def cost(cls, config, env, seq_len, dtype_bytes=2):
        D = env.d_model
        products = 4 * D * D + config.conv_width * D
        return Cost(
            params=products + 5 * D * config.bias,
            flops=2 * products * seq_len,
            dense_flops=2 * products * seq_len,
            decode_flops=2 * products,
            state_bytes=(config.conv_width - 1) * D * dtype_bytes,
        )

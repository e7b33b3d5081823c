"""Mamba-2 (arXiv:2405.21060): a state space layer whose state decays by one number per head and token, as gated linear attention.

With step sizes dt and rates A, the layer's y_t = C_t S_t + D x_t, S_t = exp(-dt_t A) S_{t-1} + B_t^T (dt_t x_t), is the retention of
queries C, keys B and values dt x with log decay -dt A per token (section 7.1).
Letters: B batch, T time, D model, N heads, G groups of heads that share B and C, H state dim, P head dim, w inputs before a convolution.
"""
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from effmodels.config import ConfigError
from effmodels.layers.convolution import ShortConvolution
from effmodels.layers.discretise import log_rates, step_biases
from effmodels.layers.linear import dot
from effmodels.layers.norms import rms_normalise
from effmodels.layers.param import ones, param, zeros
from effmodels.mixers.base import Cost, TokenMixer, visible_pairs
from effmodels.parallel import ops
from effmodels.parallel.axes import shard

COST_CHUNK = 64  # tokens per chunk that FLOP counts assume where the config leaves the choice to the kernel


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SSDState:
    """The state, float32 whatever the compute dtype, and the last inputs of the convolutions; their sizes do not depend on the length."""

    s_BNHP: Any
    x_BwNP: Any
    b_BwGH: Any
    c_BwGH: Any

    DIMS = {
        "s_BNHP": ("batch", "act_heads", None, None), "x_BwNP": ("batch", None, "act_heads", None),
        "b_BwGH": ("batch", None, None, None), "c_BwGH": ("batch", None, None, None),
    }  # fmt: skip


class SSD(TokenMixer):
    """y = norm(ssd(x, B, C, dt) * swish(x_in W_z)) W_o with x, B, C = swish(conv(x_in W) + bias), dt = softplus(x_in W_dt + dt_bias)."""

    layouts = ("contiguous", "zigzag")

    @dataclasses.dataclass(frozen=True)
    class Config:
        num_heads: int = 8
        head_dim: int | None = None  # None: 2 d_model / num_heads, the paper's expansion
        state_dim: int = 128
        groups: int = 1  # of heads that share B and C
        conv_width: int = 4
        conv_bias: bool = True
        bias: bool = False  # of every projection
        dt_min: float = 0.0  # step sizes are cut to [dt_min, dt_max]
        dt_max: float | None = None
        norm: str = "gated"  # "gated" norm(y * gate), "before_gate" norm(y) * gate, "none" y * gate
        norm_groups: int = 1  # each part of the channels is normalised by itself
        norm_eps: float | None = None  # None: the model's
        chunk: int | None = None  # tokens per chunk; None: the kernel's choice

    @classmethod
    def fills(cls, config, max_len):
        return False

    @classmethod
    def check(cls, config, env):
        n = config.num_heads
        for field in ("num_heads", "head_dim", "state_dim", "groups", "conv_width", "norm_groups", "chunk"):
            if getattr(config, field) is not None and getattr(config, field) < 1:
                raise ConfigError(f"ssd: expected {field} >= 1, got {field}={getattr(config, field)}.")
        if config.head_dim is None and 2 * env.d_model % n:
            valid = [i for i in range(1, 2 * env.d_model + 1) if 2 * env.d_model % i == 0 and 2 * env.d_model // i >= 8]
            raise ConfigError(f"ssd: 2 d_model={2 * env.d_model} is not divisible by num_heads={n}; valid: {valid}, or set head_dim.")
        for field in ("groups", "norm_groups"):
            if n % getattr(config, field):
                valid = [i for i in range(1, n + 1) if n % i == 0]
                raise ConfigError(f"ssd: num_heads={n} is not divisible by {field}={getattr(config, field)}; valid: {valid}.")
        if config.norm not in NORMS:
            raise ConfigError(f"ssd: expected norm to be one of {', '.join(NORMS)}, got {config.norm!r}.")
        if config.dt_max is not None and config.dt_max <= config.dt_min:
            raise ConfigError(f"ssd: expected dt_min < dt_max, got {config.dt_min} and {config.dt_max}.")

    def __init__(self, config, env, *, rngs):
        self.config, self.env = config, env
        D, N, P, G, H = env.d_model, config.num_heads, _head_dim(config, env), config.groups, config.state_dim
        make = functools.partial(param, jax.random.normal, dtype=env.param_dtype)
        self.wz = make(rngs.params(), (D, N, P), ("embed", "heads", "value_dim"), in_dims=("embed",))
        self.wx = make(rngs.params(), (D, N, P), ("embed", "heads", "value_dim"), in_dims=("embed",))
        # Few groups serve all heads: every shard of the heads has all of them.
        self.wb = make(rngs.params(), (D, G, H), ("embed", None, "head_dim"), in_dims=("embed",))
        self.wc = make(rngs.params(), (D, G, H), ("embed", None, "head_dim"), in_dims=("embed",))
        self.wdt = make(rngs.params(), (D, N), ("embed", "heads"), in_dims=("embed",))
        self.wo = make(rngs.params(), (N, P, D), ("heads", "value_dim", "embed"), in_dims=("heads", "value_dim"))
        conv = functools.partial(
            ShortConvolution, rngs=rngs, width=config.conv_width, bias=config.conv_bias, param_dtype=env.param_dtype
        )
        self.conv_x = conv((N, P), ("heads", "value_dim"), ("act_heads", None))
        self.conv_b = conv((G, H), (None, "head_dim"), (None, None))
        self.conv_c = conv((G, H), (None, "head_dim"), (None, None))
        self.a_log = param(log_rates, rngs.params(), (N,), ("heads",), in_dims=(), dtype=env.param_dtype)
        self.dt_bias = param(step_biases, rngs.params(), (N,), ("heads",), in_dims=(), dtype=env.param_dtype)
        self.skip = param(ones, rngs.params(), (N,), ("heads",), in_dims=(), dtype=env.param_dtype)
        if config.bias:
            vector = functools.partial(param, zeros, in_dims=(), dtype=env.param_dtype)
            self.bz, self.bx = (vector(rngs.params(), (N, P), ("heads", "value_dim")) for _ in range(2))
            self.bb, self.bc = (vector(rngs.params(), (G, H), (None, "head_dim")) for _ in range(2))
            self.bdt, self.bo = vector(rngs.params(), (N,), ("heads",)), vector(rngs.params(), (D,), ("norm",))
        if config.norm != "none":
            self.norm_scale = param(ones, rngs.params(), (N, P), ("heads", "value_dim"), in_dims=(), dtype=env.param_dtype)

    def __call__(self, x_BTD, ctx):
        x, b, c = (conv(a, ctx.segment_ids_BT) for conv, a in self._projected(x_BTD))
        y_BTNP = self._retain(x, b, c, self._steps(x_BTD), segment_ids=ctx.segment_ids_BT)
        return self._output(y_BTNP, x, x_BTD)

    def init_state(self, batch, max_len, dtype):
        c = self.config
        # NOTE: float32 (float64 in double precision) even in bfloat16 models: the state sums thousands of tokens.
        shape = (batch, c.num_heads, c.state_dim, _head_dim(c, self.env))
        lasts = (conv.init_state(batch, dtype) for conv in (self.conv_x, self.conv_b, self.conv_c))
        return SSDState(jnp.zeros(shape, jnp.promote_types(dtype, jnp.float32)), *lasts)

    def prefill(self, x_BTD, ctx, state, valid_BT=None):
        (x, b, c), lasts = self._convolved(x_BTD, state, valid_BT)
        dt_BTN = self._steps(x_BTD)
        if valid_BT is not None:  # a step of no length neither decays the state nor writes to it
            dt_BTN = jnp.where(valid_BT[..., None], dt_BTN, 0)
        y_BTNP, s_BNHP = self._retain(x, b, c, dt_BTN, initial_state=state.s_BNHP, output_final_state=True)
        return self._output(y_BTNP, x, x_BTD), SSDState(s_BNHP.astype(state.s_BNHP.dtype), *lasts)

    def step(self, x_BD, ctx, state, active_B=None):
        """The recurrent form: S = exp(-dt A) S + B^T (dt x), y = C S."""
        x_BTD, dtype = x_BD[:, None], state.s_BNHP.dtype
        (x, b, c), lasts = self._convolved(x_BTD, state, None if active_B is None else active_B[:, None])
        dt_BTN = self._steps(x_BTD)
        c_BNH, b_BNH, v_BNP = (a[:, 0].astype(dtype) for a in self._heads(x, b, c, dt_BTN))
        decay_BN = jnp.exp(self._log_decay(dt_BTN)[:, 0]).astype(dtype)
        s_BNHP = decay_BN[..., None, None] * state.s_BNHP + b_BNH[..., :, None] * v_BNP[..., None, :]
        if active_B is not None:
            s_BNHP = jnp.where(active_B[:, None, None, None], s_BNHP, state.s_BNHP)
        y_BNP = jnp.einsum("BNH,BNHP->BNP", c_BNH, s_BNHP)
        return self._output(y_BNP[:, None].astype(x_BD.dtype), x, x_BTD)[:, 0], SSDState(s_BNHP, *lasts)

    def _projected(self, x_BTD):
        """(convolution, its input) of x, B and C."""
        x_BTNP = shard(self._linear("BTD,DNP->BTNP", x_BTD, "x"), "batch", "seq", "act_heads", None)
        b_BTGH, c_BTGH = (shard(self._linear("BTD,DGH->BTGH", x_BTD, name), "batch", "seq", None, None) for name in "bc")
        return (self.conv_x, x_BTNP), (self.conv_b, b_BTGH), (self.conv_c, c_BTGH)

    def _convolved(self, x_BTD, state, valid_BT):
        """((x, B, C) behind the convolutions, the last inputs of each)."""
        lasts = (state.x_BwNP, state.b_BwGH, state.c_BwGH)
        mixed = [conv.prefill(a, last, valid_BT) for (conv, a), last in zip(self._projected(x_BTD), lasts)]
        return tuple(y for y, _ in mixed), tuple(last for _, last in mixed)

    def _steps(self, x_BTD):
        """dt, at least float32, [B, T, N]."""
        wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
        dt_BTN = jax.nn.softplus(self._linear("BTD,DN->BTN", x_BTD, "dt").astype(wide) + self.dt_bias[...].astype(wide))
        low, high = self.config.dt_min, self.config.dt_max
        return dt_BTN if low == 0 and high is None else jnp.clip(dt_BTN, low, high)

    def _log_decay(self, dt_BTN):
        return -dt_BTN * jnp.exp(self.a_log[...].astype(dt_BTN.dtype))

    def _heads(self, x_BTNP, b_BTGH, c_BTGH, dt_BTN):
        """(queries C, keys B, values dt x) of every head."""
        repeats = self.config.num_heads // self.config.groups
        c_BTNH, b_BTNH = (jnp.repeat(a, repeats, axis=2) for a in (c_BTGH, b_BTGH))
        return c_BTNH, b_BTNH, (x_BTNP * dt_BTN[..., None]).astype(x_BTNP.dtype)

    def _retain(self, x, b, c, dt_BTN, **states):
        q, k, v = self._heads(x, b, c, dt_BTN)
        options = {"chunk_size": self.config.chunk, "implementation": self.env.implementation}
        return ops.retention(q, k, v, self._log_decay(dt_BTN), scale=1.0, **options, **states)

    def _output(self, y_BTNP, x_BTNP, x_BTD):
        c, wide = self.config, jnp.promote_types(x_BTD.dtype, jnp.float32)
        y_BTNP = y_BTNP.astype(wide) + self.skip[...].astype(wide)[:, None] * x_BTNP.astype(wide)
        gate_BTNP = jax.nn.silu(self._linear("BTD,DNP->BTNP", x_BTD, "z").astype(wide))
        y_BTNP = y_BTNP * gate_BTNP if c.norm in ("gated", "none") else y_BTNP
        if c.norm != "none":
            grouped = y_BTNP.reshape(*y_BTNP.shape[:2], c.norm_groups, -1)
            normed = rms_normalise(grouped, c.norm_eps or self.env.norm_eps).reshape(y_BTNP.shape)
            y_BTNP = normed * self.norm_scale[...].astype(wide)
        y_BTNP = (y_BTNP * gate_BTNP if c.norm == "before_gate" else y_BTNP).astype(x_BTD.dtype)
        return shard(self._linear("BTNP,NPD->BTD", y_BTNP, "o"), "batch", "res_seq", "act_embed")

    def _linear(self, spec, x, name):
        y = dot(spec, x, getattr(self, "w" + name))
        return y + getattr(self, "b" + name)[...].astype(y.dtype) if self.config.bias else y

    @classmethod
    def cost(cls, config, env, seq_len, dtype_bytes=2):
        D, N, P, G, H = env.d_model, config.num_heads, _head_dim(config, env), config.groups, config.state_dim
        channels = N * P + 2 * G * H
        matrices, taps = D * (3 * N * P + 2 * G * H + N), config.conv_width * channels
        vectors = config.conv_bias * channels + 3 * N + (config.norm != "none") * N * P + config.bias * (channels + N * P + N + D)
        chunk = min(config.chunk or COST_CHUNK, seq_len)
        chunks, rest = divmod(seq_len, chunk)
        pairs = chunks * visible_pairs(chunk) + visible_pairs(rest)
        whole = -(-seq_len // chunk)
        state = 4 * N * H * P
        products = 2 * (matrices + taps) * seq_len
        return Cost(
            params=matrices + taps + vectors,
            flops=products + 2 * N * (H + P) * pairs + state * (seq_len - chunk),
            # Every pair, and the decays between them, which are sums over all tokens of the chunk; the first chunk reads zeros.
            dense_flops=products + 2 * N * whole * chunk**2 * (H + P + chunk) + state * (seq_len - chunk) + state // 2 * chunk,
            decode_flops=2 * (matrices + taps) + state + N * H * P,  # and the decay of every entry
            state_bytes=max(4, dtype_bytes) * N * H * P + (config.conv_width - 1) * channels * dtype_bytes,
        )


NORMS = ("gated", "before_gate", "none")


def _head_dim(config, env):
    return config.head_dim or 2 * env.d_model // config.num_heads

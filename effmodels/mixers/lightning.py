"""Lightning attention (arXiv:2401.04658; MiniMax-01, arXiv:2501.08313; Ring-linear, arXiv:2510.19338): linear attention with fixed decays.

MiniMax-Text-01: qkv_activation="silu", scale=1.0, rotary_fraction=0.0, norm_groups=1, layer_factor="minimax". Ring-linear-2.0 and
Ling-linear: the defaults with norm_groups=4 and, as their own code counts layers, layer_factor="ring".
Letters: B batch, T time, D model, N heads, H key dim, P value dim, G groups of heads, L layers.
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict

from effmodels.config import ConfigError, nearest
from effmodels.layers.linear import dot
from effmodels.layers.norms import RMSNorm, rms_normalise
from effmodels.layers.param import ones, param
from effmodels.layers.positions import rope, rope_scaling, rotate
from effmodels.mixers.base import Cost, TokenMixer, visible_pairs
from effmodels.mixers.retention import COST_CHUNK, RetentionState, projections
from effmodels.parallel import ops
from effmodels.parallel.axes import shard

# Slopes of N heads: head h decays by exp(-slope_h * layer factor) per token.
SLOPES = {
    # ALiBi (arXiv:2108.12409): 2^(-8 (h + 1) / N).
    "power": lambda n: 2.0 ** (-8.0 * np.arange(1, n + 1) / n),
    # ALiBi's own rule where N is no power of two: those of the power of two below, then every second one of twice as many.
    "alibi": lambda n: _alibi(n),
    # TransNormerLLM (arXiv:2307.14995): 8 h / N, the first head never forgets.
    "linear": lambda n: 8.0 * np.arange(n) / n,
}
# What layer l of L multiplies its slopes with. Later layers forget more slowly.
LAYER_FACTORS = {
    "none": lambda l, L: np.ones(L),
    "minimax": lambda l, L: 1 - l / (L - 1 + 1e-5) + 1e-5,
    "ring": lambda l, L: 1 - (l - 1) / max(L - 1, 1) + 1e-5,  # above 1 in layer 0
    "first_is_one": lambda l, L: 1 - l / max(L - 1, 1) + 1e-5,
    "linear": lambda l, L: 1 - l / L,
}


class Lightning(TokenMixer):
    """y = (sigmoid(x W_g) * groupnorm(o)) W_o with o_t = scale q_t S_t, S_t = exp(-slope) S_{t-1} + k_t^T v_t."""

    layouts = ("contiguous", "zigzag")

    @dataclasses.dataclass(frozen=True)
    class Config:
        num_heads: int = 4
        head_dim: int | None = None  # of queries and keys; None: d_model / num_heads
        value_dim: int | None = None  # per head; None: head_dim
        slopes: str | tuple = "power"  # one of SLOPES, or num_heads numbers >= 0
        layer_factor: str | tuple = "minimax"  # one of LAYER_FACTORS, or num_layers numbers >= 0
        qkv_activation: str = "none"  # "none" or "silu", before norm and rotation
        qk_norm: bool = True  # RMSNorm with a scale over each head of q and k
        rope_theta: float = 10_000.0
        rope_scaling: FrozenDict | None = None  # fields of `layers.positions.RopeScaling`, for rows longer than those of pre-training
        rotary_fraction: float = 0.5  # share of each head that rotates; 0: no positions
        scale: float | None = None  # None: head_dim^-1/2
        norm_groups: int | None = None  # groups of heads normalised together, with a scale per entry; None: every head alone; 0: no norm
        norm_eps: float | None = None  # of the group norm; None: the model's
        gate: bool = True
        chunk: int | None = None  # tokens per chunk of the chunkwise form; None: the kernel's choice

    @classmethod
    def fills(cls, config, max_len):
        return False

    @classmethod
    def check(cls, config, env):
        n = config.num_heads
        for field, least in (("num_heads", 1), ("head_dim", 1), ("value_dim", 1), ("chunk", 1), ("norm_groups", 0)):
            if getattr(config, field) is not None and getattr(config, field) < least:
                raise ConfigError(f"lightning: expected {field} >= {least}, got {field}={getattr(config, field)}.")
        if config.head_dim is None and env.d_model % n:
            valid = [i for i in range(1, env.d_model + 1) if env.d_model % i == 0 and env.d_model // i >= 8]
            raise ConfigError(f"lightning: d_model={env.d_model} is not divisible by num_heads={n}; valid: {valid}, or set head_dim.")
        if config.norm_groups and n % config.norm_groups:
            valid = [i for i in range(1, n + 1) if n % i == 0]
            raise ConfigError(f"lightning: num_heads={n} is not divisible by norm_groups={config.norm_groups}; valid: {valid}.")
        if not 0 <= config.rotary_fraction <= 1:
            raise ConfigError(f"lightning: expected 0 <= rotary_fraction <= 1, got {config.rotary_fraction}.")
        if config.rope_scaling is not None:
            rope_scaling(config.rope_scaling, "lightning.rope_scaling")
        if config.qkv_activation not in ("none", "silu"):
            raise ConfigError(f"lightning.qkv_activation: expected 'none' or 'silu', got {config.qkv_activation!r}.")
        decay_rates(config, env.num_layers)

    def __init__(self, config, env, *, rngs):
        self.config, self.env = config, env
        N, (H, P) = config.num_heads, _dims(config, env)
        for name, w in projections(config, env, H, P, rngs=rngs).items():
            setattr(self, name, w)
        if config.qk_norm:
            norm = functools.partial(RMSNorm, rngs=rngs, eps=env.norm_eps, offset=env.norm_offset, param_dtype=env.param_dtype)
            self.q_norm, self.k_norm = norm(H), norm(H)
        if config.norm_groups != 0:
            self.group_norm_scale = param(ones, rngs.params(), (N, P), ("heads", "value_dim"), in_dims=(), dtype=env.param_dtype)

    def __call__(self, x_BTD, ctx):
        q, k, v = self._project(x_BTD, ctx)
        return self._output(self._retain(q, k, v, ctx, segment_ids=ctx.segment_ids_BT), x_BTD)

    def init_state(self, batch, max_len, dtype):
        H, P = _dims(self.config, self.env)
        # NOTE: float32 (float64 in double precision) even in bfloat16 models: the state sums thousands of tokens.
        return RetentionState(jnp.zeros((batch, self.config.num_heads, H, P), jnp.promote_types(dtype, jnp.float32)))

    def prefill(self, x_BTD, ctx, state, valid_BT=None):
        q, k, v = self._project(x_BTD, ctx)
        segment_ids = None if valid_BT is None else valid_BT.astype(jnp.int32)  # tokens of segment 0 neither decay nor write
        y, s = self._retain(q, k, v, ctx, segment_ids=segment_ids, initial_state=state.s_BNHP, output_final_state=True)
        return self._output(y, x_BTD), RetentionState(s.astype(state.s_BNHP.dtype))

    def step(self, x_BD, ctx, state, active_B=None):
        """The recurrent form: S = exp(-slope) S + k^T v, y = scale q S."""
        dtype, x_BTD = state.s_BNHP.dtype, x_BD[:, None]
        q, k, v = (a[:, 0].astype(dtype) for a in self._project(x_BTD, ctx))
        decay_N = jnp.exp(self._log_decay(ctx, dtype))
        s_BNHP = decay_N[:, None, None] * state.s_BNHP + k[..., :, None] * v[..., None, :]
        if active_B is not None:
            s_BNHP = jnp.where(active_B[:, None, None, None], s_BNHP, state.s_BNHP)
        y_BNP = jnp.einsum("BNH,BNHP->BNP", q * self._scale(), s_BNHP)
        return self._output(y_BNP[:, None].astype(x_BD.dtype), x_BTD)[:, 0], RetentionState(s_BNHP)

    def _project(self, x_BTD, ctx):
        c = self.config
        q_BTNH, k_BTNH, v_BTNP = (dot("BTD,DNH->BTNH", x_BTD, w) for w in (self.wq, self.wk, self.wv))
        if c.qkv_activation == "silu":
            q_BTNH, k_BTNH, v_BTNP = jax.nn.silu(q_BTNH), jax.nn.silu(k_BTNH), jax.nn.silu(v_BTNP)
        q_BTNH, v_BTNP = shard(q_BTNH, "batch", "seq", "act_heads", None), shard(v_BTNP, "batch", "seq", "act_heads", None)
        # Rounded once, after norm and rotation.
        q_BTNH, k_BTNH = (a.astype(jnp.promote_types(a.dtype, jnp.float32)) for a in (q_BTNH, k_BTNH))
        if c.qk_norm:
            q_BTNH, k_BTNH = self.q_norm(q_BTNH), self.k_norm(k_BTNH)
        frequencies, magnitude = rope(2 * int(q_BTNH.shape[-1] * c.rotary_fraction / 2), c.rope_theta, c.rope_scaling)
        positions_BT = ctx.rotary_positions(*x_BTD.shape[:2])
        q_BTNH, k_BTNH = (rotate(a, positions_BT, frequencies, magnitude=magnitude).astype(x_BTD.dtype) for a in (q_BTNH, k_BTNH))
        return q_BTNH, k_BTNH, v_BTNP

    def _retain(self, q, k, v, ctx, **options):
        log_decay_N = self._log_decay(ctx, jnp.promote_types(q.dtype, jnp.float32))
        return ops.retention(
            q, k, v, log_decay_N, scale=self._scale(), chunk_size=self.config.chunk, implementation=self.env.implementation, **options
        )

    def _log_decay(self, ctx, dtype):
        """-slope of this layer's heads, [N]. A table of all layers, since the layer is traced where layers are scanned."""
        return -jnp.asarray(decay_rates(self.config, self.env.num_layers), dtype)[ctx.layer]

    def _scale(self):
        return _dims(self.config, self.env)[0] ** -0.5 if self.config.scale is None else self.config.scale

    def _output(self, y_BTNP, x_BTD):
        c = self.config
        y_BTNP = y_BTNP.astype(jnp.promote_types(x_BTD.dtype, jnp.float32))
        if c.norm_groups != 0:
            eps = self.env.norm_eps if c.norm_eps is None else c.norm_eps
            grouped = y_BTNP.reshape(*y_BTNP.shape[:2], c.norm_groups or c.num_heads, -1)
            y_BTNP = rms_normalise(grouped, eps).reshape(y_BTNP.shape) * self.group_norm_scale[...].astype(y_BTNP.dtype)
        if c.gate:
            y_BTNP = y_BTNP * jax.nn.sigmoid(dot("BTD,DNP->BTNP", x_BTD, self.wg).astype(y_BTNP.dtype))
        y_BTNP = y_BTNP.astype(x_BTD.dtype)
        return shard(dot("BTNP,NPD->BTD", y_BTNP, self.wo), "batch", "res_seq", "act_embed")

    @classmethod
    def cost(cls, config, env, seq_len, dtype_bytes=2):
        D, N, (H, P) = env.d_model, config.num_heads, _dims(config, env)
        matrices = D * N * (2 * H + P * (3 if config.gate else 2))
        vectors = 2 * H * config.qk_norm + N * P * (config.norm_groups != 0)
        projections, chunk = 2 * matrices * seq_len, min(config.chunk or COST_CHUNK, seq_len)
        # Chunkwise: pairs inside a chunk; the state is read by all but the first chunk and written by all but the last.
        chunks, rest = divmod(seq_len, chunk)
        pairs = chunks * visible_pairs(chunk) + visible_pairs(rest)
        squares = -(-seq_len // chunk) * chunk**2
        state = 4 * N * H * P * (seq_len - chunk)
        return Cost(
            params=matrices + vectors,
            flops=projections + 2 * N * (H + P) * pairs + state,
            dense_flops=projections + 2 * N * (H + P) * squares + state + 2 * N * H * P * chunk,  # the first chunk reads zeros
            decode_flops=2 * matrices + 4 * N * H * P,
            state_bytes=max(4, dtype_bytes) * N * H * P,
        )


def decay_rates(config, num_layers):
    """-log of the decay of every layer and head, float64 numpy [L, N]; raises ConfigError for unknown names or negative rates."""
    slopes_N = _numbers("slopes", config.slopes, SLOPES, config.num_heads, lambda f: f(config.num_heads))
    layer_L = np.arange(num_layers, dtype=np.float64)
    factors_L = _numbers("layer_factor", config.layer_factor, LAYER_FACTORS, num_layers, lambda f: f(layer_L, num_layers))
    return factors_L[:, None] * slopes_N


def _numbers(field, given, table, count, made):
    if isinstance(given, str):
        if given not in table:
            raise ConfigError(f"lightning.{field}: unknown {given!r}.{nearest(given, table)}")
        return np.asarray(made(table[given]), np.float64)
    values = np.asarray(given, np.float64)
    if values.shape != (count,) or not np.all(values >= 0):
        raise ConfigError(f"lightning.{field}: expected {count} numbers >= 0, got {given!r}.")
    return values


def _alibi(n):
    below = 2 ** int(np.log2(n))
    return np.concatenate([SLOPES["power"](below), SLOPES["power"](2 * below)[::2][: n - below]])


def _dims(config, env):
    head_dim = config.head_dim or env.d_model // config.num_heads
    return head_dim, config.value_dim or head_dim

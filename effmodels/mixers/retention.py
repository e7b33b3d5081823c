"""Retention (RetNet, arXiv:2307.08621): linear attention with a fixed decay per head; parallel and chunkwise to train, recurrent to decode.

The forms agree before the head norm, so they agree after it at any eps: nothing rescales q, k or the scores by form. torchscale's chunkwise
form divides by another factor than its parallel form, which a head norm with eps > 0 does not undo.
Letters: B batch, T time, D model, N heads, H key dim, P value dim.
"""
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from effmodels.config import ConfigError
from effmodels.layers.linear import dot
from effmodels.layers.norms import rms_normalise
from effmodels.layers.param import ones, param
from effmodels.layers.positions import halves, retnet_frequencies, rope_frequencies, rotate
from effmodels.mixers.base import Cost, TokenMixer, visible_pairs
from effmodels.parallel import ops
from effmodels.parallel.axes import shard


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RetentionState:
    """The sum of decayed key-value products, float32 whatever the compute dtype; its size does not depend on the length."""

    s_BNHP: Any

    DIMS = {"s_BNHP": ("batch", "act_heads", None, None)}


class Retention(TokenMixer):
    """y = (swish(x W_g) * headnorm(retention(q, k, v))) W_o, equation 8 of the paper."""

    layouts = ("contiguous", "zigzag")  # states pass through the two stretches of a zigzag shard, not through a stripe's single tokens

    @dataclasses.dataclass(frozen=True)
    class Config:
        num_heads: int = 4
        head_dim: int | None = None  # of queries and keys; None: d_model / num_heads
        value_dim: int | None = None  # per head; None: twice head_dim, as in the paper
        decay: str | tuple = "torchscale"  # a schedule of DECAYS, or num_heads values of gamma
        rope_theta: float = 10_000.0
        rotary: str = "retnet"  # pairs (2i, 2i + 1) at the paper's frequencies, or "rope": pairs (i, i + half) at RoPE's, as in fla
        gate: bool = True
        decay_norm: bool = False  # over sqrt(sum of the row's decays), as torchscale; the head norm undoes it but for its eps
        head_norm: bool = True
        head_norm_eps: float = 1e-6
        head_norm_scale: bool = False  # a learned scale after it, the same for all heads
        chunk: int | None = None  # tokens per chunk of the chunkwise form; None: the kernel's choice

    @classmethod
    def fills(cls, config, max_len):
        return False

    @classmethod
    def check(cls, config, env):
        n = config.num_heads
        for field in ("num_heads", "head_dim", "value_dim", "chunk"):
            if getattr(config, field) is not None and getattr(config, field) < 1:
                raise ConfigError(f"retention: expected {field} >= 1, got {field}={getattr(config, field)}.")
        if config.head_dim is None and env.d_model % n:
            valid = [i for i in range(1, env.d_model + 1) if env.d_model % i == 0 and env.d_model // i >= 8]
            raise ConfigError(f"retention: d_model={env.d_model} is not divisible by num_heads={n}; valid: {valid}, or set head_dim.")
        if _dims(config, env)[0] % 2:
            raise ConfigError(f"retention: head_dim={_dims(config, env)[0]} must be even, its entries rotate in pairs.")
        if config.rotary not in ("retnet", "rope"):
            raise ConfigError(f"retention.rotary: expected 'retnet' or 'rope', got {config.rotary!r}.")
        log_decays(config)

    def __init__(self, config, env, *, rngs):
        self.config, self.env = config, env
        H, P = _dims(config, env)
        for name, w in projections(config, env, H, P, rngs=rngs).items():
            setattr(self, name, w)
        if config.head_norm_scale:
            self.head_norm_scale = param(ones, rngs.params(), (P,), ("value_dim",), in_dims=(), dtype=env.param_dtype)

    def __call__(self, x_BTD, ctx):
        return self._output(self.retain(x_BTD, ctx), x_BTD, ctx)

    def retain(self, x_BTD, ctx):
        """The retention itself, before head norm and gate: [B, T, N, P]."""
        q, k, v = self._project(x_BTD, ctx)
        return ops.retention(
            q, k, v, self.log_decay(x_BTD), segment_ids=ctx.segment_ids_BT, scale=1.0,
            chunk_size=self.config.chunk, implementation=self._kernel(),
        )  # fmt: skip

    def log_decay(self, x_BTD):
        """log(gamma) <= 0, at least float32: [N], or [B, T, N] in a subclass whose decay depends on the token."""
        return jnp.asarray(log_decays(self.config), jnp.promote_types(x_BTD.dtype, jnp.float32))

    def init_state(self, batch, max_len, dtype):
        H, P = _dims(self.config, self.env)
        # NOTE: float32 (float64 in double precision) even in bfloat16 models: the state sums thousands of tokens.
        return RetentionState(jnp.zeros((batch, self.config.num_heads, H, P), jnp.promote_types(dtype, jnp.float32)))

    def prefill(self, x_BTD, ctx, state, valid_BT=None):
        q, k, v = self._project(x_BTD, ctx)
        log_decay = self.log_decay(x_BTD).astype(state.s_BNHP.dtype)
        if valid_BT is not None:  # an invalid token neither decays the state nor writes to it
            k = jnp.where(valid_BT[..., None, None], k, 0)
            log_decay = jnp.where(valid_BT[..., None], log_decay, 0)
        y, s = ops.retention(
            q, k, v, log_decay, initial_state=state.s_BNHP, output_final_state=True, scale=1.0,
            chunk_size=self.config.chunk, implementation=self._kernel(),
        )  # fmt: skip
        return self._output(y, x_BTD, ctx), RetentionState(s.astype(state.s_BNHP.dtype))

    def step(self, x_BD, ctx, state, active_B=None):
        """The recurrent form, equation 6: S = gamma S + k^T v, y = q S."""
        x_BTD = x_BD[:, None]
        q, k, v = (a[:, 0].astype(state.s_BNHP.dtype) for a in self._project(x_BTD, ctx))
        log_decay = self.log_decay(x_BTD).astype(state.s_BNHP.dtype)
        gamma = jnp.exp(log_decay if log_decay.ndim == 1 else log_decay[:, 0])
        s_BNHP = gamma[..., None, None] * state.s_BNHP + k[..., :, None] * v[..., None, :]
        if active_B is not None:
            s_BNHP = jnp.where(active_B[:, None, None, None], s_BNHP, state.s_BNHP)
        y_BNP = jnp.einsum("BNH,BNHP->BNP", q, s_BNHP)
        return self._output(y_BNP[:, None].astype(x_BD.dtype), x_BTD, ctx)[:, 0], RetentionState(s_BNHP)

    def _project(self, x_BTD, ctx):
        # RetNet rotates the pairs (2i, 2i + 1). Queries and keys in another order of the pairs have the same products.
        retnet = self.config.rotary == "retnet"
        q, k = (dot("BTD,DNH->BTNH", x_BTD, w, arrange=halves if retnet else None) for w in (self.wq, self.wk))
        v = dot("BTD,DNP->BTNP", x_BTD, self.wv)
        q, v = shard(q, "batch", "seq", "act_heads", None), shard(v, "batch", "seq", "act_heads", None)
        frequencies = (retnet_frequencies if retnet else rope_frequencies)(q.shape[-1], self.config.rope_theta)
        positions_BT = ctx.rotary_positions(*x_BTD.shape[:2])
        k = k * k.shape[-1] ** -0.5  # torchscale scales the keys
        # Named again: what the backward pass needs is what the kernel reads.
        q, k = (checkpoint_name(rotate(a, positions_BT, frequencies), "heads") for a in (q, k))
        return q, k, v

    def _output(self, y_BTNP, x_BTD, ctx):
        if self.config.decay_norm:
            y_BTNP = (y_BTNP * self._decay_norm(x_BTD, ctx)).astype(y_BTNP.dtype)
        if self.config.head_norm:
            y_BTNP = rms_normalise(y_BTNP, self.config.head_norm_eps)
        if self.config.head_norm_scale:
            y_BTNP = y_BTNP * self.head_norm_scale[...].astype(y_BTNP.dtype)
        if self.config.gate:
            y_BTNP = y_BTNP * jax.nn.silu(dot("BTD,DNP->BTNP", x_BTD, self.wg))
        return shard(dot("BTNP,NPD->BTD", y_BTNP, self.wo), "batch", "res_seq", "act_embed")

    def _decay_norm(self, x_BTD, ctx):
        """(sum over m <= position of gamma^m)^-1/2, [B, T, N, 1]."""
        log_gamma_N = self.log_decay(x_BTD)
        tokens_BT1 = _position_in_document(ctx, x_BTD.shape[:2])[..., None].astype(log_gamma_N.dtype) + 1
        return jnp.sqrt(jnp.expm1(log_gamma_N) / jnp.expm1(log_gamma_N * tokens_BT1))[..., None]

    def _kernel(self):
        return self.env.implementation

    @classmethod
    def cost(cls, config, env, seq_len, dtype_bytes=2):
        D, N, (H, P) = env.d_model, config.num_heads, _dims(config, env)
        params = D * N * (2 * H + P * (3 if config.gate else 2))
        projections, chunk = 2 * params * seq_len, min(config.chunk or COST_CHUNK, seq_len)
        # Chunkwise: pairs inside a chunk; the state is read by all but the first chunk and written by all but the last.
        chunks, rest = divmod(seq_len, chunk)
        pairs = chunks * visible_pairs(chunk) + visible_pairs(rest)
        squares = -(-seq_len // chunk) * chunk**2
        state = 4 * N * H * P * (seq_len - chunk)
        return Cost(
            params=params + P * config.head_norm_scale,
            flops=projections + 2 * N * (H + P) * pairs + state,
            dense_flops=projections + 2 * N * (H + P) * squares + state + 2 * N * H * P * chunk,  # the first chunk reads zeros
            decode_flops=2 * params + 4 * N * H * P,
            state_bytes=max(4, dtype_bytes) * N * H * P,
        )


COST_CHUNK = 64  # tokens per chunk that FLOP counts assume where the config leaves the choice to the kernel
DECAYS = {
    # torchscale: gamma_h = 1 - 2^(-5 - h).
    "torchscale": lambda n: 1.0 - 2.0 ** (-5.0 - np.arange(n)),
    # The paper's experiments: gamma = 1 - exp(linspace(log 1/32, log 1/512, N)).
    "paper": lambda n: 1.0 - np.exp(np.linspace(np.log(1 / 32), np.log(1 / 512), n)),
}


def log_decays(config):
    """log(gamma) of every head, float64 numpy [N]; raises ConfigError for an unknown schedule or values outside (0, 1]."""
    if isinstance(config.decay, str):
        if config.decay not in DECAYS:
            raise ConfigError(f"retention.decay: unknown schedule {config.decay!r}; expected {sorted(DECAYS)} or a tuple of numbers.")
        gammas = DECAYS[config.decay](config.num_heads)
    else:
        gammas = np.asarray(config.decay, np.float64)
    if gammas.shape != (config.num_heads,) or not np.all((gammas > 0) & (gammas <= 1)):
        raise ConfigError(f"retention.decay: expected {config.num_heads} numbers in (0, 1], got {config.decay!r}.")
    return np.log(gammas)


def _position_in_document(ctx, shape):
    """positions_BT where given, else the number of tokens before in the same run of equal segment ids."""
    if ctx.positions_BT is not None or ctx.segment_ids_BT is None:
        return ctx.rotary_positions(*shape)
    if ctx.layout != "contiguous":
        raise ConfigError(f"retention.decay_norm: packed rows in the layout {ctx.layout!r} need positions_BT.")
    t_BT, ids_BT = jnp.broadcast_to(jnp.arange(shape[1]), shape), ctx.segment_ids_BT
    begins_BT = jnp.pad(ids_BT[:, 1:] != ids_BT[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return t_BT - jax.lax.cummax(jnp.where(begins_BT, t_BT, 0), axis=1)


def projections(config, env, H, P, *, rngs):
    """{name: Param} of a mixer with a state [H, P] per head: wq, wk, wv, wg if config.gate, wo."""
    D, N = env.d_model, config.num_heads
    make = functools.partial(param, jax.random.normal, dtype=env.param_dtype)
    sizes = {"wq": H, "wk": H, "wv": P} | ({"wg": P} if config.gate else {})
    found = {
        name: make(rngs.params(), (D, N, size), ("embed", "heads", "head_dim" if name in ("wq", "wk") else "value_dim"), in_dims=("embed",))
        for name, size in sizes.items()
    }
    return found | {"wo": make(rngs.params(), (N, P, D), ("heads", "value_dim", "embed"), in_dims=("heads", "value_dim"))}


def _dims(config, env):
    head_dim = config.head_dim or env.d_model // config.num_heads
    return head_dim, config.value_dim or 2 * head_dim

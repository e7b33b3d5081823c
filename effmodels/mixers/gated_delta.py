"""Gated DeltaNet (arXiv:2412.06464): a state that forgets by a gate and replaces the old value of a key instead of adding to it.

Letters: B batch, T time, D model, K key heads, N value heads (a multiple of K), H key dim, P value dim, w inputs before a convolution.
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
from effmodels.layers.param import ones, param
from effmodels.mixers.base import Cost, TokenMixer, visible_pairs
from effmodels.parallel import delta
from effmodels.parallel.axes import shard

COST_CHUNK = 64  # tokens per chunk that FLOP counts assume where the config leaves the choice to the kernel
L2_EPS = 1e-6


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GatedDeltaState:
    """The state, float32 whatever the compute dtype, and the last inputs of the convolutions; their sizes do not depend on the length."""

    s_BNHP: Any
    q_BwKH: Any
    k_BwKH: Any
    v_BwNP: Any

    DIMS = {
        "s_BNHP": ("batch", "act_heads", None, None), "q_BwKH": ("batch", None, "act_kv_heads", None),
        "k_BwKH": ("batch", None, "act_kv_heads", None), "v_BwNP": ("batch", None, "act_heads", None),
    }  # fmt: skip


class GatedDelta(TokenMixer):
    """y = (rmsnorm(delta(q, k, v)) * swish(x W_z)) W_o with q, k, v = swish(conv(x W)), q and k of length one (section 3.4).

    log decay = -exp(A_log) softplus(x W_a + dt_bias), beta = sigmoid(x W_b), per value head. Value head n reads key head n K / N.
    """

    layouts = ("contiguous", "zigzag")

    @dataclasses.dataclass(frozen=True)
    class Config:
        num_heads: int = 4  # of queries and keys
        num_value_heads: int | None = None  # None: num_heads
        head_dim: int = 128  # of queries and keys
        value_dim: int | None = None  # per value head; None: twice head_dim times num_heads / num_value_heads, as in the paper
        conv_width: int = 4
        norm_eps: float | None = None  # of the norm before the gate; None: the model's
        chunk: int | None = None  # tokens per chunk, a power of two; None: the kernel's choice

    @classmethod
    def fills(cls, config, max_len):
        return False

    @classmethod
    def check(cls, config, env):
        n, v = config.num_heads, config.num_value_heads
        for field in ("num_heads", "num_value_heads", "head_dim", "value_dim", "conv_width", "chunk"):
            if getattr(config, field) is not None and getattr(config, field) < 1:
                raise ConfigError(f"gated_delta: expected {field} >= 1, got {field}={getattr(config, field)}.")
        if v is not None and v % n:
            raise ConfigError(f"gated_delta: num_value_heads={v} is not a multiple of num_heads={n}; a key head serves as many as another.")
        if config.chunk is not None and config.chunk & (config.chunk - 1):
            raise ConfigError(f"gated_delta: expected chunk to be a power of two or None, got {config.chunk}.")

    def __init__(self, config, env, *, rngs):
        self.config, self.env = config, env
        D, (K, N, H, P) = env.d_model, _dims(config)
        make = functools.partial(param, jax.random.normal, dtype=env.param_dtype)
        self.wq = make(rngs.params(), (D, K, H), ("embed", "kv_heads", "head_dim"), in_dims=("embed",))
        self.wk = make(rngs.params(), (D, K, H), ("embed", "kv_heads", "head_dim"), in_dims=("embed",))
        self.wv = make(rngs.params(), (D, N, P), ("embed", "heads", "value_dim"), in_dims=("embed",))
        self.wz = make(rngs.params(), (D, N, P), ("embed", "heads", "value_dim"), in_dims=("embed",))
        self.wa = make(rngs.params(), (D, N), ("embed", "heads"), in_dims=("embed",))
        self.wb = make(rngs.params(), (D, N), ("embed", "heads"), in_dims=("embed",))
        self.wo = make(rngs.params(), (N, P, D), ("heads", "value_dim", "embed"), in_dims=("heads", "value_dim"))
        conv = functools.partial(ShortConvolution, rngs=rngs, width=config.conv_width, param_dtype=env.param_dtype)
        self.conv_q = conv((K, H), ("kv_heads", "head_dim"), ("act_kv_heads", None))
        self.conv_k = conv((K, H), ("kv_heads", "head_dim"), ("act_kv_heads", None))
        self.conv_v = conv((N, P), ("heads", "value_dim"), ("act_heads", None))
        self.a_log = param(log_rates, rngs.params(), (N,), ("heads",), in_dims=(), dtype=env.param_dtype)
        self.dt_bias = param(step_biases, rngs.params(), (N,), ("heads",), in_dims=(), dtype=env.param_dtype)
        self.norm_scale = param(ones, rngs.params(), (P,), ("norm",), in_dims=(), dtype=env.param_dtype)

    def __call__(self, x_BTD, ctx):
        q, k, v = (conv(x, ctx.segment_ids_BT) for conv, x in self._projected(x_BTD))
        y_BTNP = self._delta(x_BTD, q, k, v, *self._gates(x_BTD), segment_ids=ctx.segment_ids_BT)
        return self._output(y_BTNP, x_BTD)

    def init_state(self, batch, max_len, dtype):
        _, N, H, P = _dims(self.config)
        # NOTE: float32 (float64 in double precision) even in bfloat16 models: the state sums thousands of tokens.
        s_BNHP = jnp.zeros((batch, N, H, P), jnp.promote_types(dtype, jnp.float32))
        return GatedDeltaState(s_BNHP, *(conv.init_state(batch, dtype) for conv in (self.conv_q, self.conv_k, self.conv_v)))

    def prefill(self, x_BTD, ctx, state, valid_BT=None):
        lasts = (state.q_BwKH, state.k_BwKH, state.v_BwNP)
        (q, q_last), (k, k_last), (v, v_last) = (
            conv.prefill(x, last, valid_BT) for (conv, x), last in zip(self._projected(x_BTD), lasts)
        )
        log_decay, beta = self._gates(x_BTD)
        if valid_BT is not None:  # an invalid token neither decays the state nor writes to it
            log_decay, beta = (jnp.where(valid_BT[..., None], a, 0) for a in (log_decay, beta))
        y_BTNP, s_BNHP = self._delta(x_BTD, q, k, v, log_decay, beta, initial_state=state.s_BNHP, output_final_state=True)
        return self._output(y_BTNP, x_BTD), GatedDeltaState(s_BNHP.astype(state.s_BNHP.dtype), q_last, k_last, v_last)

    def step(self, x_BD, ctx, state, active_B=None):
        """The recurrent form: S' = a S, S = S' + beta k^T (v - k S'), y = q S / sqrt(H)."""
        x_BTD, dtype = x_BD[:, None], state.s_BNHP.dtype
        lasts, valid_BT = (state.q_BwKH, state.k_BwKH, state.v_BwNP), None if active_B is None else active_B[:, None]
        mixed = [conv.prefill(x, last, valid_BT) for (conv, x), last in zip(self._projected(x_BTD), lasts)]
        q, k, v = (a[:, 0].astype(dtype) for a in self._heads(*(y for y, _ in mixed)))
        log_decay_BN, beta_BN = (a[:, 0].astype(dtype) for a in self._gates(x_BTD))
        decay_BN1 = jnp.exp(log_decay_BN)[..., None]
        change_BNP = beta_BN[..., None] * (v - decay_BN1 * jnp.einsum("BNH,BNHP->BNP", k, state.s_BNHP))
        s_BNHP = decay_BN1[..., None] * state.s_BNHP + k[..., :, None] * change_BNP[..., None, :]
        if active_B is not None:
            s_BNHP = jnp.where(active_B[:, None, None, None], s_BNHP, state.s_BNHP)
        y_BNP = q.shape[-1] ** -0.5 * jnp.einsum("BNH,BNHP->BNP", q, s_BNHP)
        y_BTD = self._output(y_BNP[:, None].astype(x_BD.dtype), x_BTD)
        return y_BTD[:, 0], GatedDeltaState(s_BNHP, *(last for _, last in mixed))

    def _projected(self, x_BTD):
        """(convolution, its input) of q, k and v."""
        q_BTKH, k_BTKH = (shard(dot("BTD,DKH->BTKH", x_BTD, w), "batch", "seq", "act_kv_heads", None) for w in (self.wq, self.wk))
        v_BTNP = shard(dot("BTD,DNP->BTNP", x_BTD, self.wv), "batch", "seq", "act_heads", None)
        return (self.conv_q, q_BTKH), (self.conv_k, k_BTKH), (self.conv_v, v_BTNP)

    def _heads(self, q_BTKH, k_BTKH, v_BTNP):
        """q, k, v of every value head, from what the convolutions return."""
        groups = v_BTNP.shape[2] // q_BTKH.shape[2]
        return *(jnp.repeat(_unit(a), groups, axis=2) for a in (q_BTKH, k_BTKH)), v_BTNP

    def _gates(self, x_BTD):
        """(log decay <= 0, beta), both at least float32, [B, T, N]."""
        wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
        a_BTN, b_BTN = (dot("BTD,DN->BTN", x_BTD, w).astype(wide) for w in (self.wa, self.wb))
        rate_N = jnp.exp(self.a_log[...].astype(wide))
        return -rate_N * jax.nn.softplus(a_BTN + self.dt_bias[...].astype(wide)), jax.nn.sigmoid(b_BTN)

    def _delta(self, x_BTD, q, k, v, log_decay, beta, **states):
        return delta.gated_delta(
            *self._heads(q, k, v), log_decay, beta, chunk_size=self.config.chunk, implementation=self.env.implementation, **states
        )

    def _output(self, y_BTNP, x_BTD):
        eps, wide = self.config.norm_eps or self.env.norm_eps, jnp.promote_types(x_BTD.dtype, jnp.float32)
        normed_BTNP = rms_normalise(y_BTNP.astype(wide), eps) * self.norm_scale[...].astype(wide)
        y_BTNP = (normed_BTNP * jax.nn.silu(dot("BTD,DNP->BTNP", x_BTD, self.wz).astype(wide))).astype(x_BTD.dtype)
        return shard(dot("BTNP,NPD->BTD", y_BTNP, self.wo), "batch", "res_seq", "act_embed")

    @classmethod
    def cost(cls, config, env, seq_len, dtype_bytes=2):
        D, (K, N, H, P) = env.d_model, _dims(config)
        channels = 2 * K * H + N * P
        matrices, taps = 2 * D * (K * H + N) + 3 * D * N * P, config.conv_width * channels
        C = min(config.chunk or COST_CHUNK, 1 << (seq_len - 1).bit_length())
        chunks, rest = divmod(seq_len, C)
        pairs = chunks * visible_pairs(C) + visible_pairs(rest)
        whole = -(-seq_len // C)
        # Of every pair: q k, k k, both sides of the triangular system, and its solution read; then the inverse of n^3 / 3 products.
        per_pair, inverse = 2 * N * (3 * H + 2 * P), lambda n: 2 * N * n * (n * n - 1) / 3
        state = 2 * N * H * P  # one product with the state: two read it, one writes it
        products = 2 * (matrices + taps) * seq_len
        return Cost(
            params=matrices + taps + 2 * N + P,
            flops=products + per_pair * pairs + chunks * inverse(C) + inverse(rest) + 3 * state * max(0, seq_len - C),
            # Every pair, and the decays between them, which are sums over all tokens of the chunk. The first chunk reads zeros, and
            # nobody reads what the last one writes.
            dense_flops=products + whole * (per_pair * C**2 + inverse(C) + 2 * N * C**3 + 2 * state * C) + state * (whole - 1) * C,
            decode_flops=2 * (matrices + taps) + 3 * state + N * H * P,  # and the decay of every entry
            state_bytes=max(4, dtype_bytes) * N * H * P + (config.conv_width - 1) * channels * dtype_bytes,
        )


def _dims(config):
    """(key heads, value heads, key dim, value dim)."""
    K, H = config.num_heads, config.head_dim
    N = config.num_value_heads or K
    return K, N, H, config.value_dim or max(1, 2 * H * K // N)


def _unit(x):
    """x / |x| over the last dim, computed in float32 (float64 stays), returned in x's dtype."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (wide * jax.lax.rsqrt(jnp.sum(wide * wide, axis=-1, keepdims=True) + L2_EPS)).astype(x.dtype)

"""Softmax attention: multi-head, grouped or multi-query, rotary, with optional window, QK-norm, soft cap and sinks.

Letters: B batch, T time, S cache slots, D model, N heads, K kv heads, H head dim.
"""
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from jax.ad_checkpoint import checkpoint_name

from effmodels.config import ConfigError
from effmodels.layers.linear import dot
from effmodels.layers.norms import RMSNorm
from effmodels.layers.param import param, zeros
from effmodels.layers.positions import rope, rope_scaling, rotate
from effmodels.mixers.base import Cost, TokenMixer, all_valid, visible_pairs
from effmodels.mixers.caches import Slots, put, whole
from effmodels.parallel import ops
from effmodels.parallel.axes import shard


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache(Slots):
    """Keys, values and the order index of each slot (-1: empty); a window keeps a ring of window + 1 slots."""

    k_BSKH: Any
    v_BSKH: Any
    index_BS: Any

    DIMS = {"k_BSKH": ("batch", None, "act_kv_heads", None), "v_BSKH": ("batch", None, "act_kv_heads", None), "index_BS": ("batch", None)}


class Attention(TokenMixer):
    """y = softmax(q k^T / sqrt(H)) v W_o (arXiv:1706.03762), GQA (arXiv:2305.13245), RoPE (arXiv:2104.09864)."""

    layouts = ("contiguous", "zigzag", "striped")

    @dataclasses.dataclass(frozen=True)
    class Config:
        num_heads: int = 8
        num_kv_heads: int | None = None  # None: as many as heads; 1: multi-query
        head_dim: int | None = None  # None: d_model / num_heads
        rope_theta: float = 10_000.0
        rope_scaling: FrozenDict | None = None  # fields of `layers.positions.RopeScaling`, for rows longer than those of pre-training
        rotary_fraction: float = 1.0  # share of each head that rotates; 0: no positions
        qk_norm: bool = False
        qk_norm_whole: bool = False  # the norms run over all heads together (OLMoE) instead of over each
        window: int | None = None  # keys before the query, besides itself; None: all
        soft_cap: float | None = None
        sinks: bool = False  # one learned logit per head joins the softmax's denominator
        bias: bool = False  # of queries, keys, values and the gate
        out_bias: bool = False
        output_gate: bool = False  # what the heads return times sigmoid(x W_g), entry by entry (arXiv:2505.06708)
        scale: float | None = None  # None: head_dim^-1/2 (muP: 1/head_dim, tuned at the base width)

    @classmethod
    def fills(cls, config, max_len):
        return config.window is None or max_len <= config.window

    @classmethod
    def rolls_back(cls, config):
        return config.window is None  # a ring's slots have lost what they held before

    @classmethod
    def check(cls, config, env):
        n, k = config.num_heads, config.num_kv_heads
        if n < 1 or (config.head_dim is not None and config.head_dim < 1):
            raise ConfigError(f"attention: expected num_heads and head_dim of at least 1, got num_heads={n}, head_dim={config.head_dim}.")
        if config.head_dim is None and env.d_model % n:
            valid = [i for i in range(1, env.d_model + 1) if env.d_model % i == 0 and env.d_model // i >= 8]
            raise ConfigError(f"attention: d_model={env.d_model} is not divisible by num_heads={n}; valid: {valid}, or set head_dim.")
        if k is not None and (k < 1 or n % k):
            valid = [i for i in range(1, n + 1) if n % i == 0]
            raise ConfigError(f"attention: num_heads={n} is not divisible by num_kv_heads={k}; valid: {valid}.")
        if not 0 <= config.rotary_fraction <= 1:
            raise ConfigError(f"attention: expected 0 <= rotary_fraction <= 1, got {config.rotary_fraction}.")
        if config.rope_scaling is not None:
            rope_scaling(config.rope_scaling, "attention.rope_scaling")
        if config.window is not None and config.window < 0:
            raise ConfigError(f"attention: expected window >= 0 (keys before the query) or None, got {config.window}.")
        if config.soft_cap is not None and config.soft_cap <= 0:
            raise ConfigError(f"attention: expected soft_cap > 0 or None, got {config.soft_cap}.")

    def __init__(self, config, env, *, rngs):
        self.config, self.env = config, env
        D, N, K, H = env.d_model, config.num_heads, *kv_heads_and_dim(config, env)
        make = functools.partial(param, jax.random.normal, dtype=env.param_dtype)
        self.wq = make(rngs.params(), (D, N, H), ("embed", "heads", "head_dim"), in_dims=("embed",))
        self.wk = make(rngs.params(), (D, K, H), ("embed", "kv_heads", "head_dim"), in_dims=("embed",))
        self.wv = make(rngs.params(), (D, K, H), ("embed", "kv_heads", "head_dim"), in_dims=("embed",))
        self.wo = make(rngs.params(), (N, H, D), ("heads", "head_dim", "embed"), in_dims=("heads", "head_dim"))
        if config.bias:
            for name, shape, dims in (("bq", (N, H), "heads"), ("bk", (K, H), "kv_heads"), ("bv", (K, H), "kv_heads")):
                setattr(self, name, param(zeros, rngs.params(), shape, (dims, "head_dim"), in_dims=(), dtype=env.param_dtype))
        if config.qk_norm:
            sizes = (N * H, K * H) if config.qk_norm_whole else (H, H)
            self.q_norm, self.k_norm = (_norm(n, env, rngs) for n in sizes)
        if config.out_bias:
            self.bo = param(zeros, rngs.params(), (D,), ("norm",), in_dims=(), dtype=env.param_dtype)
        if config.output_gate:
            self.wg = make(rngs.params(), (D, N, H), ("embed", "heads", "head_dim"), in_dims=("embed",))
            if config.bias:
                self.bg = param(zeros, rngs.params(), (N, H), ("heads", "head_dim"), in_dims=(), dtype=env.param_dtype)
        if config.sinks:
            self.sinks = param(zeros, rngs.params(), (N,), ("heads",), in_dims=(), dtype=env.param_dtype)

    def __call__(self, x_BTD, ctx):
        q, k, v = self._project(x_BTD, ctx)
        y = self._attend(q, k, v, segment_ids=ctx.segment_ids_BT, positions=ctx.index_BT)
        return self._output(y, x_BTD)

    def init_state(self, batch, max_len, dtype):
        K, H = kv_heads_and_dim(self.config, self.env)
        slots = _slots(self.config, max_len)
        # Two arrays, not one twice: a decoding state is donated, and a buffer can be donated once.
        k_BSKH, v_BSKH = (jnp.zeros((batch, slots, K, H), dtype) for _ in range(2))
        return KVCache(k_BSKH, v_BSKH, jnp.full((batch, slots), -1, jnp.int32))

    def prefill(self, x_BTD, ctx, state, valid_BT=None):
        q, k, v = self._project(x_BTD, ctx)
        valid_BT = all_valid(x_BTD, valid_BT)
        index_BT = jnp.where(valid_BT, ctx.index_BT, -1)
        written = _write(state, k, v, index_BT, ring=self.config.window is not None)
        if self.config.window is None:
            keys, values, key_index = map(whole, (written.k_BSKH, written.v_BSKH, written.index_BS))
        else:  # the chunk may overwrite slots that its first tokens still see: attend over (old ring, chunk)
            old = map(whole, (state.k_BSKH, state.v_BSKH, state.index_BS))
            keys, values, key_index = (jnp.concatenate([a, b.astype(a.dtype)], axis=1) for a, b in zip(old, (k, v, index_BT)))
        y = self._attend(
            q, keys.astype(q.dtype), values.astype(q.dtype), positions=index_BT, kv_positions=key_index,
            segment_ids=valid_BT.astype(jnp.int32), kv_segment_ids=(key_index >= 0).astype(jnp.int32),
        )  # fmt: skip
        return self._output(y, x_BTD), written

    def _project(self, x_BTD, ctx):
        c = self.config
        q_BTNH, k_BTKH, v_BTKH = (dot("BTD,DNH->BTNH", x_BTD, w) for w in (self.wq, self.wk, self.wv))
        if c.bias:
            q_BTNH, k_BTKH, v_BTKH = (a + b[...].astype(a.dtype) for a, b in ((q_BTNH, self.bq), (k_BTKH, self.bk), (v_BTKH, self.bv)))
        q_BTNH = shard(q_BTNH, "batch", "seq", "act_heads", None)
        if c.qk_norm:
            q_BTNH, k_BTKH = (self._normed(norm, a) for norm, a in ((self.q_norm, q_BTNH), (self.k_norm, k_BTKH)))
        frequencies, magnitude = rope(2 * int(q_BTNH.shape[-1] * c.rotary_fraction / 2), c.rope_theta, c.rope_scaling)
        positions_BT = ctx.rotary_positions(*x_BTD.shape[:2])
        q_BTNH, k_BTKH = (rotate(a, positions_BT, frequencies, magnitude=magnitude) for a in (q_BTNH, k_BTKH))
        if c.qk_norm:
            return q_BTNH, k_BTKH, v_BTKH
        # Named again: without norms the backward pass needs what the kernel reads, not what was rotated.
        return checkpoint_name(q_BTNH, "heads"), checkpoint_name(k_BTKH, "kv_heads"), v_BTKH

    def _attend(self, q, k, v, **options):
        c = self.config
        options = {"sinks": self.sinks[...] if c.sinks else None, "local_window_size": c.window} | options
        options |= {"logits_soft_cap": c.soft_cap, "scale": _scale(c, self.env), "implementation": self.env.implementation}
        return ops.attention(q, k, v, is_causal=True, **options)

    def _normed(self, norm, a_BTNH):
        if not self.config.qk_norm_whole:
            return norm(a_BTNH)
        return norm(a_BTNH.reshape(*a_BTNH.shape[:2], -1)).reshape(a_BTNH.shape)

    def _output(self, y_BTNH, x_BTD):
        if self.config.output_gate:
            y_BTNH = y_BTNH * self._gate(x_BTD)
        y_BTD = dot("BTNH,NHD->BTD", y_BTNH, self.wo)
        if self.config.out_bias:
            y_BTD = y_BTD + self.bo[...].astype(y_BTD.dtype)
        return shard(y_BTD, "batch", "res_seq", "act_embed")

    def _gate(self, x_BTD):
        """sigmoid(x W_g), computed in float32 (float64 stays)."""
        g_BTNH = shard(dot("BTD,DNH->BTNH", x_BTD, self.wg), "batch", "seq", "act_heads", None)
        wide = g_BTNH.astype(jnp.promote_types(g_BTNH.dtype, jnp.float32))
        wide = wide + self.bg[...].astype(wide.dtype) if self.config.bias else wide
        return jax.nn.sigmoid(wide).astype(g_BTNH.dtype)

    @classmethod
    def cost(cls, config, env, seq_len, dtype_bytes=2):
        D, N, K, H = env.d_model, config.num_heads, *kv_heads_and_dim(config, env)
        gated = N * config.output_gate
        matrices = D * H * (2 * N + 2 * K + gated)
        norms = (N + K if config.qk_norm_whole else 2) * H * config.qk_norm
        vectors = (N + 2 * K + gated) * H * config.bias + D * config.out_bias + norms + N * config.sinks
        per_pair = 4 * N * H
        keys = seq_len + 1 if config.window is None else min(seq_len, config.window) + 1
        return Cost(
            params=matrices + vectors,
            flops=2 * matrices * seq_len + per_pair * visible_pairs(seq_len, config.window),
            dense_flops=2 * matrices * seq_len + per_pair * seq_len**2,
            decode_flops=2 * matrices + per_pair * keys,
            state_bytes=_slots(config, seq_len) * (2 * K * H * dtype_bytes + 4),
        )


def kv_heads_and_dim(config, env):
    """(K, H) of an attention's Config; not from its arrays, which are stacked in a scanned model."""
    return config.num_kv_heads or config.num_heads, config.head_dim or env.d_model // config.num_heads


def _norm(size, env, rngs):
    return RMSNorm(size, rngs=rngs, eps=env.norm_eps, offset=env.norm_offset, param_dtype=env.param_dtype)


def _scale(config, env):
    if config.scale is not None or env.mup_base_width is None:
        return config.scale
    # muP (arXiv:2203.03466): logits scale with 1/H; equal to H^-1/2 where the head has its size at the base width.
    H = kv_heads_and_dim(config, env)[1]
    base = H if config.head_dim else env.mup_base_width / config.num_heads
    return base**0.5 / H


def _slots(config, max_len):
    return max_len if config.window is None else min(max_len, config.window + 1)


def _write(state, k_BTKH, v_BTKH, index_BT, ring):
    """The cache with every valid token written; a ring keeps only the last ones, so that no slot is written twice in one call."""
    slots = state.index_BS.shape[1]
    keep_BT = index_BT >= 0
    if ring:
        keep_BT &= index_BT > jnp.max(index_BT, axis=1, keepdims=True) - slots
    slot_BT = jnp.where(keep_BT, index_BT % slots if ring else index_BT, slots)  # a slot past the end is dropped
    pairs = (state.k_BSKH, k_BTKH), (state.v_BSKH, v_BTKH), (state.index_BS, index_BT)
    return KVCache(*(put(cache, slot_BT, new) for cache, new in pairs))

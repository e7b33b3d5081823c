"""Gated cross-attention (Flamingo, arXiv:2204.14198): text reads the latest image before it, through a gate that starts closed.

Images come as a memory of the call (`Ctx.memory`): entries [B, S, E], the index in the row of the first token that sees each of them, and
their document. Entries of one image have one index; a token sees those of the largest index that is not after its own.
Letters: B batch, T time, S memory, D model, E width of the memory, N heads, K kv heads, H head dim.
"""
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from effmodels.config import ConfigError
from effmodels.layers.linear import dot
from effmodels.layers.norms import RMSNorm
from effmodels.layers.param import param, zeros
from effmodels.mixers.base import Cost, TokenMixer
from effmodels.parallel import cross, ops
from effmodels.parallel.axes import shard


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CrossState:
    """Keys and values of the memory, computed once, and the index of the first token that sees each (-1: empty)."""

    k_BSKH: Any
    v_BSKH: Any
    index_BS: Any

    DIMS = {"k_BSKH": ("batch", None, "act_kv_heads", None), "v_BSKH": ("batch", None, "act_kv_heads", None), "index_BS": ("batch", None)}


class CrossAttention(TokenMixer):
    """y = tanh(gate) softmax(q k^T / sqrt(H)) v W_o with k, v from the memory; 0 where there is no image before, and without a memory.

    prefill takes a memory once, with every image of the rows (replacing what was there); later calls leave it out.
    """

    layouts = ("contiguous", "zigzag", "striped")

    @dataclasses.dataclass(frozen=True)
    class Config:
        num_heads: int = 8
        num_kv_heads: int | None = None  # None: as many as heads
        head_dim: int | None = None  # None: d_model / num_heads
        memory: str = "source"  # which of the call's memories
        memory_dim: int | None = None  # None: d_model
        memory_len: int = 64  # entries that a decoding state has room for, and that costs count
        qk_norm: bool = False
        gate: bool = True  # tanh of one number that starts at 0

    @classmethod
    def fills(cls, config, max_len):
        return False

    @classmethod
    def check(cls, config, env):
        n, k = config.num_heads, config.num_kv_heads
        for field in ("num_heads", "head_dim", "memory_dim", "memory_len"):
            if getattr(config, field) is not None and getattr(config, field) < 1:
                raise ConfigError(f"cross_attention: expected {field} >= 1, got {field}={getattr(config, field)}.")
        if config.head_dim is None and env.d_model % n:
            valid = [i for i in range(1, env.d_model + 1) if env.d_model % i == 0 and env.d_model // i >= 8]
            raise ConfigError(f"cross_attention: d_model={env.d_model} is not divisible by num_heads={n}; valid: {valid}, or set head_dim.")
        if k is not None and (k < 1 or n % k):
            valid = [i for i in range(1, n + 1) if n % i == 0]
            raise ConfigError(f"cross_attention: num_heads={n} is not divisible by num_kv_heads={k}; valid: {valid}.")

    def __init__(self, config, env, *, rngs):
        self.config, self.env = config, env
        D, (N, K, H, E) = env.d_model, _dims(config, env)
        make = functools.partial(param, jax.random.normal, dtype=env.param_dtype)
        self.wq = make(rngs.params(), (D, N, H), ("embed", "heads", "head_dim"), in_dims=("embed",))
        self.wk = make(rngs.params(), (E, K, H), ("embed", "kv_heads", "head_dim"), in_dims=("embed",))
        self.wv = make(rngs.params(), (E, K, H), ("embed", "kv_heads", "head_dim"), in_dims=("embed",))
        self.wo = make(rngs.params(), (N, H, D), ("heads", "head_dim", "embed"), in_dims=("heads", "head_dim"))
        if config.gate:
            self.gate = param(zeros, rngs.params(), (1,), ("norm",), in_dims=(), dtype=env.param_dtype)
        if config.qk_norm:
            options = {"eps": env.norm_eps, "offset": env.norm_offset, "param_dtype": env.param_dtype}
            self.q_norm, self.k_norm = (RMSNorm(H, rngs=rngs, **options) for _ in range(2))

    def __call__(self, x_BTD, ctx):
        memory = ctx.memory.get(self.config.memory)
        if memory is None:
            return jnp.zeros_like(x_BTD)
        index_BT = ops.layout_positions(x_BTD) if ctx.index_BT is None else ctx.index_BT
        index_BS = _index(memory)
        same_BTS = True
        if ctx.segment_ids_BT is not None:
            if memory.segment_ids_BS is None:
                raise ValueError("cross_attention: the rows have segment ids and the memory has none; give the document of every entry.")
            same_BTS = ctx.segment_ids_BT[..., None] == memory.segment_ids_BS[:, None]
        return self._attend(x_BTD, *self._keys(memory, x_BTD.dtype), index_BS, _latest(index_BT, index_BS, same_BTS))

    def init_state(self, batch, max_len, dtype):
        _, K, H, _ = _dims(self.config, self.env)
        S = self.config.memory_len
        # Two arrays, not one twice: a decoding state is donated, and a buffer can be donated once.
        k_BSKH, v_BSKH = (jnp.zeros((batch, S, K, H), dtype) for _ in range(2))
        return CrossState(k_BSKH, v_BSKH, jnp.full((batch, S), -1, jnp.int32))

    def prefill(self, x_BTD, ctx, state, valid_BT=None):
        memory = ctx.memory.get(self.config.memory)
        state = state if memory is None else self._remember(memory, x_BTD.dtype, state)
        ids_BT = _latest(ctx.index_BT, state.index_BS, True if valid_BT is None else valid_BT[..., None])
        keys, values = (a.astype(x_BTD.dtype) for a in (state.k_BSKH, state.v_BSKH))
        return self._attend(x_BTD, keys, values, state.index_BS, ids_BT), state

    def _remember(self, memory, dtype, state):
        """The state with the keys and values of a memory in its first slots, and the others empty."""
        S, slots = memory.x_BSD.shape[1], self.config.memory_len
        if S > slots:
            raise ValueError(f"cross_attention: a memory of {S} entries does not fit the {slots} slots of the state; set memory_len={S}.")
        k_BSKH, v_BSKH = self._keys(memory, dtype)
        room = lambda a, value: jnp.pad(a, [(0, 0), (0, slots - S)] + [(0, 0)] * (a.ndim - 2), constant_values=value)  # noqa: E731
        keys, values = (room(new.astype(old.dtype), 0) for new, old in ((k_BSKH, state.k_BSKH), (v_BSKH, state.v_BSKH)))
        return CrossState(keys, values, room(_index(memory), -1))

    def _keys(self, memory, dtype):
        """(keys, values) of the memory, [B, S, K, H]."""
        if memory.x_BSD.shape[-1] != (width := _dims(self.config, self.env)[3]):
            raise ValueError(
                f"cross_attention: the memory has entries of {memory.x_BSD.shape[-1]} numbers, expected {width}; set memory_dim."
            )
        x_BSE = memory.x_BSD.astype(dtype)
        k_BSKH, v_BSKH = (dot("BSE,EKH->BSKH", x_BSE, w) for w in (self.wk, self.wv))
        return (self.k_norm(k_BSKH) if self.config.qk_norm else k_BSKH), v_BSKH

    def _attend(self, x_BTD, k_BSKH, v_BSKH, index_BS, ids_BT):
        q_BTNH = shard(dot("BTD,DNH->BTNH", x_BTD, self.wq), "batch", "seq", "act_heads", None)
        q_BTNH = self.q_norm(q_BTNH) if self.config.qk_norm else q_BTNH
        y_BTNH = cross.attention(q_BTNH, k_BSKH, v_BSKH, ids_BT=ids_BT, kv_ids_BS=index_BS + 1, implementation=self.env.implementation)
        y_BTD = dot("BTNH,NHD->BTD", y_BTNH, self.wo)
        if self.config.gate:
            y_BTD = jnp.tanh(self.gate[...].astype(jnp.promote_types(y_BTD.dtype, jnp.float32))).astype(y_BTD.dtype) * y_BTD
        return shard(y_BTD, "batch", "res_seq", "act_embed")

    @classmethod
    def cost(cls, config, env, seq_len, dtype_bytes=2):
        D, (N, K, H, E), S = env.d_model, _dims(config, env), config.memory_len
        rows, memory, per_pair = 2 * D * N * H, 2 * E * K * H, 4 * N * H
        flops = 2 * (rows * seq_len + memory * S) + per_pair * seq_len * S
        return Cost(
            params=rows + memory + config.gate + 2 * H * config.qk_norm,
            flops=flops,
            dense_flops=flops,
            decode_flops=2 * rows + per_pair * S,
            state_bytes=S * (2 * K * H * dtype_bytes + 4),
        )


def _dims(config, env):
    """(heads, kv heads, head dim, width of the memory)."""
    N = config.num_heads
    return N, config.num_kv_heads or N, config.head_dim or env.d_model // N, config.memory_dim or env.d_model


def _index(memory):
    """int32 [B, S]: the index of the first token that sees each entry; -1 for padding."""
    if memory.index_BS is None:
        raise ValueError("cross_attention: the memory has no index_BS; give every entry the index of the first token that sees it.")
    index_BS = jnp.asarray(memory.index_BS, jnp.int32)
    return index_BS if memory.segment_ids_BS is None else jnp.where(memory.segment_ids_BS != 0, index_BS, -1)


def _latest(index_BT, index_BS, same_BTS):
    """int32 [B, T]: 1 + the largest index of the memory that is not after a token's own, 0 where there is none."""
    seen_BTS = same_BTS & (index_BS[:, None] <= index_BT[..., None])
    return jnp.max(jnp.where(seen_BTS, index_BS[:, None] + 1, 0), axis=-1)

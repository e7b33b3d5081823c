"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): keys and values of all heads come from one short vector per token.

That vector and one rotated key, shared by the heads, are all that decoding stores. With c the compressed vector and u, o the maps of one
head from c to its keys and values, (q u^T) c = q (c u) and (sum_s p_s c_s) o = sum_s p_s (c_s o): the absorbed form attends to the stored
vectors themselves, the expanded one to keys and values made of them.
Letters: B batch, T time, S cache slots, D model, N heads, H head dim without positions, K with the rotated part, P value dim, R rank,
C = R + rotated dims, Q rank of the queries.
"""
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from effmodels.config import ConfigError
from effmodels.layers.linear import dot
from effmodels.layers.norms import RMSNorm
from effmodels.layers.param import param
from effmodels.layers.positions import halves, rope, rope_scaling, rotate
from effmodels.mixers.base import Cost, TokenMixer, all_valid, visible_pairs
from effmodels.mixers.caches import Slots, put, whole
from effmodels.parallel import ops
from effmodels.parallel.axes import shard


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LatentCache(Slots):
    """The compressed vector and the rotated key of every token, side by side, and the order index of each slot (-1: empty)."""

    c_BSC: Any
    index_BS: Any

    DIMS = {"c_BSC": ("batch", None, None), "index_BS": ("batch", None)}


class Latent(TokenMixer):
    """y = softmax(scale (q_nope k_nope^T + q_rope k_rope^T)) v W_o with k_nope, v from norm(x W_kv), equations 9 to 19 of the paper."""

    layouts = ("contiguous", "zigzag", "striped")

    @dataclasses.dataclass(frozen=True)
    class Config:
        num_heads: int = 8
        head_dim: int | None = None  # of queries and keys without positions; None: d_model / num_heads
        rope_dim: int | None = None  # of queries and keys that rotate; None: half of head_dim
        value_dim: int | None = None  # None: head_dim
        kv_rank: int | None = None  # of the vector that keys and values are made of; None: 4 head_dim
        q_rank: int | None = None  # None: queries are not compressed
        rope_theta: float = 10_000.0
        rope_scaling: FrozenDict | None = None  # fields of `layers.positions.RopeScaling`, for rows longer than those of pre-training
        rope_interleaved: bool = False  # the pairs that rotate are (2i, 2i + 1), as in DeepSeek's weights, not (i, i + half)
        scale: float | None = None  # None: (head_dim + rope_dim)^-1/2; with YaRN times the square of its mscale
        norm_eps: float | None = None  # of the norms of compressed vectors; None: the model's

        window = None  # no field: what `layouts.choose` balances is all keys

    @classmethod
    def rolls_back(cls, config):
        return True

    @classmethod
    def check(cls, config, env):
        for field in ("num_heads", "head_dim", "rope_dim", "value_dim", "kv_rank", "q_rank"):
            if getattr(config, field) is not None and getattr(config, field) < 1:
                raise ConfigError(f"latent: expected {field} >= 1, got {field}={getattr(config, field)}.")
        if config.head_dim is None and env.d_model % config.num_heads:
            valid = [i for i in range(1, env.d_model + 1) if env.d_model % i == 0 and env.d_model // i >= 8]
            raise ConfigError(
                f"latent: d_model={env.d_model} is not divisible by num_heads={config.num_heads}; valid: {valid}, or set head_dim."
            )
        if _dims(config, env)[1] % 2:
            raise ConfigError(f"latent: rope_dim={_dims(config, env)[1]} must be even, its entries rotate in pairs.")
        if config.rope_scaling is not None:
            rope_scaling(config.rope_scaling, "latent.rope_scaling")

    def __init__(self, config, env, *, rngs):
        self.config, self.env = config, env
        D, N, (H, rope, P, R) = env.d_model, config.num_heads, _dims(config, env)
        make = functools.partial(param, jax.random.normal, dtype=env.param_dtype)
        options = {"eps": config.norm_eps or env.norm_eps, "offset": env.norm_offset, "param_dtype": env.param_dtype}
        norm = functools.partial(RMSNorm, rngs=rngs, **options)
        # The rank is the input of what follows, and split as any input is.
        if config.q_rank is None:
            self.wq = make(rngs.params(), (D, N, H + rope), ("embed", "heads", "head_dim"), in_dims=("embed",))
        else:
            self.wq_down = make(rngs.params(), (D, config.q_rank), ("embed", None), in_dims=("embed",))
            self.q_norm = norm(config.q_rank)
            self.wq_up = make(rngs.params(), (config.q_rank, N, H + rope), ("embed", "heads", "head_dim"), in_dims=("embed",))
        self.wkv_down = make(rngs.params(), (D, R + rope), ("embed", None), in_dims=("embed",))
        self.kv_norm = norm(R)
        self.wk_up = make(rngs.params(), (R, N, H), ("embed", "heads", "head_dim"), in_dims=("embed",))
        self.wv_up = make(rngs.params(), (R, N, P), ("embed", "heads", "value_dim"), in_dims=("embed",))
        self.wo = make(rngs.params(), (N, P, D), ("heads", "value_dim", "embed"), in_dims=("heads", "value_dim"))

    def __call__(self, x_BTD, ctx):
        q_BTNK, c_BTC = self._queries(x_BTD, ctx), self._compress(x_BTD, ctx)
        y_BTNP = self._expanded(q_BTNK, c_BTC, segment_ids=ctx.segment_ids_BT, positions=ctx.index_BT)
        return self._output(y_BTNP)

    def init_state(self, batch, max_len, dtype):
        _, rope, _, R = _dims(self.config, self.env)
        return LatentCache(jnp.zeros((batch, max_len, R + rope), dtype), jnp.full((batch, max_len), -1, jnp.int32))

    def prefill(self, x_BTD, ctx, state, valid_BT=None):
        q_BTNK, c_BTC = self._queries(x_BTD, ctx), self._compress(x_BTD, ctx)
        valid_BT = all_valid(x_BTD, valid_BT)
        index_BT = jnp.where(valid_BT, ctx.index_BT, -1)
        slot_BT = jnp.where(valid_BT, index_BT, state.index_BS.shape[1])  # a slot past the end is dropped
        state = LatentCache(put(state.c_BSC, slot_BT, c_BTC), put(state.index_BS, slot_BT, index_BT))
        key_index = whole(state.index_BS)
        where = {
            "positions": index_BT, "kv_positions": key_index, "segment_ids": valid_BT.astype(jnp.int32),
            "kv_segment_ids": (key_index >= 0).astype(jnp.int32),
        }  # fmt: skip
        attend = self._absorbed if _absorbs(self.config, self.env, x_BTD.shape[1]) else self._expanded
        return self._output(attend(q_BTNK, whole(state.c_BSC).astype(x_BTD.dtype), **where)), state

    def _queries(self, x_BTD, ctx):
        """[B, T, N, K]: per head the part without positions, then the rotated part."""
        H, rope, _, _ = _dims(self.config, self.env)
        arrange = functools.partial(_rotated_in_halves, dims=rope) if self.config.rope_interleaved else None
        if self.config.q_rank is None:
            q_BTNK = dot("BTD,DNK->BTNK", x_BTD, self.wq, arrange=arrange)
        else:
            down_BTQ = self.q_norm(dot("BTD,DQ->BTQ", x_BTD, self.wq_down))
            q_BTNK = dot("BTQ,QNK->BTNK", down_BTQ, self.wq_up, arrange=arrange)
        q_BTNK = shard(q_BTNK, "batch", "seq", "act_heads", None)
        return jnp.concatenate([q_BTNK[..., :H], self._rotated(q_BTNK[..., H:], ctx)], axis=-1)

    def _compress(self, x_BTD, ctx):
        """[B, T, C]: the normed compressed vector, then the rotated key of all heads."""
        _, rope, _, R = _dims(self.config, self.env)
        arrange = functools.partial(_rotated_in_halves, dims=rope) if self.config.rope_interleaved else None
        c_BTC = shard(dot("BTD,DC->BTC", x_BTD, self.wkv_down, arrange=arrange), "batch", "seq", None)
        rotated_BTC = self._rotated(c_BTC[..., None, R:], ctx)[..., 0, :]
        return jnp.concatenate([self.kv_norm(c_BTC[..., :R]), rotated_BTC], axis=-1)

    def _rotated(self, x_BTNH, ctx):
        frequencies, magnitude = rope(x_BTNH.shape[-1], self.config.rope_theta, self.config.rope_scaling)
        return rotate(x_BTNH, ctx.rotary_positions(*x_BTNH.shape[:2]), frequencies, magnitude=magnitude)

    def _expanded(self, q_BTNK, c_BSC, **where):
        """Attention to the keys and values of every head, [B, T, N, P]."""
        R, (B, S, _), N = _dims(self.config, self.env)[3], c_BSC.shape, self.config.num_heads
        k_BSNH, v_BSNP = (dot("BSR,RNH->BSNH", c_BSC[..., :R], w) for w in (self.wk_up, self.wv_up))
        shared_BSNH = jnp.broadcast_to(c_BSC[:, :, None, R:], (B, S, N, c_BSC.shape[-1] - R))
        return self._attend(q_BTNK, jnp.concatenate([k_BSNH, shared_BSNH], axis=-1), v_BSNP, **where)

    def _absorbed(self, q_BTNK, c_BSC, **where):
        """Attention to the compressed vectors, as one head of keys that are values too, [B, T, N, P]."""
        H, _, _, R = _dims(self.config, self.env)
        q_BTNR = dot("BTNH,RNH->BTNR", q_BTNK[..., :H], self.wk_up)
        q_BTNC = jnp.concatenate([q_BTNR, q_BTNK[..., H:]], axis=-1)
        y_BTNR = self._attend(q_BTNC, c_BSC[:, :, None], c_BSC[:, :, None, :R], **where)
        return dot("BTNR,RNP->BTNP", y_BTNR, self.wv_up)

    def _attend(self, q, k, v, **where):
        H, rope, _, _ = _dims(self.config, self.env)
        scale = (H + rope) ** -0.5 if self.config.scale is None else self.config.scale
        return ops.attention(q, k, v, is_causal=True, scale=scale, implementation=self.env.implementation, **where)

    def _output(self, y_BTNP):
        return shard(dot("BTNP,NPD->BTD", y_BTNP, self.wo), "batch", "res_seq", "act_embed")

    @classmethod
    def cost(cls, config, env, seq_len, dtype_bytes=2):
        D, N, (H, rope, P, R) = env.d_model, config.num_heads, _dims(config, env)
        queries = D * N * (H + rope) if config.q_rank is None else config.q_rank * (D + N * (H + rope))
        matrices = queries + D * (R + rope) + R * N * (H + P) + N * P * D
        per_pair = 2 * N * (H + rope + P)
        return Cost(
            params=matrices + R + (config.q_rank or 0),
            flops=2 * matrices * seq_len + per_pair * visible_pairs(seq_len),
            dense_flops=2 * matrices * seq_len + per_pair * seq_len**2,
            decode_flops=2 * matrices + 2 * N * (2 * R + rope) * (seq_len + 1),  # absorbed: wk_up and wv_up multiply one token
            state_bytes=seq_len * ((R + rope) * dtype_bytes + 4),
        )


def _dims(config, env):
    """(head_dim, rope_dim, value_dim, kv_rank)."""
    H = config.head_dim or env.d_model // config.num_heads
    return H, config.rope_dim or H // 2, config.value_dim or H, config.kv_rank or 4 * H


def _absorbs(config, env, T):
    """Whether T queries take fewer FLOPs per stored token in the absorbed form: T (2R + rope) against T (H + rope + P) + R (H + P)."""
    H, _, P, R = _dims(config, env)
    return T * (2 * R - H - P) <= R * (H + P)


def _rotated_in_halves(weight, dims):
    """The weight with its last `dims` columns reordered for a rotation of halves; the products of queries and keys stay the same."""
    return jnp.concatenate([weight[..., :-dims], halves(weight[..., -dims:])], axis=-1)

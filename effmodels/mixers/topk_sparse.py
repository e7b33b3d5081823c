"""Sparse attention (DeepSeek-V3.2-Exp): every query attends to the top_k keys that a light indexer scores highest.

The indexer costs few FLOPs per pair, but it meets all pairs: attention becomes O(T k), the indexer stays O(T^2).
Letters: B batch, T time, S cache slots, D model, N heads, K kv heads, H head dim, J index heads, C index dim.
"""
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effmodels.config import ConfigError
from effmodels.layers.linear import dot
from effmodels.layers.param import param
from effmodels.layers.positions import rope, rotate
from effmodels.mixers.attention import Attention, kv_heads_and_dim
from effmodels.mixers.base import Cost, all_valid, visible_pairs
from effmodels.mixers.caches import Slots, put, whole
from effmodels.parallel import topk


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SparseCache(Slots):
    """Keys, values, the indexer's keys and the order index of each slot (-1: empty)."""

    k_BSKH: Any
    v_BSKH: Any
    index_k_BSC: Any
    index_BS: Any

    DIMS = {
        "k_BSKH": ("batch", None, "act_kv_heads", None), "v_BSKH": ("batch", None, "act_kv_heads", None),
        "index_k_BSC": ("batch", None, None), "index_BS": ("batch", None),
    }  # fmt: skip


class TopkSparse(Attention):
    """`Attention` over the chosen keys; with top_k at least the length it is `Attention` exactly.

    The indexer sees a detached input, and learns from its divergence to the attention's own weights alone. That loss, a sum over tokens as
    the model's cross entropy is, does not leave the layer: its gradient joins that of the output. A first phase with top_k at the length of
    the rows warms it up.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Attention.Config):
        top_k: int = 256  # keys per query
        index_heads: int = 4
        index_dim: int = 64
        kl_coef: float = 1.0  # of the indexer's loss

    @classmethod
    def fills(cls, config, max_len):
        return True

    @classmethod
    def check(cls, config, env):
        super().check(config, env)
        for field in ("top_k", "index_heads", "index_dim"):
            if getattr(config, field) < 1:
                raise ConfigError(f"topk_sparse: expected {field} >= 1, got {field}={getattr(config, field)}.")
        if config.kl_coef <= 0:
            raise ConfigError(f"topk_sparse: expected kl_coef > 0 (nothing else trains the indexer), got {config.kl_coef}.")
        if config.window is not None or config.sinks or config.soft_cap is not None:
            raise ConfigError("topk_sparse: no window, sinks or soft_cap; leave them out, or use the mixers 'attention' or 'local_global'.")

    def __init__(self, config, env, *, rngs):
        super().__init__(config, env, rngs=rngs)
        make = functools.partial(param, jax.random.normal, in_dims=("embed",), dtype=env.param_dtype)
        D, J, C = env.d_model, config.index_heads, config.index_dim
        self.w_index_q = make(rngs.params(), (D, J, C), ("embed", None, "head_dim"))
        self.w_index_k = make(rngs.params(), (D, C), ("embed", "head_dim"))
        self.w_index_weight = make(rngs.params(), (D, J), ("embed", None))

    def __call__(self, x_BTD, ctx):
        q, k, v = self._project(x_BTD, ctx)
        out, divergence_BT = topk.sparse_attention(
            q, k, v, *self._index(x_BTD, ctx), segment_ids=ctx.segment_ids_BT, positions=ctx.index_BT, kv_positions=ctx.index_BT,
            kv_segment_ids=ctx.segment_ids_BT, **self._options(),
        )  # fmt: skip
        return with_loss(self._output(out, x_BTD), self.config.kl_coef * jnp.sum(divergence_BT))

    def init_state(self, batch, max_len, dtype):
        K, H = kv_heads_and_dim(self.config, self.env)
        k_BSKH, v_BSKH = (jnp.zeros((batch, max_len, K, H), dtype) for _ in range(2))
        index_k_BSC = jnp.zeros((batch, max_len, self.config.index_dim), jnp.promote_types(dtype, jnp.float32))
        return SparseCache(k_BSKH, v_BSKH, index_k_BSC, jnp.full((batch, max_len), -1, jnp.int32))

    def prefill(self, x_BTD, ctx, state, valid_BT=None):
        q, k, v = self._project(x_BTD, ctx)
        index_q, index_k, index_w = self._index(x_BTD, ctx)
        index_BT = jnp.where(all_valid(x_BTD, valid_BT), ctx.index_BT, -1)
        slot_BT = jnp.where(index_BT >= 0, index_BT, state.index_BS.shape[1])  # a slot past the end is dropped
        pairs = (state.k_BSKH, k), (state.v_BSKH, v), (state.index_k_BSC, index_k), (state.index_BS, index_BT)
        new = SparseCache(*(put(cache, slot_BT, a) for cache, a in pairs))
        keys, values, index_keys = (whole(a).astype(b.dtype) for a, b in ((new.k_BSKH, q), (new.v_BSKH, q), (new.index_k_BSC, index_q)))
        out, _ = topk.sparse_attention(
            q, keys, values, index_q, index_keys, index_w, positions=index_BT, kv_positions=whole(new.index_BS), **self._options(),
        )  # fmt: skip
        return self._output(out, x_BTD), new

    def recall(self, x_BTD, ctx):
        """Of the top_k keys with most attention by all heads together, the share that the indexer chooses too, [B, T]; for reports, O(T^2).

        A query that sees no more than top_k keys has recall 1.
        """
        q, k, _ = self._project(x_BTD, ctx)
        (B, T, N, H), K = q.shape, k.shape[2]
        index_BT = jnp.broadcast_to(jnp.arange(T), (B, T)) if ctx.index_BT is None else ctx.index_BT
        see_BTS = topk.visible(index_BT, index_BT, ctx.segment_ids_BT, ctx.segment_ids_BT)
        logits = self._options()["scale"] * jnp.einsum("btkgh,bskh->bkgts", q.reshape(B, T, K, N // K, H), k)
        attention_BTS = jax.nn.softmax(jnp.where(see_BTS[:, None, None], logits, -1e30), axis=-1).sum((1, 2))
        count = min(self.config.top_k, T)
        scores_BTS = topk.index_scores(*self._index(x_BTD, ctx))
        chosen, best = (_among_top(jnp.where(see_BTS, a, -jnp.inf), count) & see_BTS for a in (scores_BTS, attention_BTS))
        return jnp.sum(chosen & best, axis=-1) / jnp.maximum(jnp.sum(best, axis=-1), 1)

    def _index(self, x_BTD, ctx):
        """The indexer's queries [B, T, J, C], keys [B, T, C] and weights [B, T, J], at least float32, of a detached input."""
        c, x_BTD = self.config, jax.lax.stop_gradient(x_BTD)
        wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
        q = dot("BTD,DJC->BTJC", x_BTD, self.w_index_q, dtype=wide)
        k = dot("BTD,DC->BTC", x_BTD, self.w_index_k, dtype=wide)
        w = dot("BTD,DJ->BTJ", x_BTD, self.w_index_weight, dtype=wide)
        frequencies, _ = rope(2 * int(c.index_dim * c.rotary_fraction / 2), c.rope_theta, c.rope_scaling)
        positions_BT = ctx.rotary_positions(*x_BTD.shape[:2])
        q, k = rotate(q, positions_BT, frequencies), rotate(k[:, :, None], positions_BT, frequencies)[:, :, 0]
        return q, k, w * (c.index_heads * c.index_dim) ** -0.5

    def _options(self):
        H = kv_heads_and_dim(self.config, self.env)[1]
        return {"top_k": self.config.top_k, "scale": H**-0.5 if self.config.scale is None else self.config.scale}

    @classmethod
    def cost(cls, config, env, seq_len, dtype_bytes=2):
        c, base = config, Attention.cost(config, env, seq_len, dtype_bytes)
        N, H = c.num_heads, kv_heads_and_dim(c, env)[1]
        per_pair, per_index_pair = 4 * N * H, 2 * c.index_heads * (c.index_dim + 1)
        extra = env.d_model * (c.index_heads * (c.index_dim + 1) + c.index_dim)
        matrices = base.decode_flops - per_pair * (seq_len + 1) + 2 * extra
        return Cost(
            params=base.params + extra,
            flops=matrices * seq_len + per_pair * visible_pairs(seq_len, c.top_k - 1) + per_index_pair * visible_pairs(seq_len),
            dense_flops=matrices * seq_len + per_pair * seq_len * min(c.top_k, seq_len) + per_index_pair * seq_len**2,
            decode_flops=matrices + per_pair * min(c.top_k, seq_len + 1) + per_index_pair * (seq_len + 1),
            state_bytes=base.state_bytes + seq_len * c.index_dim * max(4, dtype_bytes),
        )


@jax.custom_vjp
def with_loss(y, loss):
    """y; in the backward pass the scalar `loss` counts as one more term of what is differentiated, if that depends on y at all.

    (Not where the gradient of y is zero everywhere: a pipeline's ticks without work repeat a micro-batch.)
    """
    return y


def _with_loss_fwd(y, loss):
    return y, loss


def _with_loss_bwd(loss, dy):
    return dy, jnp.any(dy != 0).astype(loss.dtype)


with_loss.defvjp(_with_loss_fwd, _with_loss_bwd)


def _among_top(a_BTS, count):
    ids = jax.lax.top_k(a_BTS, count)[1]
    return jnp.any(ids[..., None] == np.arange(a_BTS.shape[-1]), axis=-2)

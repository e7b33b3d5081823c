"""Native Sparse Attention (arXiv:2502.11089): compressed blocks of keys, the tokens of the most important blocks, a window, and gates.

Blocks of `block` tokens, counted from the start of the document, do not overlap and serve both branches (the paper's l = d = l'); one is
compressed by a linear map of all its keys, another of its values, and seen from its last token on. The window has what no block holds yet.
Keys are compressed as rotated from the last token of their block, where the compressed one is placed: distances alone count.
Letters: B batch, T time, S cache slots, M blocks, C tokens of a block, D model, N heads, K kv heads, H head dim.
"""
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from effmodels.config import ConfigError
from effmodels.layers.linear import dot
from effmodels.layers.param import param
from effmodels.layers.positions import rope, rotate
from effmodels.mixers.attention import Attention, kv_heads_and_dim
from effmodels.mixers.base import all_valid
from effmodels.mixers.caches import Slots, put, whole
from effmodels.mixers.local_global import in_document
from effmodels.parallel import axes, layouts
from effmodels.parallel.block_select import block_attention

BRANCHES = 3  # compressed, chosen, window


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockCache(Slots):
    """Keys and values, slot = index in the row (index -1: empty), and the compressed ones of every block that is complete."""

    k_BSKH: Any
    v_BSKH: Any
    index_BS: Any
    block_k_BMKH: Any
    block_v_BMKH: Any

    DIMS = {
        **{name: ("batch", None, "act_kv_heads", None) for name in ("k_BSKH", "v_BSKH", "block_k_BMKH", "block_v_BMKH")},
        "index_BS": ("batch", None),
    }


class BlockSparse(Attention):
    """y = W_o sum over branches of sigmoid(x W_gate) branch(q, k, v), a gate per head and branch; all branches share q, k and v.

    The defaults are for short rows; the paper has blocks of 32 to 64, 16 of them, and a window of 512.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Attention.Config):
        window: int = 8  # keys before the query, besides itself; at least the tokens of an incomplete block
        block: int = 2  # tokens
        top_blocks: int = 4  # chosen per query and kv head

    @classmethod
    def fills(cls, config, max_len):
        return True

    @classmethod
    def rolls_back(cls, config):
        return True

    @classmethod
    def check(cls, config, env):
        super().check(config, env)
        if config.block < 1 or config.top_blocks < 1:
            raise ConfigError(f"block_sparse: expected block, top_blocks >= 1, got {config.block} and {config.top_blocks}.")
        if config.window < config.block - 1:
            raise ConfigError(
                f"block_sparse: window={config.window} does not reach the start of an incomplete block of {config.block} tokens; set at "
                f"least {config.block - 1}."
            )
        if config.sinks or config.soft_cap is not None:
            raise ConfigError("block_sparse: no sinks or soft_cap; leave them out, or use the mixers 'attention' or 'local_global'.")

    def __init__(self, config, env, *, rngs):
        super().__init__(config, env, rngs=rngs)
        H = kv_heads_and_dim(config, env)[1]
        make = functools.partial(param, jax.random.normal, dtype=env.param_dtype)
        for name in ("w_compress_k", "w_compress_v"):
            setattr(self, name, make(rngs.params(), (config.block * H, H), ("head_dim", None), in_dims=("head_dim",)))
        self.w_gate = make(rngs.params(), (env.d_model, config.num_heads, BRANCHES), ("embed", "heads", None), in_dims=("embed",))

    def __call__(self, x_BTD, ctx):
        (B, T, _), C, M = x_BTD.shape, self.config.block, x_BTD.shape[1] // self.config.block
        q, k, v = self._project(x_BTD, ctx)
        window = self._attend(q, k, v, segment_ids=ctx.segment_ids_BT, positions=ctx.index_BT)
        if M == 0:
            return self._gated(x_BTD, jnp.zeros_like(window), jnp.zeros_like(window), window)
        index_BT, _ = in_document(ctx, B, T)
        segment_BT = jnp.ones((B, T), jnp.int32) if ctx.segment_ids_BT is None else jnp.asarray(ctx.segment_ids_BT)
        pieces = axes.shards("seq") if ctx.layout != "contiguous" else 1
        # Blocks are found in the order of the row: documents lie in one piece there.
        positions_BT = ctx.rotary_positions(B, T)
        k, v, index, segment, positions = (layouts.from_layout(a, ctx.layout, pieces) for a in (k, v, index_BT, segment_BT, positions_BT))
        ends_BT = (index % C == C - 1) & (segment != 0)
        last_BM = jax.vmap(lambda ends_T: jnp.nonzero(ends_T, size=M, fill_value=-1)[0])(ends_BT)
        row_B1, there_BM = jnp.arange(B)[:, None], last_BM >= 0
        tokens_BMC = jnp.maximum(last_BM, C - 1)[..., None] - C + 1 + jnp.arange(C)
        blocks = [a[row_B1[..., None], tokens_BMC] for a in (k, v)]
        compressed = self._compressed(*blocks, positions[row_B1, last_BM])
        far, near = block_attention(
            q, blocks, compressed, jnp.where(there_BM, index[row_B1, last_BM], -1), positions=index_BT, segment_ids=segment_BT,
            block_segment_ids=segment[row_B1, last_BM], **self._choice(),
        )  # fmt: skip
        return self._gated(x_BTD, far, near, window)

    def init_state(self, batch, max_len, dtype):
        (K, H), M = kv_heads_and_dim(self.config, self.env), max_len // self.config.block
        k, v = (jnp.zeros((batch, max_len, K, H), dtype) for _ in range(2))
        block_k, block_v = (jnp.zeros((batch, M, K, H), dtype) for _ in range(2))
        return BlockCache(k, v, jnp.full((batch, max_len), -1, jnp.int32), block_k, block_v)

    def prefill(self, x_BTD, ctx, state, valid_BT=None):
        (B, T, _), C, (S, M) = x_BTD.shape, self.config.block, (state.index_BS.shape[1], state.block_k_BMKH.shape[1])
        q, k, v = self._project(x_BTD, ctx)
        index_BT = jnp.where(all_valid(x_BTD, valid_BT), ctx.index_BT, -1)
        row_B1, slot_BT = jnp.arange(B)[:, None], jnp.where(index_BT >= 0, index_BT, S)  # a slot past the end is dropped
        pairs = (state.k_BSKH, k), (state.v_BSKH, v), (state.index_BS, index_BT)
        tokens = [put(cache, slot_BT, new) for cache, new in pairs]
        k_BSKH, v_BSKH, index_BS = map(whole, tokens)
        window = self._windowed(q, k_BSKH, v_BSKH, index_BS, index_BT)
        if M == 0:
            state = BlockCache(*tokens, state.block_k_BMKH, state.block_v_BMKH)
            return self._gated(x_BTD, jnp.zeros_like(window), jnp.zeros_like(window), window), state
        blocks = [a[:, : M * C].reshape(B, M, C, *a.shape[2:]).astype(q.dtype) for a in (k_BSKH, v_BSKH)]
        # The blocks that end in this chunk.
        ends_BT = (index_BT >= 0) & (index_BT % C == C - 1)
        at_BE = jax.vmap(lambda ends_T: jnp.nonzero(ends_T, size=-(-T // C), fill_value=-1)[0])(ends_BT)
        new_BE = jnp.where(at_BE >= 0, index_BT[row_B1, at_BE] // C, M)
        new = self._compressed(*(a[row_B1, jnp.minimum(new_BE, M - 1)] for a in blocks), ctx.rotary_positions(B, T)[row_B1, at_BE])
        compressed = [put(old, new_BE, a) for old, a in zip((state.block_k_BMKH, state.block_v_BMKH), new)]
        end_BM, ones_BM = jnp.broadcast_to(C * jnp.arange(1, M + 1, dtype=jnp.int32) - 1, (B, M)), jnp.ones((B, M), jnp.int32)
        far, near = block_attention(
            q, blocks, [whole(a).astype(q.dtype) for a in compressed], end_BM, positions=index_BT,
            segment_ids=(index_BT >= 0).astype(jnp.int32), block_segment_ids=ones_BM, **self._choice(),
        )  # fmt: skip
        return self._gated(x_BTD, far, near, window), BlockCache(*tokens, *compressed)

    def _windowed(self, q, k_BSKH, v_BSKH, index_BS, index_BT):
        """The window's branch over the slots that any query of the chunk sees."""
        T, S = q.shape[1], index_BS.shape[1]
        if self.config.window + T < S:
            last_B1 = jnp.max(index_BT, axis=1, keepdims=True)
            slot = jnp.clip(last_B1 - self.config.window - T + 1, 0, None) + jnp.arange(self.config.window + T)
            row_B1, there = jnp.arange(slot.shape[0])[:, None], slot < S
            slot = jnp.minimum(slot, S - 1)
            k_BSKH, v_BSKH, index_BS = k_BSKH[row_B1, slot], v_BSKH[row_B1, slot], jnp.where(there, index_BS[row_B1, slot], -1)
        return self._attend(
            q, k_BSKH.astype(q.dtype), v_BSKH.astype(q.dtype), positions=index_BT, kv_positions=index_BS,
            segment_ids=(index_BT >= 0).astype(jnp.int32), kv_segment_ids=(index_BS >= 0).astype(jnp.int32),
        )  # fmt: skip

    def _compressed(self, k_BMCKH, v_BMCKH, last_BM):
        """One key and one value [B, M, K, H] of every block; last_BM: position of its last token."""
        (B, M, C, K, H), c = k_BMCKH.shape, self.config
        frequencies, _ = rope(2 * int(H * c.rotary_fraction / 2), c.rope_theta, c.rope_scaling)
        back = rotate(k_BMCKH.reshape(B, M * C, K, H), jnp.repeat(-last_BM, C, axis=1), frequencies).reshape(k_BMCKH.shape)
        rows = (a.swapaxes(2, 3).reshape(B, M, K, C * H) for a in (back, v_BMCKH))
        k_BMKH, v_BMKH = (dot("BMKI,IH->BMKH", a, w) for a, w in zip(rows, (self.w_compress_k, self.w_compress_v)))
        return [rotate(k_BMKH, last_BM, frequencies), v_BMKH]

    def _choice(self):
        H = kv_heads_and_dim(self.config, self.env)[1]
        return {"top_blocks": self.config.top_blocks, "scale": H**-0.5 if self.config.scale is None else self.config.scale}

    def _gated(self, x_BTD, far, near, window):
        gate_BTNG = jax.nn.sigmoid(dot("BTD,DNG->BTNG", x_BTD, self.w_gate))
        return self._output(sum(gate_BTNG[..., i, None] * y for i, y in enumerate((far, near, window))), x_BTD)

    @classmethod
    def cost(cls, config, env, seq_len, dtype_bytes=2):
        c, base = config, Attention.cost(config, env, seq_len, dtype_bytes)
        N, K, H = c.num_heads, c.num_kv_heads or c.num_heads, c.head_dim or env.d_model // c.num_heads
        C, gates, compress, pair = c.block, env.d_model * N * BRANCHES, 2 * c.block * H * H, 4 * N * H
        blocks, chosen = seq_len // C, lambda visible: min(c.top_blocks, visible) * C
        seen = sum((t + 1) // C + chosen((t + 1) // C) for t in range(seq_len))
        per_row = 2 * gates * seq_len + 2 * compress * K * blocks
        slots = (seq_len + 1) // C
        base = dataclasses.replace(base, params=base.params + gates + compress, active_params=base.active_params + gates + compress)
        return dataclasses.replace(
            base, flops=base.flops + per_row + pair * seen,
            dense_flops=base.dense_flops + per_row + pair * seq_len * (blocks + chosen(blocks)),
            decode_flops=base.decode_flops + 2 * gates + (2 * compress * K + pair * (slots + chosen(slots)) if slots else 0),
            state_bytes=seq_len * (2 * K * H * dtype_bytes + 4) + blocks * 2 * K * H * dtype_bytes,
        )  # fmt: skip

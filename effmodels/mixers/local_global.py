"""Local-global attention: every token sees a window before it and, further back, only the global tokens of its document.

A window is that of the token, or (with `stride`) one that moves in steps: a token sees its own block of `stride` tokens and the `window`
tokens before that block, as windows of a ring that overlap. Global are the first tokens, every n-th one (Longformer, arXiv:2004.05150;
BigBird, arXiv:2007.14062), or a learned share: of every complete block of `top_block` tokens those of the highest scores, so that what is
chosen depends on no later token than who sees it. Both parts share one softmax, or each has its own and a gate of every head weighs them.
Letters: B batch, T time, S cache slots, G global slots, D model, N heads, K kv heads, H head dim.
"""
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from effmodels.config import ConfigError
from effmodels.layers.linear import dot
from effmodels.layers.param import param
from effmodels.mixers.attention import Attention, kv_heads_and_dim
from effmodels.mixers.base import Cost, all_valid
from effmodels.mixers.caches import Slots, put, whole
from effmodels.parallel import layouts, ring
from effmodels.parallel.axes import shards

GLOBALS = ("none", "first", "every", "top")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LocalGlobalCache(Slots):
    """A ring of the last keys and values with their order indices (-1: empty) and, where a score chooses the global ones, scores [B, S]
    (else [B, 0]); and the global keys and values with the index from which on each may be seen."""

    k_BSKH: Any
    v_BSKH: Any
    index_BS: Any
    score_BS: Any
    global_k_BGKH: Any
    global_v_BGKH: Any
    global_index_BG: Any

    DIMS = {
        **{name: ("batch", None, "act_kv_heads", None) for name in ("k_BSKH", "v_BSKH", "global_k_BGKH", "global_v_BGKH")},
        **{name: ("batch", None) for name in ("index_BS", "score_BS", "global_index_BG")},
    }


class Side(NamedTuple):
    """Queries or keys: document (0 = none), or None where all are of one; order index in the document, -1 for none."""

    segment: Any
    index: Any


class LocalGlobal(Attention):
    """`Attention` over a window and, beyond it, global tokens; y = one softmax over both, or g local + (1 - g) global, g = sigmoid(x W)."""

    @dataclasses.dataclass(frozen=True)
    class Config(Attention.Config):
        window: int = 128  # keys before the query, or with a stride before its block, besides itself
        stride: int | None = None  # divides the window, which then moves in steps of this many tokens; None: with every token
        globals: str = "first"  # one of GLOBALS
        num_first: int = 16  # "first": tokens at the start of each document
        every: int = 64  # "every": the first of so many tokens, counted in the document
        top_ratio: float = 0.05  # "top": share of every block that becomes global, rounded up
        top_block: int = 64  # "top": tokens that compete
        gate: bool = False

    @classmethod
    def fills(cls, config, max_len):
        return config.globals in ("every", "top") or max_len <= reach(config)

    @classmethod
    def check(cls, config, env):
        super().check(config, env)
        c = config
        if c.globals not in GLOBALS:
            raise ConfigError(f"local_global.globals: expected one of {', '.join(GLOBALS)}, got {c.globals!r}.")
        for field in ("num_first", "every", "top_block"):
            if getattr(c, field) < 1:
                raise ConfigError(f"local_global: expected {field} >= 1, got {field}={getattr(c, field)}.")
        if c.stride is not None and (c.stride < 1 or c.window % c.stride):
            raise ConfigError(f"local_global: stride={c.stride} must divide window={c.window}, or be None: a window for every token.")
        if not 0 < c.top_ratio <= 1:
            raise ConfigError(f"local_global: expected 0 < top_ratio <= 1, got {c.top_ratio}.")
        if c.globals == "top" and reach(c) + 1 < c.top_block:
            raise ConfigError(
                f"local_global: a cache of {reach(c) + 1} local tokens does not hold the {c.top_block} that compete to be global; use "
                f"top_block <= {reach(c) + 1} or a larger window."
            )
        if c.gate and c.globals == "none":
            raise ConfigError("local_global: gate=True weighs global tokens, but globals='none'; choose some, or gate=False.")

    def __init__(self, config, env, *, rngs):
        super().__init__(config, env, rngs=rngs)
        D, N = env.d_model, config.num_heads
        if config.gate:
            self.w_gate = param(jax.random.normal, rngs.params(), (D, N), ("embed", "heads"), in_dims=("embed",), dtype=env.param_dtype)
        if config.globals == "top":
            self.w_score = param(jax.random.normal, rngs.params(), (D,), ("embed",), in_dims=("embed",), dtype=env.param_dtype)

    def __call__(self, x_BTD, ctx):
        c, (B, T) = self.config, x_BTD.shape[:2]
        q, k, v = self._project(x_BTD, ctx)
        index_BT, last_BT = in_document(ctx, B, T)
        side, score_BT = Side(ctx.segment_ids_BT, index_BT), self._score(x_BTD)
        in_row = side if c.stride else Side(ctx.segment_ids_BT, ctx.index_BT)  # a window is the same in the order of the row
        local = self._local(q, k, v, in_row, in_row)
        most = T if ctx.index_BT is not None else _most_global(c, T, packed=ctx.segment_ids_BT is not None)
        slots = min(T, -(-most // (2 * shards("seq"))) * 2 * shards("seq"))  # every layout can split them
        if slots == 0:
            return self._output(local[0].astype(x_BTD.dtype), x_BTD)
        from_BT, chosen_BT = self._seen_from(side, score_BT, jnp.zeros_like(last_BT), last_BT)
        chosen_BT &= from_BT <= _horizon(c, last_BT)  # some token of the document sees it
        if side.segment is not None:
            chosen_BT &= side.segment != 0
        order_BG = jnp.argsort(~chosen_BT, axis=1, stable=True)[:, :slots]
        take = lambda a: jnp.take_along_axis(a, order_BG.reshape(B, slots, *(1,) * (a.ndim - 2)), axis=1)  # noqa: E731
        from_BG = take(jnp.where(chosen_BT, from_BT, -1))
        segment_BG = None if side.segment is None else take(side.segment)
        far = self._far(q, take(k), take(self._weighted(v, score_BT)), side, Side(segment_BG, from_BG))
        return self._output(self._together(x_BTD, local, far), x_BTD)

    def init_state(self, batch, max_len, dtype):
        c = self.config
        K, H = kv_heads_and_dim(c, self.env)
        S, G = min(max_len, reach(c) + 1), _global_slots(c, max_len)
        scores = S if c.globals == "top" else 0
        keys = [jnp.zeros((batch, n, K, H), dtype) for n in (S, S, G, G)]
        index_BS, index_BG = (jnp.full((batch, n), -1, jnp.int32) for n in (S, G))
        score_BS = jnp.zeros((batch, scores), jnp.promote_types(dtype, jnp.float32))
        return LocalGlobalCache(*keys[:2], index_BS, score_BS, *keys[2:], index_BG)

    def prefill(self, x_BTD, ctx, state, valid_BT=None):
        q, k, v = self._project(x_BTD, ctx)
        index_BT = jnp.where(all_valid(x_BTD, valid_BT), ctx.index_BT, -1)
        score_BT = self._score(x_BTD)
        # What may be seen from here, or become global: the old ring, then the chunk, before the chunk takes slots of the ring.
        old = map(whole, (state.k_BSKH, state.v_BSKH, state.index_BS))
        keys, values, key_index = (jnp.concatenate([a, b.astype(a.dtype)], axis=1) for a, b in zip(old, (k, v, index_BT)))
        scores = score_BT if score_BT is None else jnp.concatenate([whole(state.score_BS), score_BT.astype(state.score_BS.dtype)], axis=1)
        queries, side = (Side((i >= 0).astype(jnp.int32), i) for i in (index_BT, key_index))
        local = self._local(q, keys.astype(q.dtype), values.astype(q.dtype), queries, side)
        state = self._written(state, keys, values, side, scores, index_BT)
        if state.global_index_BG.shape[1] == 0:
            return self._output(local[0].astype(x_BTD.dtype), x_BTD), state
        cached = Side((whole(state.global_index_BG) >= 0).astype(jnp.int32), whole(state.global_index_BG))
        far = self._far(q, *(whole(a).astype(q.dtype) for a in (state.global_k_BGKH, state.global_v_BGKH)), queries, cached)
        return self._output(self._together(x_BTD, local, far), x_BTD), state

    def _written(self, state, keys, values, side, scores, index_BT):
        """The state with the valid tokens of a chunk in its ring and, as far as they are complete, its global tokens."""
        c, T, S, G = self.config, index_BT.shape[1], state.index_BS.shape[1], state.global_index_BG.shape[1]
        keep_BT = (index_BT >= 0) & (index_BT > jnp.max(index_BT, axis=1, keepdims=True) - S)  # no slot is written twice in one call
        slot_BT = jnp.where(keep_BT, index_BT % S, S)  # a slot past the end is dropped
        ring_arrays = [put(a, slot_BT, b[:, -T:]) for a, b in zip((state.k_BSKH, state.v_BSKH, state.index_BS), (keys, values, side.index))]
        score_BS = put(state.score_BS, slot_BT, scores[:, -T:]) if c.globals == "top" else state.score_BS
        cached = state.global_k_BGKH, state.global_v_BGKH, state.global_index_BG
        if G:
            first = jnp.max(whole(state.index_BS), axis=1, keepdims=True) + 1
            last = jnp.maximum(first - 1, jnp.max(index_BT, axis=1, keepdims=True))
            from_BS, chosen_BS = self._seen_from(side, scores, first, last)
            slot_BS = jnp.where(chosen_BS, self._global_slot(side, scores), G)
            cached = [put(a, slot_BS, b) for a, b in zip(cached, (keys, self._weighted(values, scores), from_BS))]
        return LocalGlobalCache(*ring_arrays, score_BS, *cached)

    def _seen_from(self, side, score, first, last):
        """(index from which on each token may be seen as a global one, whether it is one); "top": of blocks that end in first .. last."""
        c = self.config
        if c.globals == "first":
            return side.index, (side.index >= first) & (side.index < c.num_first)
        if c.globals == "every":
            return side.index, (side.index >= first) & (side.index % c.every == 0)
        end = (side.index // c.top_block + 1) * c.top_block - 1
        chosen = _rank_in_block(side, score, c.top_block) < _top_count(c)
        return end, chosen & (side.index >= 0) & (end >= first) & (end <= last)

    def _global_slot(self, side, score):
        c = self.config
        if c.globals == "top":
            return side.index // c.top_block * _top_count(c) + _rank_in_block(side, score, c.top_block)
        return side.index if c.globals == "first" else side.index // c.every

    def _score(self, x_BTD):
        if self.config.globals != "top":
            return None
        return dot("BTD,D->BT", x_BTD, self.w_score, dtype=jnp.promote_types(x_BTD.dtype, jnp.float32))

    def _weighted(self, v, score):
        """Values of global tokens, times sigmoid(score) where a score chose them: through it the choice is trained (arXiv:2404.02258)."""
        return v if score is None else v * jax.nn.sigmoid(score)[..., None, None].astype(v.dtype)

    def _local(self, q, k, v, queries, keys):
        """(output, logsumexp) of the window."""
        c = self.config
        if c.stride is None:
            return self._part(q, k, v, queries, keys, c.window, sinks=c.sinks)
        # The block of the query in causal order, and whole blocks before it, whose places count as positions.
        q_block, k_block = (jnp.where(s.index >= 0, s.index // c.stride, -1) for s in (queries, keys))
        own = self._part(q, k, v, *(_in_block(s, b, c.stride) for s, b in ((queries, q_block), (keys, k_block))), None, sinks=c.sinks)
        if c.window == 0:
            return own
        before = self._part(q, k, v, Side(queries.segment, q_block - 1), Side(keys.segment, k_block), c.window // c.stride - 1)
        return ring.joined(own, before)

    def _far(self, q, k, v, queries, keys):
        """(output, logsumexp) of the global tokens that lie before everything local."""
        return self._part(q, k, v, Side(queries.segment, _horizon(self.config, queries.index)), keys, None)

    def _part(self, q, k, v, queries, keys, window, sinks=False):
        return self._attend(
            q, k, v, positions=queries.index, kv_positions=keys.index, segment_ids=queries.segment, kv_segment_ids=keys.segment,
            local_window_size=window, sinks=self.sinks[...] if sinks else None, return_residual=True,
        )  # fmt: skip

    def _together(self, x_BTD, local, far):
        """One softmax over both parts, or their sum weighed by the gate; a query that sees no global token yet has its window alone."""
        if not self.config.gate:
            return ring.joined(local, far)[0].astype(x_BTD.dtype)
        gate_BTN = jax.nn.sigmoid(dot("BTD,DN->BTN", x_BTD, self.w_gate))
        gate_BTN1 = jnp.where(far[1] == -jnp.inf, 1, gate_BTN)[..., None].astype(x_BTD.dtype)
        return (gate_BTN1 * local[0] + (1 - gate_BTN1) * far[0]).astype(x_BTD.dtype)

    @classmethod
    def cost(cls, config, env, seq_len, dtype_bytes=2):
        c, base = config, Attention.cost(config, env, seq_len, dtype_bytes)
        N, K, H = c.num_heads, *kv_heads_and_dim(c, env)
        projections = base.decode_flops - 4 * N * H * (min(seq_len, c.window) + 1)
        extra = env.d_model * (N * c.gate + (c.globals == "top"))
        local, far = pairs(c, seq_len)
        S, G = min(seq_len, reach(c) + 1), _global_slots(c, seq_len)
        executed = seq_len * (seq_len * (2 if c.stride and c.window else 1) + _most_global(c, seq_len))
        return Cost(
            params=base.params + extra,
            flops=(projections + 2 * extra) * seq_len + 4 * N * H * (local + far),
            dense_flops=(projections + 2 * extra) * seq_len + 4 * N * H * executed,
            decode_flops=projections + 2 * extra + 4 * N * H * (min(seq_len, reach(c)) + 1 + G),
            state_bytes=(S + G) * (2 * K * H * dtype_bytes + 4) + S * max(4, dtype_bytes) * (c.globals == "top"),
        )


def reach(config):
    """How many tokens before itself a token sees at the most, but for global ones."""
    return config.window + (config.stride or 1) - 1


def pairs(config, length):
    """(pairs inside windows, pairs with global tokens beyond them) of a causal row of one document, in closed form for every query."""
    c, query = config, np.arange(length)
    horizon = _horizon(c, query)  # the last index that is not local
    local = query - np.maximum(horizon, -1)
    return int(local.sum()), int(_globals_among(c, np.maximum(horizon + 1, 0)).sum())


def _horizon(config, index):
    """The index of the last token before everything that a query sees locally; negative where there is none."""
    start = index if config.stride is None else index // config.stride * config.stride
    return start - config.window - 1


def _top_count(config):
    return int(np.ceil(config.top_ratio * config.top_block - 1e-9))


def _globals_among(config, tokens):
    """How many of the first tokens of a document are global."""
    c = config
    if c.globals == "none":
        return 0 * tokens
    if c.globals == "first":
        return np.minimum(tokens, c.num_first)
    return -(-tokens // c.every) if c.globals == "every" else tokens // c.top_block * _top_count(c)


def _global_slots(config, max_len):
    return int(_globals_among(config, max_len))


def _most_global(config, length, packed=False):
    """How many tokens of a row are seen from beyond a window: exactly of one document, at the most of any documents (packed)."""
    c = config
    if not packed:
        return int(_globals_among(c, max(0, _horizon(c, length - 1) + 1)))
    if c.globals == "first":  # a document of window + 1 + n tokens has n of them, up to num_first
        return length * c.num_first // (c.window + 1 + c.num_first)
    if c.globals == "every":  # the first of them takes window + 2 tokens, every other one `every`
        return length // min(c.every, c.window + 2)
    return int(_globals_among(c, length))


def _in_block(side, block, stride):
    """The side with every block a document of its own."""
    if side.segment is None:
        return Side(block + 1, side.index)
    blocks = side.index.shape[1] // stride + 2
    if side.segment.shape[1] * blocks >= 2**31:
        raise ValueError(f"local_global: rows of {side.segment.shape[1]} packed tokens in steps of {stride} do not fit into 32 bits.")
    # A document's blocks are numbered from its start; in decoding, where indices exceed the row, there is one document.
    return Side(jnp.where(side.segment == 0, 0, (side.segment - 1) * blocks + block + 1), side.index)


def _rank_in_block(side, score, size):
    """int32 like score: how many tokens of the same document and block have a higher score, or an equal one and a smaller index."""
    segment = jnp.zeros_like(side.index) if side.segment is None else side.segment
    block = jnp.where(side.index >= 0, side.index // size, -1)
    score = jax.lax.stop_gradient(score)
    segment, block, index = (jnp.broadcast_to(a, score.shape) for a in (segment, block, side.index))
    order = jnp.lexsort((index, -score, block, segment), axis=-1)
    segment, block = (jnp.take_along_axis(a, order, axis=-1) for a in (segment, block))
    place = jnp.broadcast_to(jnp.arange(score.shape[-1], dtype=jnp.int32), score.shape)
    new = (segment != jnp.roll(segment, 1, -1)) | (block != jnp.roll(block, 1, -1)) | (place == 0)
    rank = place - jax.lax.cummax(jnp.where(new, place, 0), axis=score.ndim - 1)
    return jnp.take_along_axis(rank, jnp.argsort(order, axis=-1), axis=-1)


def in_document(ctx, B, T):
    """(index of every token in its document, index of the document's last token), int32 [B, T]. ctx.index_BT, if given, is the former."""
    if ctx.index_BT is not None:
        return ctx.index_BT, jnp.broadcast_to(jnp.max(ctx.index_BT, axis=1, keepdims=True), (B, T))
    pieces = shards("seq") if ctx.layout != "contiguous" else 1
    place_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    if ctx.segment_ids_BT is None:
        return layouts.to_layout(place_BT, ctx.layout, pieces), jnp.full((B, T), T - 1, jnp.int32)
    segment_BT = layouts.from_layout(ctx.segment_ids_BT, ctx.layout, pieces)
    changes_BT = segment_BT[:, 1:] != segment_BT[:, :-1]
    edge_B1 = jnp.ones((B, 1), bool)
    start_BT = jax.lax.cummax(jnp.where(jnp.concatenate([edge_B1, changes_BT], axis=1), place_BT, 0), axis=1)
    last_BT = jax.lax.cummin(jnp.where(jnp.concatenate([changes_BT, edge_B1], axis=1), place_BT, T), axis=1, reverse=True)
    return tuple(layouts.to_layout(a, ctx.layout, pieces) for a in (place_BT - start_BT, last_BT - start_BT))

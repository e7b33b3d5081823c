"""Who sees whom: the one definition of visibility, used by every implementation on a whole matrix or on a tile of it.

B batch, T query, S key. Positions are order indices, not rotary positions: they decide causality, windows and nothing else.
"""
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_BLOCK = 512  # keys counted at a time


@dataclasses.dataclass(frozen=True)
class Spec:
    """The static half of a call."""
    is_causal: bool
    window: int | None  # keys before the query that stay visible, itself not counted
    global_tokens: int  # first tokens of each segment, visible past the window
    soft_cap: float | None
    scale: float
    out_dtype: str | None = None  # None: the query's


class Index(NamedTuple):
    """The dynamic half: None stands for one segment, and for positions 0, 1, 2, ..."""
    q_segment_BT: jax.Array | None = None
    kv_segment_BS: jax.Array | None = None
    q_position_BT: jax.Array | None = None
    kv_position_BS: jax.Array | None = None


class Side(NamedTuple):
    """What the mask needs to know about some queries or some keys: [T] or [B, T] (B may be 1), or None where it plays no part."""
    position: jax.Array
    segment: jax.Array | None = None
    is_global: jax.Array | None = None  # keys only


def cut(side, time):
    """The same for a static slice of time."""
    return Side(*(None if x is None else x[..., time] for x in side))


def sides(index, T, S, spec):
    """(queries, keys) of the whole call."""
    # With segments every field has a batch axis, so that blocks of them broadcast against each other.
    lead = () if index.q_segment_BT is None else (1,)
    q_position = jnp.arange(T, dtype=jnp.int32).reshape(*lead, T) if index.q_position_BT is None else index.q_position_BT
    kv_position = jnp.arange(S, dtype=jnp.int32).reshape(*lead, S) if index.kv_position_BS is None else index.kv_position_BS
    is_global = None
    if spec.window is not None and spec.global_tokens:
        dynamic = index.kv_segment_BS is not None or index.kv_position_BS is not None
        is_global = _first_in_segment(index, kv_position, spec.global_tokens) if dynamic else kv_position < spec.global_tokens
    return Side(q_position, index.q_segment_BT), Side(kv_position, index.kv_segment_BS, is_global)


def visible(q, k, spec):
    """bool [..., T, S]: key visible iff same nonzero segment, not empty, in causal order and inside the window (or global)."""
    gap = q.position[..., :, None] - k.position[..., None, :]
    see = (q.position[..., :, None] >= 0) & (k.position[..., None, :] >= 0)
    if spec.is_causal:
        see &= gap >= 0
    if spec.window is not None:
        near = (gap if spec.is_causal else jnp.abs(gap)) <= spec.window
        see &= near if k.is_global is None else near | k.is_global[..., None, :]
    if q.segment is not None:
        see = see & (q.segment[..., :, None] == k.segment[..., None, :]) & (k.segment[..., None, :] != 0)
    return see


@functools.cache
def visible_pairs(T, S, spec):
    """How many (query, key) pairs of a row are visible where it holds one segment in order: what a cost estimate counts."""
    query = np.arange(T)
    reach = 0 if spec.is_causal else S + T if spec.window is None else spec.window
    low = np.zeros(T, int) if spec.window is None else np.clip(query - spec.window, 0, S)
    high = np.minimum(query + reach, S - 1) + 1
    near = np.maximum(high - low, 0)
    if spec.window is None:
        return int(near.sum())
    count = min(spec.global_tokens, S)
    before = np.minimum(count, np.minimum(low, query + 1)) if spec.is_causal else np.minimum(count, low)
    after = 0 if spec.is_causal else np.maximum(count - np.maximum(high, low), 0)
    return int((near + before + after).sum())


def _first_in_segment(index, kv_position, count):
    """bool [B, S]: fewer than `count` keys of the same segment come before this one, in order of position. False where a key is empty.

    Keys are counted, not sorted: compiling a sort for a TPU takes seconds. Every block is compared with itself, then with the block before
    it, and so on all around, until no key that may still be a first one can find another before it: two steps where segments are in order.
    """
    position_BS = jnp.atleast_2d(kv_position).astype(jnp.int32)
    segment_BS = index.kv_segment_BS if index.kv_segment_BS is not None else jnp.ones_like(position_BS)
    B, S = segment_BS.shape
    block = min(_BLOCK, S)
    blocks = -(-S // block)
    cut = lambda x: jnp.pad(jnp.broadcast_to(x, (B, S)), ((0, 0), (0, blocks * block - S))).reshape(B, blocks, block)  # noqa: E731
    real = cut((position_BS >= 0) & (segment_BS != 0))
    keys = jnp.where(real, cut(segment_BS), 0), cut(position_BS), cut(jnp.arange(S))
    furthest = _furthest(*keys[:2], real)

    def goes_on(carry):
        step, rank, _ = carry
        return (real & (rank < count) & (step <= furthest)).any()

    def compare(carry):
        step, rank, others = carry
        segment, position, place = (x[..., None, :] for x in keys)
        segment_, position_, place_ = (x[..., :, None] for x in others)
        before = (segment_ == segment) & (position_ - (place_ < place) < position)  # at equal positions, the one that stands first
        return step + 1, rank + before.sum(-2, dtype=jnp.int32), tuple(jnp.roll(x, 1, axis=1) for x in others)

    _, rank, _ = jax.lax.while_loop(goes_on, compare, (jnp.int32(0), jnp.zeros_like(real, jnp.int32), keys))
    return (real & (rank < count)).reshape(B, -1)[:, :S]


def _furthest(segment, position, real):
    """[B, blocks, block]: how many blocks before its own, all around, the last one lies that may hold a key that comes before this one."""
    n = real.shape[1]
    least = lambda x: jnp.where(real, x, jnp.iinfo(x.dtype).max).min(-1)[:, None, None]  # noqa: E731
    greatest = jnp.where(real, segment, jnp.iinfo(segment.dtype).min).max(-1)[:, None, None]
    may = (least(segment) <= segment[..., None]) & (segment[..., None] <= greatest) & (least(position) <= position[..., None])
    steps = (jnp.arange(n)[:, None, None] - jnp.arange(n)) % n
    return jnp.where(may, steps, 0).max(-1)

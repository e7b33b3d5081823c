"""Who sees whom: the one definition of visibility, used by every implementation on a whole matrix or on a tile of it.

B batch, T query, S key. Positions are order indices, not rotary positions: they decide causality, windows and nothing else.
"""
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Spec:
    """The static half of a call."""
    is_causal: bool
    window: int | None  # keys before the query that stay visible, itself not counted
    global_tokens: int  # first tokens of each segment, visible past the window
    soft_cap: float | None
    scale: float


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
        is_global = (_rank_in_segment(index, kv_position) if dynamic else kv_position) < spec.global_tokens
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


def _rank_in_segment(index, kv_position):
    """[B, S]: how many keys of the same segment come before this one, in order of position. Empty slots do not count."""
    position_BS = jnp.atleast_2d(kv_position)
    segment_BS = index.kv_segment_BS if index.kv_segment_BS is not None else jnp.ones_like(position_BS)
    position_BS = jnp.broadcast_to(position_BS, segment_BS.shape)
    segment_BS = jnp.where(position_BS < 0, 0, segment_BS)
    place_BS = jax.lax.broadcasted_iota(jnp.int32, segment_BS.shape, 1)
    segment_BS, _, source_BS = jax.lax.sort((segment_BS, position_BS, place_BS), dimension=1, num_keys=2)
    starts_BS = jnp.concatenate([jnp.ones_like(segment_BS[:, :1], bool), segment_BS[:, 1:] != segment_BS[:, :-1]], axis=1)
    rank_BS = place_BS - jax.lax.cummax(jnp.where(starts_BS, place_BS, 0), axis=1)
    return jax.lax.sort((source_BS, rank_BS), dimension=1, num_keys=1)[1]

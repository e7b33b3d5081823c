"""Which blocks a tile visits, and who sees whom inside a block, for the GPU kernels.

Every mask of the contract has one form: key j is visible to query i iff their segments are equal and lo_j <= position_i <= hi_j.
  causal  lo_j is the key's position;   window w  hi_j is the key's position + w (and lo_j the same - w when not causal);
  global  hi_j has no bound;            empty slot, segment 0, padding  lo_j > hi_j for keys, position -1 for queries.
Blocks are visited in two runs: those that need the mask, then those that every row sees whole.
"""
import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import gpu
from pallas_kernels.flash_attention.mask import sides

_FAR = np.int32(2**30)  # beyond any position a mask can tell apart; sums of two stay inside int32
WARPGROUP_ROWS = 64  # rows of a tile that one warpgroup holds: the height of a wgmma
_NEVER = np.iinfo(np.int32).max


@dataclasses.dataclass(frozen=True)
class Shape:
    """Lengths of the call and the rows of a tile on either side."""
    T: int
    S: int
    q_rows: int
    k_rows: int


class Ids(NamedTuple):
    """What the mask of a call with segments or positions needs, padded to whole blocks."""
    q_B2T: Any  # position, segment
    k_B3S: Any  # lo, hi, segment


class Visits(NamedTuple):
    """Blocks each tile visits, for traced masks: those that need the mask first."""
    order_BXY: Any
    count_BX2: Any  # (need the mask, all)


def div(x, n):
    """x // n of non-negative scalars, without the correction for signs."""
    return lax.div(jnp.asarray(x, jnp.int32), jnp.int32(n))


def _up(x, n):
    return div(x + (n - 1), n)


def is_traced(index):
    """Whether only the device knows who sees whom."""
    return index.q_segment_BT is not None or index.q_position_BT is not None


# Masks known at trace time: closed forms of the tile's number.


class Ranges(NamedTuple):
    """Blocks [0, front) and [low, high) are visited, of which [full_low, full_high) are seen whole by every row."""
    front: Any
    low: Any
    full_low: Any
    full_high: Any
    high: Any

    def counts(self):
        masked = self.front + (self.full_low - self.low) + (self.high - self.full_high)
        return masked, masked + self.full_high - self.full_low

    def block(self, i):
        """The block of step i; steps go through the masked ones first."""
        left = self.full_low - self.low
        masked = self.front + left + self.high - self.full_high
        after_front = jnp.where(i < self.front + left, self.low + i - self.front, self.full_high + i - self.front - left)
        return jnp.where(i < self.front, i, jnp.where(i < masked, after_front, self.full_low + i - masked))


def _ranges(front, low, full_low, full_high, high):
    """Ranges in order: low <= full_low <= full_high <= high."""
    low = jnp.minimum(low, high)
    full_low = jnp.clip(full_low, low, high)
    return Ranges(jnp.minimum(front, low), low, full_low, jnp.clip(full_high, full_low, high), high)


def keys_of(tile, shape, spec):
    """Ranges of key blocks that query tile number `tile` visits."""
    n = -(-shape.S // shape.k_rows)
    first = tile * shape.q_rows
    last = jnp.minimum(first + shape.q_rows, shape.T) - 1
    low = full_low = jnp.int32(0)
    high, full_high = jnp.int32(n), jnp.int32(shape.S // shape.k_rows)
    window = None if spec.window is None else min(spec.window, shape.T + shape.S)
    ahead = 0 if spec.is_causal else window  # keys after the query that it sees; None: all
    front = 0 if window is None else min(-(-spec.global_tokens // shape.k_rows), n)
    if ahead is not None:
        high = jnp.minimum(jnp.maximum(div(last + ahead, shape.k_rows) + 1, 0 if spec.is_causal else front), n)
        full_high = jnp.minimum(div(first + ahead + 1, shape.k_rows), full_high)
    if window is not None:
        low = div(jnp.maximum(first - window, 0), shape.k_rows)
        full_low = _up(jnp.maximum(last - window, 0), shape.k_rows)
    return _ranges(jnp.int32(front), low, full_low, full_high, high)


def queries_of(tile, shape, spec):
    """Ranges of query blocks that see key tile number `tile`. Queries past T need no mask: their cotangents are zero."""
    n = -(-shape.T // shape.q_rows)
    first = tile * shape.k_rows
    last = jnp.minimum(first + shape.k_rows, shape.S) - 1
    low = full_low = jnp.int32(0)
    high = full_high = jnp.int32(n)
    window = None if spec.window is None else min(spec.window, shape.T + shape.S)
    has_global = jnp.int32(0) if window is None else jnp.asarray(first < spec.global_tokens, jnp.int32)
    ahead = 0 if spec.is_causal else window
    if ahead is not None:
        low = jnp.where((has_global == 1) & (not spec.is_causal), 0, div(jnp.maximum(first - ahead, 0), shape.q_rows))
        full_low = _up(jnp.maximum(last - ahead, 0), shape.q_rows)
    if window is not None:
        high = jnp.where(has_global == 1, n, jnp.minimum(div(last + window, shape.q_rows) + 1, n))
        full_high = jnp.minimum(div(first + window + 1, shape.q_rows), n)
    return _ranges(jnp.int32(0), low, full_low, full_high, high)


def see_by_place(q, k, S, spec):
    """bool tile from the places of queries and keys (tiles of int32 of the same shape)."""
    see = k < S
    if spec.is_causal:
        see &= q >= k
    if spec.window is not None and spec.window < 2**30:
        near = q - k <= spec.window
        if not spec.is_causal:
            near &= k - q <= spec.window
        see &= near | (k < spec.global_tokens) if spec.global_tokens else near
    return see


# Masks that only the device knows.


def ids(index, T, S, spec, T_padded, S_padded):
    """Ids of a call; see the head of the file."""
    q, k = sides(index, T, S, spec)
    position = k.position.astype(jnp.int32)
    low = position
    high = jnp.full_like(position, _NEVER)
    if spec.window is not None:
        window = min(spec.window, int(_FAR))
        high = jnp.where(position > _NEVER - window, _NEVER, position + window)
        high = high if k.is_global is None else jnp.where(k.is_global, _NEVER, high)
    if not spec.is_causal:
        low = jnp.zeros_like(position)
        if spec.window is not None:
            near = jnp.maximum(position - window, 0)
            low = near if k.is_global is None else jnp.where(k.is_global, 0, near)
    empty = position < 0
    q_position, q_segment, k_segment = q.position.astype(jnp.int32), jnp.int32(0), jnp.int32(0)
    if q.segment is not None:
        q_segment, k_segment = q.segment.astype(jnp.int32), k.segment.astype(jnp.int32)
        empty |= k_segment == 0
        q_position = jnp.where(q_segment == 0, -1, q_position)
    low, high = jnp.where(empty, _NEVER, low), jnp.where(empty, -1, high)
    return Ids(
        _stack((jnp.maximum(q_position, -1), q_segment), (-1, 0), T, T_padded),
        _stack((low, high, k_segment), (_NEVER, -1, 0), S, S_padded),
    )


def _stack(fields, fills, length, padded):
    fields = [jnp.pad(jnp.atleast_2d(jnp.broadcast_to(x, jnp.broadcast_shapes(jnp.shape(x), (length,)))), ((0, 0), (0, padded - length)),
                      constant_values=fill) for x, fill in zip(fields, fills)]
    B = max(x.shape[0] for x in fields)
    return jnp.stack([jnp.broadcast_to(x, (B, padded)) for x in fields], axis=1)


def see_by_ids(q, k):
    """bool tile from (position, segment) of queries and (lo, hi, segment) of keys, already spread over the tile."""
    return (k[0] <= q[0]) & (q[0] <= k[1]) & (q[1] == k[2])


def visits(ids, q_rows, k_rows, of_keys=False):
    """Visits of key blocks by query tiles, or (of_keys) of query blocks by key tiles."""
    blocks = lambda x, rows: x.reshape(*x.shape[:2], -1, rows)  # noqa: E731
    q, k = blocks(ids.q_B2T, q_rows), blocks(ids.k_B3S, k_rows)
    q_real, k_real = q[:, 0] >= 0, k[:, 0] <= k[:, 1]
    low = lambda x, real: jnp.where(real, x, _NEVER).min(-1)  # noqa: E731
    high = lambda x, real: jnp.where(real, x, -_NEVER).max(-1)  # noqa: E731
    q_low, q_high, q_seg_low, q_seg_high = (f(q[:, i], q_real)[:, :, None] for i in (0, 1) for f in (low, high))
    k_low, k_least_high = low(k[:, 0], k_real)[:, None], low(k[:, 1], k_real)[:, None]
    k_high, k_most_low = high(k[:, 1], k_real)[:, None], high(k[:, 0], k_real)[:, None]
    k_seg_low, k_seg_high = low(k[:, 2], k_real)[:, None], high(k[:, 2], k_real)[:, None]
    visit = (k_low <= q_high) & (q_low <= k_high) & (k_seg_low <= q_seg_high) & (q_seg_low <= k_seg_high)
    whole = visit & (k_most_low <= q_low) & (q_high <= k_least_high) & (q_seg_low == q_seg_high) & (k_seg_low == k_seg_high)
    whole &= (q_seg_low == k_seg_low) & q_real.all(-1)[:, :, None] & k_real.all(-1)[:, None]
    if of_keys:
        visit, whole = visit.swapaxes(1, 2), whole.swapaxes(1, 2)
    order = jnp.argsort(jnp.where(visit, whole.astype(jnp.int32), 2), axis=-1, stable=True).astype(jnp.int32)
    counts = jnp.stack([(visit & ~whole).sum(-1), visit.sum(-1)], axis=-1).astype(jnp.int32)
    return Visits(order, counts)


def mask(spec, shape, first, b, id_refs, of_keys):
    """Function of the other side's block number -> bool tile, for the rows of a tile that start at `first`.

    The rows are queries and the columns keys; of_keys: the other way round. `id_refs` (queries, keys) are empty for a static mask.
    """
    columns = shape.q_rows if of_keys else shape.k_rows
    tile = (WARPGROUP_ROWS, columns)

    def places(block):
        own, other = gpu.iota(tile, 0) + first, gpu.iota(tile, 1) + block * columns
        return see_by_place(*((other, own) if of_keys else (own, other)), shape.S, spec)

    if not id_refs:
        return places
    own_ref, other_ref = id_refs[::-1] if of_keys else id_refs
    own = [gpu.rows(gpu.load_rows(own_ref.at[b, i, pl.ds(first, WARPGROUP_ROWS)], shared=False), tile) for i in range(own_ref.shape[1])]

    def fields(block):
        other = [gpu.load_columns(other_ref.at[b, i, pl.ds(block * columns, columns)], shared=False) for i in range(other_ref.shape[1])]
        other = [gpu.columns(x, tile) for x in other]
        return see_by_ids(*((other, own) if of_keys else (own, other)))

    return fields


class Steps:
    """The steps of one tile: how many need the mask, how many there are, and the block of each."""

    def __init__(self, tile, shape, spec, b, visit_refs, of_keys):
        """`visit_refs` are refs to Visits, or empty for a mask known at trace time."""
        if visit_refs:
            self._order, counts = visit_refs[0].at[b, tile], visit_refs[1].at[b, tile]
            self.masked, self.total = counts[0], counts[1]
            self.block = lambda i: self._order[i]
        else:
            ranges = (queries_of if of_keys else keys_of)(tile, shape, spec)
            self.masked, self.total = ranges.counts()
            self.block = ranges.block


def copy_keys(steps, shape, b, kv_head, rings, refs):
    """What the copying warpgroup does for a tile of queries: keys and values of every block in `steps`, each into its ring."""
    gpu.mosaic().set_max_registers(gpu.COPY_REGISTERS, action="decrease")

    @pl.loop(0, steps.total)
    def _(step):
        rows = pl.ds(steps.block(step) * shape.k_rows, shape.k_rows)
        for ring, ref in zip(rings, refs, strict=True):
            ring.fill(step, ref.at[b, rows, kv_head])

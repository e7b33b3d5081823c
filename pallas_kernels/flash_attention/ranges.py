"""Which tiles a kernel visits: ranges per block in closed form for static masks, from block extents on the device otherwise.

B batch, T query, S key, i query block, j key block. A tile is (i, j): `block_q` queries times `block_kv` keys.

    plan, tables = make(index, T, S, spec, block_q, block_kv)
      plan    static and hashable: T, S, spec, block_q, block_kv, q_blocks, kv_blocks, batched, segmented, positioned, leading, and
              kv_steps / q_steps: an upper bound of the steps that any row / column needs (>= 1). Exact for a static mask.
      tables  NamedTuple of 1-D int32 arrays, O(B (T + S) / block), for scalar prefetch (all of them, in this order):
                rows     for each query block (steps, shift): the key blocks it visits
                columns  for each key block (steps, shift): the query blocks it visits
                q_extent, k_extent   what the tests below read; one dummy element for a static mask

    grid_steps(plan, tables) -> (kv steps, q steps) for the grid: Python ints for a static mask, traced scalars otherwise.

  Inside index maps and kernels (the refs of `tables` as a Tables, b the batch row; scalars, traced or not):
    kv_block(plan, tables, b, i, step) -> key block of that step; kv_steps(plan, tables, b, i) -> how many steps the row has
    q_block(plan, tables, b, j, step) -> query block of that step; q_steps(plan, tables, b, j)
        A step past the end gives the last block again. A row without steps has kv_steps = 0 and block 0.
        The visited blocks are a contiguous hull, except that static global tokens add `plan.leading` leading key blocks.
    tile_is_empty(plan, tables, b, i, j) -> no pair of the tile is visible: a hole in the hull. Always False for a static causal hull.
    tile_is_full(plan, tables, b, i, j, rows=False, order=True) -> every key of the tile is real and visible to every query below T. With
        rows=True also no query of the tile is past T (a backward kernel sums over rows; a forward one drops them). With order=False
        causal order aside: where positions are aranges, such a tile is full but for the triangle above the diagonal.
    part_is_empty(plan, tables, b, i, j) -> as tile_is_empty, but exact for static masks too: for parts of a visited tile, with a plan
        (and tables) of the parts' own, smaller blocks. `parts(index, plan, block_q, block_kv)` makes those.
  A mask is needed only where a tile is neither. `empty` and `full` are Python bools where the plan alone decides.
"""
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.flash_attention.mask import Spec, sides

_BIG = np.iinfo(np.int32).max
_Q_FIELDS = 5  # low and high position, low and high segment of what is real; whether all of it is
_K_FIELDS = 7  # and whether some, and all, of it are global tokens


@dataclasses.dataclass(frozen=True)
class Plan:
    T: int
    S: int
    spec: Spec
    block_q: int
    block_kv: int
    batched: bool  # tables differ from one batch row to the next
    segmented: bool
    positioned: bool
    leading: int  # key blocks that every row visits first: static global tokens
    kv_steps: int
    q_steps: int

    @property
    def q_blocks(self):
        return -(-self.T // self.block_q)

    @property
    def kv_blocks(self):
        return -(-self.S // self.block_kv)

    @property
    def static(self):
        return not (self.segmented or self.positioned)


class Tables(NamedTuple):
    rows: jax.Array
    columns: jax.Array
    q_extent: jax.Array
    k_extent: jax.Array


def make(index, T, S, spec, block_q, block_kv):
    """(Plan, Tables) of a call."""
    segmented, positioned = index.q_segment_BT is not None, index.q_position_BT is not None
    if not (segmented or positioned):
        return _static(T, S, spec, block_q, block_kv)
    plan = Plan(T, S, spec, block_q, block_kv, True, segmented, positioned, 0, -(-S // block_kv), -(-T // block_q))
    return plan, _dynamic(index, plan)


def parts(index, plan, block_q, block_kv):
    """(Plan, Tables) of smaller tiles of the same call, for the tests only: the tables of what they visit are left out."""
    part = dataclasses.replace(plan, block_q=block_q, block_kv=block_kv)
    dummy = np.zeros(1, np.int32)
    if part.static:
        return part, Tables(dummy, dummy, dummy, dummy)
    q_BFi, k_BFj = _extents(index, part)
    return part, Tables(dummy, dummy, q_BFi.reshape(-1), k_BFj.reshape(-1))


def grid_steps(plan, tables):
    """(kv steps, q steps): the longest row and the longest column, at least 1."""
    if plan.static:
        return plan.kv_steps, plan.q_steps
    return tuple(jnp.maximum(x.reshape(-1, 2)[:, 0].max(), 1) for x in (tables.rows, tables.columns))


# Static masks: positions are aranges, so a block's neighbours follow from its number.


@functools.cache
def _static(T, S, spec, block_q, block_kv):
    nq, nk = -(-T // block_q), -(-S // block_kv)
    windowed = spec.window is not None
    first_tokens = min(spec.global_tokens, S) if windowed else 0
    leading = -(-first_tokens // block_kv)

    q_low, q_high = np.arange(nq) * block_q, np.minimum(np.arange(1, nq + 1) * block_q, T) - 1
    low = np.maximum(q_low - spec.window, 0) if windowed else np.zeros(nq, int)
    reach = 0 if spec.is_causal else spec.window if windowed else T + S  # keys after the query that it may see
    high = np.minimum(q_high + reach, S - 1)
    first, end = low // block_kv, np.where(low <= high, high // block_kv + 1, 0)
    # Leading blocks in causal order; the hull starts after them.
    lead = np.minimum(leading, np.minimum(q_high, S - 1) // block_kv + 1) if spec.is_causal else np.full(nq, leading)
    first = np.maximum(first, lead)
    count = np.maximum(end - first, 0)
    rows = np.stack([lead + count, np.where(count > 0, first - lead, 0)], 1)

    k_low, k_high = np.arange(nk) * block_kv, np.minimum(np.arange(1, nk + 1) * block_kv, S) - 1
    low = k_low if spec.is_causal else np.maximum(k_low - spec.window, 0) if windowed else np.zeros(nk, int)
    high = np.where(k_low < first_tokens, T - 1, np.minimum(k_high + spec.window, T - 1)) if windowed else np.full(nk, T - 1)
    low = low if spec.is_causal else np.where(k_low < first_tokens, 0, low)
    first, end = low // block_q, np.where(low <= high, high // block_q + 1, 0)
    count = np.maximum(end - first, 0)
    columns = np.stack([count, np.where(count > 0, first, 0)], 1)

    kv_steps, q_steps = (max(1, int(table[:, 0].max())) for table in (rows, columns))
    plan = Plan(T, S, spec, block_q, block_kv, False, False, False, leading, kv_steps, q_steps)
    dummy = np.zeros(1, np.int32)
    return plan, Tables(rows.astype(np.int32).reshape(-1), columns.astype(np.int32).reshape(-1), dummy, dummy)


# Dynamic masks: extents of every block, and the hull of the blocks that may see each other.


def _dynamic(index, plan):
    q_BFi, k_BFj = _extents(index, plan)
    visit = ~_empty(plan, [q_BFi[:, f, :, None] for f in range(_Q_FIELDS)], [k_BFj[:, f, None, :] for f in range(_K_FIELDS)])
    return Tables(_hull(visit), _hull(visit.swapaxes(1, 2)), q_BFi.reshape(-1), k_BFj.reshape(-1))


def _extents(index, plan):
    B = next(x for x in index if x is not None).shape[0]
    q_side, k_side = sides(index, plan.T, plan.S, plan.spec)
    return _extent(q_side, B, plan.block_q)[:, :_Q_FIELDS], _extent(k_side, B, plan.block_kv)


def _extent(side, B, block):
    """[B, fields, blocks] int32: see _K_FIELDS."""
    length = side.position.shape[-1]
    blocks = -(-length // block)

    def cut(x, fill):
        x = jnp.broadcast_to(jnp.asarray(x).astype(jnp.int32), (B, length))
        return jnp.pad(x, ((0, 0), (0, blocks * block - length)), constant_values=fill).reshape(B, blocks, block)

    position, inside = cut(side.position, -1), cut(jnp.ones(length, jnp.int32), 0) == 1
    segment = cut(1 if side.segment is None else side.segment, 0)
    is_global = cut(0 if side.is_global is None else side.is_global, 0) == 1
    real = (position >= 0) & (segment != 0)
    low = lambda x: jnp.where(real, x, _BIG).min(-1)  # noqa: E731
    # Segments may be any nonzero integers, so the greatest of none is the least integer; no position is below 0.
    high = lambda x, none: jnp.where(real, x, none).max(-1)  # noqa: E731
    fields = [low(position), high(position, -1), low(segment), high(segment, -_BIG - 1), (real | ~inside).all(-1),
              (is_global & real).any(-1), (is_global | ~inside).all(-1)]
    return jnp.stack([x.astype(jnp.int32) for x in fields], axis=1)


def _hull(visit):
    """[..., rows, columns] bool -> flat int32 (steps, shift) of each row."""
    place = jax.lax.broadcasted_iota(jnp.int32, visit.shape, visit.ndim - 1)
    first = jnp.where(visit, place, _BIG).min(-1)
    end = jnp.where(visit, place, -1).max(-1) + 1
    seen = end > 0
    return jnp.stack([jnp.where(seen, end - first, 0), jnp.where(seen, first, 0)], -1).reshape(-1)


def _empty(plan, q, k):
    """No pair is visible, judged from the extents of a query block and a key block."""
    spec = plan.spec
    q_low, q_high, q_first, q_last, _ = q
    k_low, k_high, k_first, k_last, _, some_global, _ = k
    visit = (q_high >= 0) & (k_high >= 0)
    if spec.is_causal:
        visit &= k_low <= q_high
    if spec.window is not None:
        near = q_low - k_high <= spec.window
        near = near if spec.is_causal else near & (k_low - q_high <= spec.window)
        visit &= near | (some_global != 0)
    if plan.segmented:
        visit &= (k_first <= q_last) & (q_first <= k_last)
    return ~visit


def _full(plan, q, k, order):
    """Every pair is visible, judged likewise."""
    spec = plan.spec
    q_low, q_high, q_first, q_last, q_whole = q
    k_low, k_high, k_first, k_last, k_whole, _, all_global = k
    full = (q_whole != 0) & (k_whole != 0)
    if spec.is_causal and order:
        full &= k_high <= q_low
    if spec.window is not None:
        near = q_high - k_low <= spec.window
        near = near if spec.is_causal else near & (k_high - q_low <= spec.window)
        full &= near | (all_global != 0)
    if plan.segmented:
        full &= (q_first == q_last) & (k_first == k_last) & (q_first == k_first)
    return full


# What index maps and kernels ask.


def kv_steps(plan, tables, b, i):
    if _simple(plan):
        reach = jnp.minimum((i + 1) * plan.block_q, plan.T) - 1
        return 1 + _divide(reach, plan.block_kv, plan.kv_blocks - 1) if plan.spec.is_causal else plan.kv_blocks
    return tables.rows[2 * _place(plan, b, i, plan.q_blocks)]


def q_steps(plan, tables, b, j):
    if _simple(plan):
        return plan.q_blocks - _first_query_block(plan, j)
    return tables.columns[2 * _place(plan, b, j, plan.kv_blocks)]


def kv_block(plan, tables, b, i, step):
    step = jnp.maximum(jnp.minimum(step, kv_steps(plan, tables, b, i) - 1), 0)
    if _simple(plan):
        return step
    shift = tables.rows[2 * _place(plan, b, i, plan.q_blocks) + 1]
    return step + (shift if plan.leading == 0 else jnp.where(step < plan.leading, 0, shift))


def q_block(plan, tables, b, j, step):
    steps = q_steps(plan, tables, b, j)
    step = jnp.maximum(jnp.minimum(step, steps - 1), 0)
    if _simple(plan):
        return jnp.where(steps > 0, step + _first_query_block(plan, j), 0)
    return step + tables.columns[2 * _place(plan, b, j, plan.kv_blocks) + 1]


def _simple(plan):
    """Rows and columns of a static mask without a window follow from their number with no table."""
    return plan.static and plan.spec.window is None


def _first_query_block(plan, j):
    if not plan.spec.is_causal:
        return 0
    first = _divide(j * plan.block_kv, plan.block_q, plan.q_blocks)
    if plan.S <= plan.T or plan.T % plan.block_q == 0:
        return first
    return jnp.where(j * plan.block_kv < plan.T, first, plan.q_blocks)  # only the padding of the last block comes after these keys


def _divide(x, n, most):
    """min(x // n, most) for 0 <= x, without a division on the scalar core where possible."""
    if most <= 1:
        return jnp.where(x >= n, most, 0)
    return jnp.minimum(x >> n.bit_length() - 1 if n & (n - 1) == 0 else x // n, most)


def tile_is_empty(plan, tables, b, i, j):
    """For a static mask, blocks of the hull are never empty."""
    return False if plan.static else _empty(plan, *_fields(plan, tables, b, i, j))


def part_is_empty(plan, tables, b, i, j):
    if not plan.static:
        return _empty(plan, *_fields(plan, tables, b, i, j))
    spec, q_low, k_low = plan.spec, i * plan.block_q, j * plan.block_kv
    q_high, k_high = jnp.minimum(q_low + plan.block_q, plan.T) - 1, jnp.minimum(k_low + plan.block_kv, plan.S) - 1
    empty = (q_low >= plan.T) | (k_low >= plan.S)
    if spec.is_causal:
        empty |= k_low > q_high
    if spec.window is not None:
        far = q_low - k_high > spec.window
        far = far if spec.is_causal else far | (k_low - q_high > spec.window)
        empty |= far & (k_low >= spec.global_tokens)
    return empty


def tile_is_full(plan, tables, b, i, j, rows=False, order=True):
    T, S, bq, bkv, spec = plan.T, plan.S, plan.block_q, plan.block_kv, plan.spec
    tests = []
    if S % bkv:
        tests.append(j < plan.kv_blocks - 1)
    if rows and T % bq:
        tests.append(i < plan.q_blocks - 1)
    if plan.static:
        q_low, q_high, k_low, k_high = i * bq, jnp.minimum((i + 1) * bq, T) - 1, j * bkv, (j + 1) * bkv - 1
        if spec.is_causal and order:
            tests.append(k_high <= q_low)
        if spec.window is not None:
            near = q_high - k_low <= spec.window
            near = near if spec.is_causal else near & (k_high - q_low <= spec.window)
            tests.append(near | (k_high < spec.global_tokens) if spec.global_tokens else near)
    else:
        tests.append(_full(plan, *_fields(plan, tables, b, i, j), order))
    return functools.reduce(lambda x, y: x & y, tests) if tests else True


def _fields(plan, tables, b, i, j):
    q = [tables.q_extent[(b * _Q_FIELDS + f) * plan.q_blocks + i] for f in range(_Q_FIELDS)]
    k = [tables.k_extent[(b * _K_FIELDS + f) * plan.kv_blocks + j] for f in range(_K_FIELDS)]
    return q, k


def _place(plan, b, i, blocks):
    return b * blocks + i if plan.batched else i

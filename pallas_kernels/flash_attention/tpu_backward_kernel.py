"""What one core does in attention's backward pass on a TPU; see `tpu_backward` for the order of the loops around it.

B batch, T query, S key, K kv heads, G query heads per kv head, H head dim, P value dim; U spans of queries, Q and C queries and keys of
a tile. Scores are held transposed, [C, Q].
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu
from pallas_kernels.flash_attention import ranges

LOG2E = float(np.log2(np.e))
FAR = np.iinfo(np.int32).max  # a position beyond every query's
EDGE = 256  # keys of a part of a tile that a static mask cuts


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Queries per span (a multiple of the tile's), queries and keys per tile."""
    span: int
    q: int
    kv: int


@dataclasses.dataclass(frozen=True)
class Shape:
    """Everything static that the kernel needs; H and P in whole lanes."""
    B: int
    K: int
    G: int
    U: int
    parts: int  # the (head, span) pairs of a kv head are split in so many, each with its own sums of dk and dv
    over: str | None  # what the parts split: "heads" or "spans"
    H: int
    P: int
    blocks: Blocks
    plan: ranges.Plan
    scale: float

    @property
    def tiles(self):
        return self.blocks.span // self.blocks.q

    @property
    def direct(self):
        """Each key block is met once, so its sums are complete when its loop ends."""
        return self.G * self.U == 1

    def place(self, p, g, u):
        """(batch row, kv head, part, query head, span) of a grid index."""
        part = p % self.parts
        p = p // self.parts
        g = part * (self.G // self.parts) + g if self.over == "heads" else g
        u = u * self.parts + part if self.over == "spans" else u
        b, k = p // self.K, p % self.K
        return b, k, part, k * self.G + g, u


def scratch(shape, bounded):
    size, widths = shape.blocks, (shape.H, shape.P)
    scratch = [pltpu.VMEM((size.span, shape.H), jnp.float32)]  # dq
    slots = 1 if shape.direct else 2
    scratch += [pltpu.VMEM((slots, size.kv, w), jnp.float32) for w in widths]  # dk, dv of this block; of the last one while it is written
    if bounded:
        scratch.append(pltpu.VMEM((3, size.kv, tpu.LANES), jnp.int32))  # low, high and segment of the keys, as columns
    if not shape.direct:
        scratch += [pltpu.VMEM((size.kv, w), jnp.float32) for w in widths]  # sums so far
        scratch += [pltpu.SMEM((4,), jnp.int32), pltpu.SemaphoreType.DMA((2,)), pltpu.SemaphoreType.DMA((2, 2))]
    return scratch


def kernel(shape, span_plan, bounded, rows_ref, columns_ref, q_extent_ref, k_extent_ref, q_ref, do_ref, k_ref, v_ref, stat_ref, *refs):
    refs = list(refs)
    take = lambda n: [refs.pop(0) for _ in range(n)]  # noqa: E731
    q_bounds_ref, k_bounds_ref = take(2) if bounded else (None, None)
    if not shape.direct:
        take(2)  # the zeros that the sums start from
    dq_ref, dk_ref, dv_ref, dq_sum, dk_sum, dv_sum = take(6)
    k_columns = take(1)[0] if bounded else None
    tables = ranges.Tables(rows_ref, columns_ref, q_extent_ref, k_extent_ref)
    step = pl.program_id(3)
    b, head, part, _, u = shape.place(*(pl.program_id(i) for i in range(3)))
    if shape.direct:
        j = step
    else:
        j = ranges.kv_block(span_plan, tables, b, u, step)
        live = step < ranges.kv_steps(span_plan, tables, b, u)
    start = ranges.q_block(shape.plan, tables, b, j, 0)
    end = start + ranges.q_steps(shape.plan, tables, b, j)
    start, end = jnp.maximum(start, u * shape.tiles), jnp.minimum(end, (u + 1) * shape.tiles)

    @pl.when(step == 0)
    def _():
        dq_sum[...] = jnp.zeros_like(dq_sum)

    def visit(slot):
        if bounded:
            for field in range(3):
                k_columns[field] = jnp.broadcast_to(k_bounds_ref[0, 0, field:field + 1], (tpu.LANES, shape.blocks.kv)).T
        sums = dq_sum, dk_sum.at[slot], dv_sum.at[slot]
        for x in sums[1:]:
            x[...] = jnp.zeros_like(x)
        body = functools.partial(_tile, shape, (q_ref, do_ref, k_ref, v_ref, stat_ref), (q_bounds_ref, k_columns), sums, j, u * shape.tiles)

        def one(i, _):
            full = ranges.tile_is_full(shape.plan, tables, b, i, j, rows=True)
            empty = ranges.tile_is_empty(shape.plan, tables, b, i, j)
            if full is not False:
                pl.when(full)(lambda: body(i, False))
            if full is not True:
                pl.when(jnp.logical_not(full | empty))(lambda: body(i, True))
            return _

        jax.lax.fori_loop(start, end, one, None)

    if shape.direct:
        visit(0)
        dk_ref[0] = (shape.scale * dk_sum[0]).astype(dk_ref.dtype)
        dv_ref[0] = dv_sum[0].astype(dv_ref.dtype)
    else:
        copies = Sums(shape, (dk_ref, dv_ref), (dk_sum, dv_sum), *refs, at=(part, b, head))
        first = (pl.program_id(1) == 0) & (pl.program_id(2) == 0) & (step == 0)
        copies.begin(first)
        pl.when(live & (start < end))(lambda: copies.around(j, visit))
        last = functools.reduce(lambda x, y: x & y, [pl.program_id(i) == pl.num_programs(i) - 1 for i in (1, 2, 3)])
        copies.end(last)

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        dq_ref[0] = (shape.scale * dq_sum[...]).astype(dq_ref.dtype)


class Sums:
    """dk and dv of a key block, summed in HBM over the (head, span) pairs that meet it. Copies overlap the loops around them."""

    def __init__(self, shape, sums_ref, new_ref, *scratch, at):
        *self.old_ref, self.state, self.read_sem, self.write_sem = scratch
        self.shape, self.sums_ref, self.new_ref, self.at = shape, sums_ref, new_ref, at

    def begin(self, first):
        @pl.when(first)
        def _():
            for i, value in enumerate((0, -1, 0, 0)):  # next slot, last key block, whether the write of slot 0, 1 is on its way
                self.state[i] = value

    def _here(self, n, j):
        part, b, head = self.at
        C, width = self.shape.blocks.kv, (self.shape.H, self.shape.P)[n]
        return self.sums_ref[n].at[part, b, pl.ds(j * C, C), pl.ds(head * width, width)]

    def _reads(self, j):
        return [pltpu.make_async_copy(self._here(n, j), self.old_ref[n], self.read_sem.at[n]) for n in (0, 1)]

    def _writes(self, j, slot):
        return [pltpu.make_async_copy(self.new_ref[n].at[slot], self._here(n, j), self.write_sem.at[slot, n]) for n in (0, 1)]

    def around(self, j, visit):
        """visit(slot) leaves the new terms in `new_ref[slot]`."""
        slot, last = self.state[0], self.state[1]
        other = 1 - slot
        self._finish_write(slot, True)
        self._finish_write(other, last == j)  # it writes what is read next
        reads = self._reads(j)
        for copy in reads:
            copy.start()
        visit(slot)
        for copy, new, old in zip(reads, self.new_ref, self.old_ref):
            copy.wait()
            new[slot] += old[...]
        for copy in self._writes(j, slot):
            copy.start()
        self.state[0], self.state[1], self.state[2 + slot] = other, j, 1

    def _finish_write(self, slot, wanted):
        @pl.when((self.state[2 + slot] == 1) & wanted)
        def _():
            for copy in self._writes(0, slot):  # a copy of the same size waits for any of them
                copy.wait()
            self.state[2 + slot] = 0

    def end(self, last):
        for slot in (0, 1):
            self._finish_write(slot, last)


def _tile(shape, inputs, bounds, sums, j, first_tile, i, masked):
    """Adds one tile to dq, dk and dv: query tile i (its rows are in the span that starts at first_tile), key block j."""
    plan, C = shape.plan, shape.blocks.kv
    parts = _parts(plan) if masked else 1
    c = C // parts
    add = functools.partial(_add, shape, inputs, bounds, sums, j, first_tile, i, masked=masked)
    if parts == 1:
        return add(pl.ds(0, C))

    def one(part, _):
        keys = pl.ds(pl.multiple_of(part * c, c), c)
        pl.when(_any_visible(plan, i, j * C + part * c, c))(lambda: add(keys))
        return _

    jax.lax.fori_loop(0, parts, one, None)


def _parts(plan):
    """A tile on the edge of a static mask is half empty: its keys are taken in parts, those out of sight left out."""
    edged = plan.static and (plan.spec.is_causal or plan.spec.window is not None)
    return plan.block_kv // EDGE if edged and plan.block_kv % EDGE == 0 else 1


def _any_visible(plan, i, k_low, keys):
    spec, q_low = plan.spec, i * plan.block_q
    q_high, k_high = q_low + plan.block_q - 1, k_low + keys - 1
    see = k_low < plan.S
    if spec.is_causal:
        see &= k_low <= q_high
    if spec.window is not None:
        near = q_low - k_high <= spec.window
        near = near if spec.is_causal else near & (k_low - q_high <= spec.window)
        see &= near | (k_low < spec.global_tokens)
    return see


def _add(shape, inputs, bounds, sums, j, first_tile, i, keys, masked):
    """The same for some of the block's keys."""
    q_ref, do_ref, k_ref, v_ref, stat_ref = inputs
    dq_sum, dk_sum, dv_sum = sums
    plan, Q = shape.plan, shape.blocks.q
    first_key = j * shape.blocks.kv + keys.start
    dtype = q_ref.dtype
    r = i - first_tile
    rows = pl.ds(pl.multiple_of(r * Q, Q), Q)
    q_QH, do_QP, k_CH, v_CP = q_ref[0, rows], do_ref[0, rows], k_ref[0, keys], v_ref[0, keys]
    if masked and plan.T % Q:
        q_QH, do_QP = (_zero_past(x, plan.T - i * Q) for x in (q_QH, do_QP))
    if masked and plan.S % shape.blocks.kv:
        k_CH, v_CP = (_zero_past(x, plan.S - first_key) for x in (k_CH, v_CP))
    dot = functools.partial(jax.lax.dot_general, precision=tpu.precision(dtype), preferred_element_type=jnp.float32)
    stats = stat_ref[0, 0, 0, r]
    lse_1Q, delta_1Q = stats[:1], stats[1:]
    s_CQ = dot(k_CH, q_QH, (((1,), (1,)), ((), ())))
    spec, slope = plan.spec, None
    if spec.soft_cap is None:
        s_CQ = s_CQ * (spec.scale * LOG2E)
    else:
        t = jnp.tanh(s_CQ * (spec.scale / spec.soft_cap))
        s_CQ, slope = t * (spec.soft_cap * LOG2E), 1.0 - t * t
    p_CQ = jnp.exp2(s_CQ - lse_1Q)
    if masked:
        p_CQ = jnp.where(_visible(shape, bounds, i, r, first_key, keys), p_CQ, 0.0)
    dp_CQ = dot(v_CP, do_QP, (((1,), (1,)), ((), ())))
    ds_CQ = p_CQ * (dp_CQ - delta_1Q)
    ds_CQ = (ds_CQ if slope is None else ds_CQ * slope).astype(dtype)
    dv_sum[keys] += dot(p_CQ.astype(dtype), do_QP, (((1,), (0,)), ((), ())))
    dk_sum[keys] += dot(ds_CQ, q_QH, (((1,), (0,)), ((), ())))
    dq_sum[rows] += dot(ds_CQ, k_CH, (((0,), (0,)), ((), ())))


def _zero_past(x, rows):
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) < rows, x, 0)


def _visible(shape, bounds, i, r, first_key, keys):
    """bool [C, Q], as mask.visible; rows that saw nothing or lie past T are zero already, by their logsumexp of +inf."""
    plan, Q, C = shape.plan, shape.blocks.q, keys.size
    spec, tests = plan.spec, []
    q_bounds_ref, k_columns = bounds
    if plan.static:
        iota = functools.partial(jax.lax.broadcasted_iota, jnp.int32, (C, Q))
        q_position, k_position = iota(1) + i * Q, iota(0) + first_key
        is_global = k_position < spec.global_tokens if spec.window is not None and spec.global_tokens else None
        low, high = interval(k_position, is_global, spec)
        if plan.S % shape.blocks.kv:
            tests.append(k_position < plan.S)
    else:
        fields = q_bounds_ref[0, 0, r]
        q_position = fields[:1]
        wide = lambda field: jnp.concatenate([k_columns[field, keys]] * (Q // tpu.LANES), 1)  # noqa: E731
        low, high = wide(0), wide(1)
        if plan.segmented:
            tests.append(fields[1:] == wide(2))
    if spec.is_causal or spec.window is not None or not plan.static:
        tests.append(q_position >= low)
    if spec.window is not None:
        tests.append(q_position <= high)
    return functools.reduce(lambda x, y: x & y, tests) if tests else True


def interval(position, is_global, spec):
    """(low, high): the positions of the queries that see a key, were there one segment."""
    low = high = None
    if spec.is_causal:
        low = position
    if spec.window is not None:
        window = min(spec.window, FAR // 2)
        high = jnp.minimum(position, FAR - 1 - window) + window
        low = low if spec.is_causal else position - window
        if is_global is not None:
            high = jnp.where(is_global, FAR - 1, high)
            low = low if spec.is_causal else jnp.where(is_global, -1, low)
    low = jnp.full_like(position, -1) if low is None else low
    high = jnp.full_like(position, FAR - 1) if high is None else high
    return low, high

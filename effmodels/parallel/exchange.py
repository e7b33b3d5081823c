"""Rows that travel between the shards of a mesh axis, each to the shard that it needs, and back the same way.

Every shard sorts its rows by destination. "padded": each (source, destination) pair has a fixed number of slots, and one `all_to_all` moves
all of them. "ragged": only rows that exist travel, and lie without gaps in the receiver's buffer (`jax.lax.ragged_all_to_all`: compiled for
TPUs, not executed on one; XLA has none for CPUs).
Letters: n shards, N tokens, M = N k choices of one shard, S rows to send, R rows of the receive buffer, E experts, e of one shard.
A row is an array [D], or [D / 128, 128], which a TPU moves faster.
"""
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.unwritten import unwritten


class Route(NamedTuple):
    """int32 [source, destination]: rows that travel, where they start among the source's sorted rows, and in the destination's buffer."""

    sizes: Any
    starts: Any
    places: Any


def pair_rows(batch, time, k, num_experts, shards, *, capacity=None, recv_bound=None):
    """Rows for which every pair of shards has room, of `batch` x `time` tokens on one shard; a receive buffer has `shards` times as many.

    Without recv_bound it is the worst case, exactly: the k experts of a token differ, and `capacity` (tokens that one expert takes of one
    row of the batch) limits what all of them can take. recv_bound: a multiple of the mean, tokens x k / shards.
    """
    worst = batch * min(time * k, num_experts // shards * (time if capacity is None else min(time, capacity)))
    return _bounded(worst, recv_bound, batch * time * k / shards)


def pair_copies(batch, time, copies, num_experts, shards, *, capacity=None, recv_bound=None):
    """`pair_rows` where a token travels once to each shard with experts of it, to at most `copies` shards."""
    worst = pair_rows(batch, time, 1, num_experts, shards, capacity=capacity)
    return _bounded(worst, recv_bound, batch * time * copies / shards)


def copies(k, shards, groups=1, top_groups=1):
    """To how many shards at most a token travels: its k experts lie in top_groups of that many groups."""
    reach = max(1, shards // groups) * top_groups if groups > 1 and (shards % groups == 0 or groups % shards == 0) else shards
    return min(k, shards, reach)


def _bounded(worst, recv_bound, mean):
    return worst if recv_bound is None else min(worst, math.ceil(recv_bound * mean))


def route(wanted_nn, form, rows):
    """The Route of wanted_nn[source, destination] rows into buffers of n x rows; what does not fit stays at its source."""
    n, starts_nn = wanted_nn.shape[0], _before(wanted_nn, 1)
    if form == "padded":
        places_nn = jnp.broadcast_to(rows * jnp.arange(n, dtype=jnp.int32)[:, None], (n, n))
        return Route(jnp.minimum(wanted_nn, rows), starts_nn, places_nn)
    places_nn = jnp.minimum(_before(wanted_nn, 0), n * rows)
    return Route(jnp.minimum(wanted_nn, n * rows - places_nn), starts_nn, places_nn)


class Exchange:
    """What shard `me` of n does with its rows: form "padded" or "ragged", room for n x rows rows at every receiver.

    counts_nE: int32, the rows that every shard has for every expert; shard d holds experts d e .. (d + 1) e - 1.
    """

    def __init__(self, form, rows, counts_nE, me, axis=None):
        n = counts_nE.shape[0]
        self.form, self.rows, self.me, self.axis, self.total = form, rows, me, axis, n * rows
        self.counts_nne = counts_nE.reshape(n, n, -1)
        self.route = route(jnp.sum(self.counts_nne, axis=-1, dtype=jnp.int32), form, rows)

    def send_order(self, ids_M, order_M, rank_M):
        """(choice_S, slot_M): the choice in each row to send, and the row of each choice; -1 for none.

        order_M sorts the choices by expert (id E: not routed), rank_M is its inverse.
        """
        n, _, e = self.counts_nne.shape
        starts_n, sizes_n = self.route.starts[self.me], self.route.sizes[self.me]
        to_M = jnp.minimum(ids_M // e, n - 1)
        behind_M = rank_M - starts_n[to_M]  # how many rows of the same pair come before it
        sent_M = (ids_M < n * e) & (behind_M < sizes_n[to_M])
        if self.form == "ragged":
            return order_M, jnp.where(sent_M, rank_M, -1)
        slot_R = jnp.arange(self.rows, dtype=jnp.int32)
        rank_nR = jnp.minimum(starts_n[:, None] + slot_R, ids_M.shape[0] - 1)
        choice_S = jnp.where(slot_R < sizes_n[:, None], order_M[rank_nR], -1).reshape(-1)
        return choice_S, jnp.where(sent_M, to_M * self.rows + behind_M, -1)

    def landing(self, ids_M, rank_M):
        """Where in its receiver's buffer the row of each choice lands, if it is sent."""
        to_M = jnp.minimum(ids_M // self.counts_nne.shape[2], self.counts_nne.shape[0] - 1)
        return self.route.places[self.me][to_M] + rank_M - self.route.starts[self.me][to_M]

    def received(self):
        """int32 [n, e + 1]: rows in the receive buffer from each source for each expert here, and the empty rows that follow them."""
        counts_ne, sizes_n, places_n = self.counts_nne[:, self.me], self.route.sizes[:, self.me], self.route.places[:, self.me]
        kept_ne = jnp.clip(sizes_n[:, None] - _before(counts_ne, 1), 0, counts_ne)
        gaps_n = jnp.append(places_n[1:], self.total) - places_n - sizes_n
        return jnp.concatenate([kept_ne, gaps_n[:, None]], axis=1).astype(jnp.int32)

    def offsets(self):
        """(there, back) for `ragged_all_to_all`: starts of what is sent, its sizes, where it lands at the receivers, sizes received."""
        (sizes, starts, places), me = self.route, self.me
        return (starts[me], sizes[me], places[me], sizes[:, me]), (places[:, me], sizes[:, me], starts[:, me], sizes[me])

    def take(self, k, x_N, choice_S, slot_M):
        """The rows to send, of x: choice m is row m % N; see `send_order`."""
        return take_rows(k, (self.form == "padded", True), x_N, choice_S, slot_M)

    def add(self, k, y_S, choice_S, slot_M):
        """For every n the sum of the rows of its k choices, those without a slot left out."""
        return sum_rows(k, (True, self.form == "padded"), y_S, slot_M, choice_S)

    def there(self, rows_S):
        """The received rows [R, ...]; those of no sender hold anything."""
        if self.form == "padded":
            return self._all_to_all(rows_S)
        return _ragged(self.axis, (rows_S.shape[0], self.total), rows_S, *self.offsets())

    def back(self, rows_R, sent):
        """Rows of the receive buffer returned to where they came from, [sent, ...]; those that were not sent hold anything."""
        if self.form == "padded":
            return self._all_to_all(rows_R)
        return _ragged(self.axis, (self.total, sent), rows_R, *self.offsets()[::-1])

    def _all_to_all(self, rows_S):
        blocks_nS = rows_S.reshape(-1, self.rows, *rows_S.shape[1:])
        return jax.lax.all_to_all(blocks_nS, self.axis, 0, 0, tiled=True).reshape(rows_S.shape)


def share_counts(counts_E, axis):
    """int32 [n, E]: the counts of every shard. An all-to-all of n copies: programs in which an all-gather is a defect need no exception."""
    n = jax.lax.axis_size(axis)
    return jax.lax.all_to_all(jnp.broadcast_to(counts_E, (n, *counts_E.shape)), axis, 0, 0, tiled=True)


def regroup(blocks_nL, total):
    """(index_R, inverse_R) that bring rows from blocks in the order (row, column) to blocks in the order (column, row).

    blocks_nL: int32 sizes of the blocks, which sum to `total`.
    """
    by_row, by_column = blocks_nL.reshape(-1), blocks_nL.T.reshape(-1)
    shift_nL = _before(by_column, 0).reshape(blocks_nL.T.shape).T - _before(by_row, 0).reshape(blocks_nL.shape)
    row_R = jnp.arange(total, dtype=jnp.int32)
    return row_R - _of_each_row(shift_nL.T.reshape(-1), by_column, row_R), row_R + _of_each_row(shift_nL.reshape(-1), by_row, row_R)


def _of_each_row(numbers, sizes, row_R):
    """The number of each row's block, as masked sums: `jnp.repeat` gathers them one after the other."""
    ends = jnp.cumsum(sizes, dtype=jnp.int32)[:, None]
    return jnp.sum(jnp.where((row_R >= ends - sizes[:, None]) & (row_R < ends), numbers[:, None], 0), axis=0)


def _before(x, axis):
    return jnp.cumsum(x, axis=axis, dtype=jnp.int32) - x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ragged(axis, sizes, rows_S, there, back):
    """Its gradient is the same exchange the other way round; jax's own rule would first exchange the offsets again."""
    # Not zeroed: on a TPU that takes as long as a third of the matmuls (docs/log.md).
    output = unwritten((sizes[1], *rows_S.shape[1:]), rows_S.dtype, after=rows_S)
    return jax.lax.ragged_all_to_all(rows_S, output, *there, axis_name=axis)


def _ragged_fwd(axis, sizes, rows_S, there, back):
    return _ragged(axis, sizes, rows_S, there, back), (there, back)


def _ragged_bwd(axis, sizes, offsets, dy_R):
    there, back = offsets
    return _ragged(axis, sizes[::-1], dy_R, back, there), None, None


_ragged.defvjp(_ragged_fwd, _ragged_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def take_rows(k, gaps, x_N, index_S, inverse_M):
    """Row index % N of x, [S, ...]; inverse_M (M = k N): the s with index[s] = m. gaps: whether index, and inverse, hold -1 for none.

    Both directions are gathers: no scatter-add, so gradients repeat bit for bit on every device.
    """
    return _filled(gaps[0], index_S, x_N[index_S % x_N.shape[0]])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def sum_rows(k, gaps, y_S, index_M, inverse_S):
    """The transpose of `take_rows`: for every n the sum of its k rows y[index[n]], y[index[N + n]], ..., always in that order; [N, ...]."""
    y_kN, index_kN = y_S[index_M % y_S.shape[0]].reshape(k, -1, *y_S.shape[1:]), index_M.reshape(k, -1)
    # Added one by one: a TPU's reduction over a leading dim takes longer. Gaps are left out here, since before it is a pass of its own.
    rows = (_filled(gaps[0], index_N, y_N) for index_N, y_N in zip(index_kN, y_kN))
    total = sum(y_N.astype(jnp.promote_types(y_S.dtype, jnp.float32)) for y_N in rows).astype(y_S.dtype)
    # Rows in tiles: without a barrier XLA brings all that are added into the layout of what follows, not their sum.
    return total if y_S.ndim == 2 else jax.lax.optimization_barrier(total)


def _filled(gaps, index_S, rows_S):
    return jnp.where(index_S.reshape(-1, *[1] * (rows_S.ndim - 1)) >= 0, rows_S, 0) if gaps else rows_S


def _keep_places(f):
    return lambda k, gaps, rows, index, inverse: (f(k, gaps, rows, index, inverse), (index, inverse))


def _transposed_by(f):
    return lambda k, gaps, places, dy: (f(k, gaps[::-1], dy, *places[::-1]), None, None)


take_rows.defvjp(_keep_places(take_rows), _transposed_by(sum_rows))
sum_rows.defvjp(_keep_places(sum_rows), _transposed_by(take_rows))


@jax.custom_vjp
def permuted(x_M, order_M, rank_M):
    """x[order], by sorting: a TPU gathers single numbers one after the other, 65,536 of them take 27 times as long (docs/log.md)."""
    return jax.lax.sort((rank_M, x_M), num_keys=1)[1]


permuted.defvjp(
    lambda x_M, order_M, rank_M: (permuted(x_M, order_M, rank_M), (order_M, rank_M)),
    lambda permutation, dy_M: (permuted(dy_M, *permutation[::-1]), None, None),
)

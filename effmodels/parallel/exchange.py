"""Rows that travel between the shards of a mesh axis, each to the shard that it needs, and back the same way.

Every shard sorts its rows by destination. "padded": each (source, destination) pair has a fixed number of slots, and one `all_to_all` moves
all of them. "ragged": only rows that exist travel, and lie without gaps in the receiver's buffer (`jax.lax.ragged_all_to_all`: compiled for
TPUs, not executed on one; XLA has none for CPUs).
Letters: n shards, M choices of one shard (tokens x k), S rows to send, R rows of the receive buffer, E experts, e of one shard, D model.
"""
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


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
    return worst if recv_bound is None else min(worst, math.ceil(recv_bound * batch * time * k / shards))


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

    def there(self, rows_SD):
        """The received rows [R, D]; those of no sender are 0."""
        if self.form == "padded":
            return self._all_to_all(rows_SD)
        return _ragged(self.axis, (rows_SD.shape[0], self.total), rows_SD, *self.offsets())

    def back(self, rows_RD, sent):
        """Rows of the receive buffer returned to where they came from, [sent, D]."""
        if self.form == "padded":
            return self._all_to_all(rows_RD)
        return _ragged(self.axis, (self.total, sent), rows_RD, *self.offsets()[::-1])

    def _all_to_all(self, rows_SD):
        return jax.lax.all_to_all(rows_SD.reshape(-1, self.rows, rows_SD.shape[1]), self.axis, 0, 0, tiled=True).reshape(rows_SD.shape)


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
    index_R = row_R - jnp.repeat(shift_nL.T.reshape(-1), by_column, total_repeat_length=total)
    return index_R, row_R + jnp.repeat(shift_nL.reshape(-1), by_row, total_repeat_length=total)


def _before(x, axis):
    return jnp.cumsum(x, axis=axis, dtype=jnp.int32) - x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ragged(axis, sizes, rows_SD, there, back):
    """Its gradient is the same exchange the other way round; jax's own rule would first exchange the offsets again."""
    output = jnp.zeros((sizes[1], rows_SD.shape[1]), rows_SD.dtype)
    return jax.lax.ragged_all_to_all(rows_SD, output, *there, axis_name=axis)


def _ragged_fwd(axis, sizes, rows_SD, there, back):
    return _ragged(axis, sizes, rows_SD, there, back), (there, back)


def _ragged_bwd(axis, sizes, offsets, dy_RD):
    there, back = offsets
    return _ragged(axis, sizes[::-1], dy_RD, back, there), None, None


_ragged.defvjp(_ragged_fwd, _ragged_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def take_rows(k, x_ND, index_R, inverse_M):
    """Row index % N of x, 0 where the index is -1; [R, D]. inverse_M (M = k N): the r with index[r] = m, or -1.

    Both directions are gathers: no scatter-add, so gradients repeat bit for bit on every device.
    """
    return jnp.where(index_R[:, None] >= 0, x_ND[index_R % x_ND.shape[0]], 0)


def _take_rows_fwd(k, x_ND, index_R, inverse_M):
    return take_rows(k, x_ND, index_R, inverse_M), (index_R, inverse_M)


def _take_rows_bwd(k, residuals, dy_RD):
    index_R, inverse_M = residuals
    dx_MD = take_rows(1, dy_RD, inverse_M, index_R)
    return jnp.sum(dx_MD.reshape(k, -1, dx_MD.shape[1]), axis=0), None, None


take_rows.defvjp(_take_rows_fwd, _take_rows_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def spread_rows(k, x_ND, order_M, rank_M):
    """`take_rows` where order is a permutation of all M = k N choices and rank its inverse: no row is missing; [M, D]."""
    return x_ND[order_M % x_ND.shape[0]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def sum_rows(k, y_MD, order_M, rank_M):
    """The transpose of `spread_rows`: for every n the sum of its k rows y[rank[n]], y[rank[N + n]], ..., always in that order; [N, D]."""
    y_kND = y_MD[rank_M].reshape(k, -1, y_MD.shape[1])
    # Added one by one: a TPU's reduction over a leading dim takes longer.
    return sum(y_ND.astype(jnp.promote_types(y_ND.dtype, jnp.float32)) for y_ND in y_kND).astype(y_MD.dtype)


def _keep_permutation(f):
    return lambda k, rows, order_M, rank_M: (f(k, rows, order_M, rank_M), (order_M, rank_M))


spread_rows.defvjp(_keep_permutation(spread_rows), lambda k, permutation, dy_MD: (sum_rows(k, dy_MD, *permutation), None, None))
sum_rows.defvjp(_keep_permutation(sum_rows), lambda k, permutation, dx_ND: (spread_rows(k, dx_ND, *permutation), None, None))


@jax.custom_vjp
def permuted(x_M, order_M, rank_M):
    """x[order], by sorting: a TPU gathers single numbers one after the other, 65,536 of them take 27 times as long (docs/log.md)."""
    return jax.lax.sort((rank_M, x_M), num_keys=1)[1]


permuted.defvjp(
    lambda x_M, order_M, rank_M: (permuted(x_M, order_M, rank_M), (order_M, rank_M)),
    lambda permutation, dy_M: (permuted(dy_M, *permutation[::-1]), None, None),
)

"""Tokens to the shards of their experts, and what the experts made of them back, inside `shard_map`.

A token travels once to each shard that holds experts of it (DeepSeek-V3, arXiv:2412.19437 section 3.2.2), where it is copied to each
of them and their results are added up; where its choices may all lie on different shards, each travels by itself. Weights and places of
choices travel beside.
Letters: n shards, N tokens, k choices of a token, M = N k, C shards to which a token travels, E experts, e of one shard, D model,
R rows of the experts here, Q rows that arrived here, L lanes.
"""
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from effmodels.config import ConfigError
from effmodels.parallel import exchange, ops

LANES = 128  # of a TPU; a row that travels fills them


class Way(NamedTuple):
    """How tokens reach experts of other shards."""

    form: str  # "padded" or "ragged"
    axis: tuple  # mesh axes that split the experts
    rows: int  # choices per pair of shards, see `exchange.pair_rows`
    copies: int | None  # shards to which a token travels at most, once; None: each choice travels by itself
    copy_rows: int | None  # tokens per pair of shards, see `exchange.pair_copies`
    may_overflow: bool
    row_axes: tuple  # mesh axes that split the tokens

    @property
    def once(self):
        """Whether a token travels once to each shard; else each of its choices travels by itself."""
        return self.copies is not None

    @property
    def arriving(self):
        """Rows [D] per pair of shards for which a receiver has room."""
        return self.copy_rows if self.once else self.rows


def way(form, axis, tokens, k, num_experts, shards, *, groups=(1, 1), capacity=None, recv_bound=None, row_axes=()):
    """The Way of tokens (rows of the batch, time) of each of so many shards; groups, capacity: as of `parallel.expert.expert_ffn`."""
    copies, bounds = exchange.copies(k, shards, *groups), {"capacity": capacity, "recv_bound": recv_bound}
    rows = exchange.pair_rows(*tokens, k, num_experts, shards, **bounds)
    if copies == k:
        return Way(form, axis, rows, None, None, recv_bound is not None, row_axes)
    copy_rows = exchange.pair_copies(*tokens, copies, num_experts, shards, **bounds)
    return Way(form, axis, rows, copies, copy_rows, recv_bound is not None, row_axes)


def there_and_back(x_ND, weights_M, ids_M, counts_E, ffn, way, implementation=None):
    """(y_ND, lost_kN): sums of ffn's rows over the choices of each token, and which choices were routed but found no room.

    ids: choice j N + n is the j-th of token n; E: not routed. ffn(rows_RD, sizes_e, weights_R) -> y_RD; rows sorted by expert, then 0.
    implementation: of the grouped matmuls that add copies up.
    The weights travel too: applied before the last matrix, its products are not made again, and not sent back, for the backward pass.
    """
    N, (E,) = x_ND.shape[0], counts_E.shape
    k, me, n = ids_M.shape[0] // N, jax.lax.axis_index(way.axis), jax.lax.axis_size(way.axis)
    order_M = jnp.argsort(ids_M, stable=True)
    rank_M = jnp.argsort(order_M)
    once = _once(ids_M.reshape(k, N), E // n, n, way.copies) if way.once else None
    shared_nE = exchange.share_counts(counts_E if once is None else jnp.append(counts_E, once.counts_n), way.axis)
    path = exchange.Exchange(way.form, way.rows, shared_nE[:, :E], me, way.axis)
    choice_S, slot_M = path.send_order(ids_M, order_M, rank_M)
    if once is None:
        landing_M = slot_M
    else:
        trip = exchange.Exchange(way.form, way.copy_rows, shared_nE[:, E:], me, way.axis)
        if trip.total >= 2**24:
            raise ConfigError(f"experts: {trip.total:,} rows arrive at a shard; numbers are exact to 16,777,216. Use a smaller batch.")
        order_CN = jnp.argsort(once.to_CN, stable=True)
        rank_CN = jnp.argsort(order_CN)
        copy_S, slot_CN = trip.send_order(once.to_CN, order_CN, rank_CN)
        landing_M = once.of_choices(jnp.where(slot_CN >= 0, trip.landing(once.to_CN, rank_CN), -1))
    lost_kN = ((ids_M < E) & ((slot_M < 0) | (landing_M < 0))).reshape(k, N)

    blocks = path.received()
    index_R, inverse_R = exchange.regroup(blocks, path.total)
    by_expert = functools.partial(exchange.take_rows, 1, (False, False))
    wide, lane_L = jnp.promote_types(weights_M.dtype, jnp.float32), jnp.arange(LANES)  # numbers of rows are exact in float32
    carried_ML = jnp.where(lane_L == 0, weights_M[:, None].astype(wide), jnp.where(lane_L == 1, landing_M[:, None], 0).astype(wide))
    # The barrier: of a row of which one lane is used XLA would gather that number alone, which takes longer than the row.
    carried_RL = jax.lax.optimization_barrier(by_expert(path.there(path.take(1, carried_ML, choice_S, slot_M)), index_R, inverse_R))
    sizes_e = jnp.sum(blocks[:, :-1], axis=0, dtype=jnp.int32)
    used_R = jnp.arange(path.total, dtype=jnp.int32) < jnp.sum(sizes_e)
    weights_R = kept(jnp.where(used_R, carried_RL[:, 0], 0).astype(weights_M.dtype))

    x_N = _tiles(x_ND)
    if once is None:
        rows_RD = kept(_flat(by_expert(path.there(path.take(k, x_N, choice_S, slot_M)), index_R, inverse_R)))
        y_R = _tiles(ffn(rows_RD, sizes_e, weights_R))
        y_N = path.add(k, path.back(by_expert(y_R, inverse_R, index_R), choice_S.shape[0]), choice_S, slot_M)
    else:
        copy_R = jax.lax.stop_gradient(carried_RL[:, 1]).astype(jnp.int32)
        copy_R = kept(jnp.where(used_R & (copy_R >= 0), copy_R, trip.total))
        # The barrier: merged with the copy of what is kept into its stack, the relayout takes twice as long.
        arrived_QD = kept(jax.lax.optimization_barrier(_flat(trip.there(trip.take(way.copies, x_N, copy_S, slot_CN)))))
        y_RD = ffn(expand(trip.total, implementation, arrived_QD, copy_R), sizes_e, weights_R)
        y_Q = _tiles(fold(trip.total, implementation, y_RD, copy_R))
        y_N = trip.add(way.copies, trip.back(y_Q, copy_S.shape[0]), copy_S, slot_CN)
    return _flat(y_N), lost_kN


def kept(x):
    """Remat policies may keep rows that reached their experts (`train.remat=save:dispatch`): the backward pass moves no token again."""
    return checkpoint_name(x, "dispatch")


def _tiles(x_ND):
    """[N, D / 128, 128], where D divides: a row is whole tiles of a TPU's memory, and moves as one piece."""
    N, D = x_ND.shape
    return x_ND.reshape(N, D // LANES, LANES) if D % LANES == 0 else x_ND


def _flat(x_N):
    return x_N.reshape(x_N.shape[0], -1)


class _Once(NamedTuple):
    """Copies of tokens, one for each shard with experts of it."""

    to_CN: jax.Array  # [C N]: the shard to which copy c of a token goes, n for none
    counts_n: jax.Array  # copies to each shard
    copy_kN: jax.Array  # the copy that serves a choice; -1, or C and more: there is none

    def of_choices(self, x_CN):
        """[M]: the number of each choice's copy, -1 without one. Masked sums: a TPU gathers single numbers one after the other."""
        x_CN = x_CN.reshape(-1, self.copy_kN.shape[1])
        found = sum(jnp.where(self.copy_kN == c, x_N + 1, 0) for c, x_N in enumerate(x_CN))
        return found.reshape(-1) - 1


def _once(ids_kN, e, n, copies):
    to_kN = ids_kN // e  # n: not routed
    same_kkN = to_kN[:, None] == to_kN
    j = jnp.arange(to_kN.shape[0])
    first_kN = (to_kN < n) & ~jnp.any(same_kkN & (j[:, None] > j)[..., None], axis=1)
    number_kN = jnp.cumsum(first_kN, axis=0, dtype=jnp.int32)  # from 1
    copy_kN = jnp.sum(jnp.where(same_kkN & first_kN, number_kN, 0), axis=1, dtype=jnp.int32) - 1
    chosen = (first_kN & (number_kN == c + 1) for c in range(copies))
    to_CN = jnp.stack([n + jnp.sum(jnp.where(c_kN, to_kN - n, 0), axis=0) for c_kN in chosen]).reshape(-1).astype(jnp.int32)
    return _Once(to_CN, jnp.sum(to_CN == jnp.arange(n)[:, None], axis=1, dtype=jnp.int32), copy_kN)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def expand(total, implementation, x_QD, copy_R):
    """Row copy[r] of the `total` rows of x for every r, [R, D]; copy[r] = total: any row."""
    return x_QD[jnp.minimum(copy_R, total - 1)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def fold(total, implementation, y_RD, copy_R):
    """The transpose of `expand`: sums of the rows with the same copy number, [total, D]; those of number `total` go nowhere.

    Their gradient is any row, as `expand` gives it: what is past the last group is masked there, and what found no room is NaN anyway.

    Rows in the order of their copies; the sums of LANES copies are one product with the rows' one-hot places among them, a group of a
    grouped matmul's second gradient: no scatter-add, so gradients repeat bit for bit on every device.
    """
    blocks = -(-total // LANES)
    copy_R, order_R = jax.lax.sort_key_val(copy_R, jnp.arange(copy_R.shape[0], dtype=jnp.int32))
    own_RL = (copy_R[:, None] % LANES == jnp.arange(LANES)).astype(y_RD.dtype)
    own_RL = jnp.where((copy_R < total)[:, None], own_RL, 0)
    sizes = jnp.sum(copy_R // LANES == jnp.arange(blocks)[:, None], axis=1, dtype=jnp.int32)
    sizes = sizes.at[-1].add(-jnp.sum((copy_R >= total) & (copy_R // LANES == blocks - 1), dtype=jnp.int32))
    nothing = jnp.zeros((blocks, LANES, y_RD.shape[1]), y_RD.dtype)
    _, transpose = jax.vjp(lambda w: ops.grouped_matmul(own_RL, w, sizes, implementation=implementation), nothing)
    return transpose(y_RD[order_R])[0].reshape(-1, y_RD.shape[1])[:total]


def _expand_fwd(total, implementation, x_QD, copy_R):
    return expand(total, implementation, x_QD, copy_R), copy_R


def _expand_bwd(total, implementation, copy_R, dy_RD):
    return fold(total, implementation, dy_RD, copy_R), None


def _fold_fwd(total, implementation, y_RD, copy_R):
    return fold(total, implementation, y_RD, copy_R), copy_R


def _fold_bwd(total, implementation, copy_R, dx_QD):
    return expand(total, implementation, dx_QD, copy_R), None


expand.defvjp(_expand_fwd, _expand_bwd)
fold.defvjp(_fold_fwd, _fold_bwd)

"""Which tile of rows a grid step visits, for which group: small tables made on the device and prefetched into scalar memory.

Groups are runs of rows. A tile that lies in one group is visited once; a tile that a border cuts is visited once per group with rows in
it, one visit after the other. So at most tiles + groups - 1 visits, of which the last ones may be idle.

M rows, E experts, G groups (the experts and the rows of no expert), V visits.
"""
import typing

import jax.numpy as jnp


class RowVisits(typing.NamedTuple):
    """[V] each. An idle visit has start == stop and repeats the blocks of the one before, so that it moves nothing."""
    out_tile: object  # tile that is written
    in_tile: object  # tile that is read: that of the last live visit where live is 0
    matrix: object  # expert
    start: object  # the visit owns the rows [start, stop) of its tile
    stop: object
    live: object  # 1: multiply; 0: rows of no group, which become 0
    opens: object  # 1 on the first live visit of an expert
    turn: object  # 0, 1, 0, 1, ... over the experts that have rows
    following: object  # the next expert that has rows, or -1
    experts: object  # how many have rows


class MatrixVisits(typing.NamedTuple):
    """[V] each. An empty expert has one visit, which owns no row and is both its first and its last. Idle visits are neither."""
    tile: object
    matrix: object
    start: object
    stop: object
    first: object  # 1 on the first visit of an expert
    last: object


def row_visits(group_sizes_E, M, rows):
    """RowVisits that write every tile of `rows` rows in order: each expert's rows, then those of no expert."""
    E, tiles = group_sizes_E.shape[0], -(-M // rows)
    starts_G, ends_G = _borders(group_sizes_E, M)
    count_G = _tiles_touched(starts_G, ends_G, rows)
    last_G = jnp.cumsum(count_G, dtype=jnp.int32)
    v_V = jnp.arange(tiles + min(E + 1, M) - 1, dtype=jnp.int32)
    used_V = v_V < last_G[-1]
    group_V, tile_V, start_V, stop_V = _visits(jnp.minimum(v_V, last_G[-1] - 1), starts_G, ends_G, count_G, last_G, rows)
    # The rows of no expert come last: their visits stay on the blocks of the last live one.
    live = last_G[E - 1]
    matrix_V, in_tile_V, _, _ = _visits(jnp.clip(v_V, 0, jnp.maximum(live - 1, 0)), starts_G, ends_G, count_G, last_G, rows)
    opens_V = (v_V < live) & (v_V == _at(matrix_V, last_G - count_G))
    has_rows_E, e_E = count_G[:E] > 0, jnp.arange(E, dtype=jnp.int32)
    turn_E = (jnp.cumsum(has_rows_E, dtype=jnp.int32) + 1) % 2
    following_E = jnp.where(has_rows_E & (e_E > e_E[:, None]), e_E, E).min(1)
    start_V, stop_V = jnp.where(used_V, start_V, 0), jnp.where(used_V, stop_V, 0)
    matrix_V = jnp.minimum(matrix_V, E - 1)
    return RowVisits(tile_V, in_tile_V, matrix_V, start_V, stop_V, (v_V < live).astype(jnp.int32), opens_V.astype(jnp.int32),
                     _at(matrix_V, turn_E), _at(matrix_V, jnp.where(following_E < E, following_E, -1)),
                     jnp.broadcast_to(has_rows_E.sum(dtype=jnp.int32), v_V.shape))


def matrix_visits(group_sizes_E, M, rows):
    """MatrixVisits that go through the experts in order, an empty one once."""
    E, tiles = group_sizes_E.shape[0], -(-M // rows)
    starts_E, ends_E = (x[:E] for x in _borders(group_sizes_E, M))
    count_E = jnp.maximum(_tiles_touched(starts_E, ends_E, rows), 1)
    last_E = jnp.cumsum(count_E, dtype=jnp.int32)
    v_V = jnp.arange(tiles + E - 1, dtype=jnp.int32)
    used_V = v_V < last_E[-1]
    clipped_V = jnp.minimum(v_V, last_E[-1] - 1)
    matrix_V, tile_V, start_V, stop_V = _visits(clipped_V, starts_E, ends_E, count_E, last_E, rows)
    stop_V = jnp.where(used_V, jnp.maximum(start_V, stop_V), start_V)
    first_V = used_V & (clipped_V == _at(matrix_V, last_E - count_E))
    last_V = used_V & (clipped_V == _at(matrix_V, last_E) - 1)
    return MatrixVisits(jnp.minimum(tile_V, tiles - 1), matrix_V, start_V, stop_V, first_V.astype(jnp.int32), last_V.astype(jnp.int32))


def _borders(group_sizes_E, M):
    """(first row, row after the last) [G]; the last group is the rows of no expert."""
    ends_E = jnp.minimum(jnp.cumsum(group_sizes_E.astype(jnp.int32), dtype=jnp.int32), M)
    return jnp.concatenate([jnp.zeros_like(ends_E[:1]), ends_E]), jnp.concatenate([ends_E, jnp.full_like(ends_E[:1], M)])


def _tiles_touched(starts, ends, rows):
    return jnp.where(ends > starts, (ends - 1) // rows - starts // rows + 1, 0)


def _visits(v_V, starts_G, ends_G, count_G, last_G, rows):
    """(group, tile, first row in the tile, row after the last) of the visits number v."""
    group_V = (last_G <= v_V[:, None]).sum(1, dtype=jnp.int32)
    tile_V = _at(group_V, starts_G // rows - (last_G - count_G)) + v_V
    start_V, stop_V = (jnp.clip(_at(group_V, x) - tile_V * rows, 0, rows) for x in (starts_G, ends_G))
    return group_V, tile_V, start_V, stop_V


def _at(group_V, x_G):
    """x[group]: a masked sum, which fuses, where a gather would be a loop."""
    return jnp.where(group_V[:, None] == jnp.arange(x_G.shape[0]), x_G, 0).sum(1, dtype=jnp.int32)

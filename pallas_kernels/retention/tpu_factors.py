"""Decay factors of one chunk inside a TPU kernel: from tables made once per head (constant decay), or from the decay array (by token).

C tokens of a chunk; lanes: of the keys (heads x H) or of the values (heads x P). A factor is (C, 1) or (C, lanes).
"""
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu
from pallas_kernels.retention import tpu_plan


class Factors(NamedTuple):
    pair: list  # per head (C, C): scale * decay from key s to query t, 0 where t does not see s; [t, s], or [s, t] with `keys_first`
    read_key: jax.Array  # scale * decay from the state before the chunk to query t, over the lanes of the keys
    read_value: jax.Array  # the same over the lanes of the values
    write_key: jax.Array  # decay from key s to the state after the chunk
    write_value: jax.Array
    keep: jax.Array  # (1, 1) or (1, value lanes): decay from the state before to the state after
    write_turned: jax.Array | None = None  # (1 or key lanes, C): write_key with time along lanes, where that is cheaper


def iota(shape, axis):
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def dot(a, b, contract=(1, 0)):
    return jax.lax.dot_general(a, b, (((contract[0],), (contract[1],)), ((), ())), precision=tpu.precision(a.dtype),
                               preferred_element_type=jnp.float32)


def scaled(x, factor, dtype):
    """x * factor, the product in float32."""
    return (x.astype(jnp.float32) * wide(factor, x.shape[1])).astype(dtype)


def outer(x, column, turned, y):
    """Sum over tokens of (factor * x)^T y, the factor as a column or turned."""
    if turned is None:
        return dot(scaled(x, column, x.dtype), y, (0, 0))
    return dot((x.T.astype(jnp.float32) * turned).astype(x.dtype), y)


def wide(factor, lanes):
    """A factor whose 128 lanes are equal, over another number of lanes."""
    if factor.shape[1] in (1, lanes):
        return factor
    return jnp.concatenate([factor] * -(-lanes // factor.shape[1]), axis=1)[:, :lanes]


def by_lane(per_head, lanes):
    """One value per head, (C, 1), (C, 128) or (1, 1) -> the value of each lane's head."""
    if len(per_head) == 1:
        return per_head[0]
    per_head = [x[:, :min(lanes, x.shape[1])] for x in per_head]
    out = per_head[0]
    head = iota((out.shape[0], lanes), 1) // (lanes // len(per_head))
    for j, x in enumerate(per_head[1:], 1):
        out = jnp.where(head == j, x, out)
    return out


def only_head(x, j, plan):
    """x with zeros in the lanes of other heads."""
    if plan.together == 1:
        return x
    mine = iota(x.shape, 1) // (x.shape[1] // plan.together) == j
    return jnp.where(mine, x.astype(jnp.float32), 0.0).astype(x.dtype)


def own_state(x, plan):
    """A product of keys and values with zeros where the key is of one head and the value of another."""
    if plan.together == 1:
        return x
    return jnp.where(iota(x.shape, 0) // plan.H == iota(x.shape, 1) // plan.P, x, 0.0)


def whole(valid, C):
    """Whether all C tokens are known to exist."""
    return isinstance(valid, int) and valid == C


def only_valid(x, valid):
    """x with zeros in the rows past the end, which may hold anything. valid: a number, or traced."""
    if whole(valid, x.shape[0]):
        return x
    return jnp.where(iota(x.shape, 0) < valid, x.astype(jnp.float32), 0.0).astype(x.dtype)


def tables(plan):
    """Scratch for a constant decay: pairs, and (read, write) over the lanes of the keys and of the values."""
    if plan.by_token:
        return []
    lanes = (128, 128) if plan.together == 1 else (plan.key_lanes, plan.value_lanes)
    shapes = [(plan.together, plan.C, plan.C), *((2, plan.C, n) for n in lanes)]
    return [pltpu.VMEM((plan.U, *shape), jnp.float32) for shape in shapes]


def side_by_side(kernel, plan):
    """The kernel of one row, for each row of a step of the grid: every ref has the rows in front."""
    def each(*refs):
        for u in range(plan.U):
            kernel(*(ref.at[u] for ref in refs))
    return each


def first(c, plan):
    """Decorates what the first step of a head does; without a branch if there is one step, so that rows overlap."""
    return (lambda f: f()) if plan.blocks == 1 else pl.when(c == 0)


def last(c, plan):
    """The same for the last step."""
    return (lambda f: f()) if plan.blocks == 1 else pl.when(c == plan.blocks - 1)


def fill(refs, decay_ref, plan, keys_first=False):
    """Writes the tables of this head."""
    pair_ref, key_ref, value_ref = refs
    g = [decay_ref[j, 0:1, 0:1] for j in range(plan.together)]
    distance = distances(plan.C, keys_first)
    for j in range(plan.together):
        pair_ref[j] = jnp.where(distance >= 0, jnp.exp2(g[j] * distance.astype(jnp.float32) + plan.log2_scale), 0.0)
    for ref in (key_ref, value_ref):
        ref[0] = _read(g, ref.shape[2], plan)
        ref[1] = _write(g, ref.shape[2], plan, plan.C)


def distances(C, keys_first):
    """(C, C): t - s."""
    distance = iota((C, C), 0) - iota((C, C), 1)
    return -distance if keys_first else distance


def _read(g, lanes, plan):
    time = iota((plan.C, lanes), 0).astype(jnp.float32)
    return jnp.exp2(by_lane(g, lanes) * (time + 1.0) + plan.log2_scale)


def _write(g, lanes, plan, valid):
    time = iota((plan.C, lanes), 0)
    left = jnp.maximum(valid - 1 - time, 0).astype(jnp.float32)
    return jnp.where(time < valid, jnp.exp2(by_lane(g, lanes) * left), 0.0)


def factors(decay_ref, refs, i, valid, plan, dtype, keys_first=False):
    """Of chunk i of the block, of which `valid` tokens exist. Tables of pairs lie as `fill` was told."""
    return _by_token(decay_ref, i, plan, dtype, keys_first) if plan.by_token else _constant(decay_ref, refs, valid, plan)


def _constant(decay_ref, refs, valid, plan):
    pair_ref, key_ref, value_ref = refs
    g = [decay_ref[j, 0:1, 0:1] for j in range(plan.together)]
    if whole(valid, plan.C):
        write_key, write_value = key_ref[1], value_ref[1]
    else:
        write_key, write_value = (_write(g, ref.shape[2], plan, valid) for ref in (key_ref, value_ref))
    keep = by_lane([jnp.exp2(x * jnp.float32(valid)) for x in g], plan.value_lanes)
    return Factors([pair_ref[j] for j in range(plan.together)], key_ref[0], value_ref[0], write_key, write_value, keep)


def _by_token(decay_ref, i, plan, dtype, keys_first):
    C = plan.C
    rows = [decay_ref[j, :, chunk_tokens(i, plan)] for j in range(plan.together)]
    causal = distances(C, keys_first) >= 0
    pair, read, write = [], [], []
    for row in rows:
        coarse, fine, fine_read, to_write, total, fine_total = (row[r:r + 1] for r in range(6))
        if dtype != jnp.float32:  # one part is precise enough
            coarse, fine, fine_read = jnp.zeros_like(coarse), coarse + fine, coarse + fine_read
        # Columns are dear: one for each part, of keys or of queries, and what is needed besides follows from them.
        column = _column(coarse) if dtype == jnp.float32 else 0.0
        fine_column = _column(fine if keys_first else fine_read)
        along, across = [column, fine_column], [coarse, fine_read if keys_first else fine]
        exponent = sum(y - wide(x, C) if keys_first else wide(x, C) - y for x, y in zip(along, across) if not isinstance(x, float))
        pair.append(jnp.where(causal, jnp.exp2(exponent), 0.0))
        if keys_first:  # the columns are sums of decays, at most 0, or infinite where a key is padding
            read.append(jnp.exp2(plan.log2_scale - jnp.abs(column + fine_column)))
            write.append(jnp.exp2((total[:, :1] - column) + (fine_total[:, :1] - fine_column)))
        else:
            read.append(jnp.exp2(column + fine_column))
            write.append(_column(jnp.exp2(to_write)))
    columns = [by_lane(factor, lanes) for factor in (read, write) for lanes in (plan.key_lanes, plan.value_lanes)]
    totals = [row[tpu_plan.TOTAL:tpu_plan.TOTAL + 1, :1] + row[tpu_plan.FINE_TOTAL:tpu_plan.FINE_TOTAL + 1, :1] for row in rows]
    keep = jnp.exp2(by_lane(totals, plan.value_lanes))
    write_turned = None
    if C % 128 == 0 and plan.key_lanes % 128 == 0:
        write_turned = _by_row([jnp.exp2(row[tpu_plan.WRITE:tpu_plan.WRITE + 1]) for row in rows], plan)
    return Factors(pair, *columns, keep, write_turned)


def chunk_tokens(i, plan):
    """Where chunk i lies in a block; i may be traced."""
    return slice(i * plan.C, (i + 1) * plan.C) if isinstance(i, int) else pl.ds(pl.multiple_of(i * plan.C, plan.C), plan.C)


def _column(row):
    """(1, C) -> a factor (C, 128), or (C, 1) where registers would not be full."""
    C = row.shape[1]
    if C % 128 == 0:
        return jnp.broadcast_to(row, (128, C)).T
    diagonal = iota((C, C), 0) == iota((C, C), 1)
    return jnp.sum(jnp.where(diagonal, row, 0.0), axis=1, keepdims=True)


def _by_row(per_head, plan):
    """(1, C) per head -> (1, C) for one head, else (key lanes, C)."""
    out = per_head[0]
    head = iota((plan.key_lanes, plan.C), 0) // plan.H
    for j, x in enumerate(per_head[1:], 1):
        out = jnp.where(head == j, x, out)
    return out

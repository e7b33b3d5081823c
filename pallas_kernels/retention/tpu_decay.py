"""The gradient of the log decay inside the backward kernel of retention on a TPU.

It is a sum over paths, each from a token (or the state before a chunk) to a token (or the state after it). A chunk gives its terms:
  pairs   per head [s, t]: weight of s to t, times its gradient         reads   [t, key lanes]: sum over lanes is what t reads of the state
  writes  [s, key lanes]: the same for what s writes into the state     kept    [1, value lanes]: what passes from state to state
A decay that is constant gets the sum of terms times the number of decays on their way, one number for a head: terms are added up over the
chunks, and weighed once. No term is the difference of others, so none loses digits. By token the terms of a block are kept in the dtype of
the inputs, and added up when its chunks are done: at once they would fill the registers; see `tpu_plan.decay_gradient`.
"""
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.retention.tpu_factors import chunk_tokens, distances, dot, iota, only_head, whole


class Terms(NamedTuple):
    """Refs of VMEM: sums over chunks, or by token the terms of every chunk of a block."""
    pairs: jax.Array  # [heads together, C or block, C]
    reads: jax.Array  # [C or block, key lanes]
    writes: jax.Array
    kept: jax.Array  # [8, value lanes]; by token the output


def scratch(plan, with_decay, dtype):
    """What `Terms` needs."""
    if not with_decay:
        return []
    tokens = plan.block if plan.by_token else plan.C
    shapes = [(plan.together, tokens, plan.C), (tokens, plan.key_lanes), (tokens, plan.key_lanes)]
    if plan.by_token:
        return [pltpu.VMEM((plan.U, *shape), dtype) for shape in shapes]
    return [pltpu.VMEM((plan.U, *shape), jnp.float32) for shape in (*shapes, (8, plan.value_lanes))]


def add_pairs(terms, j, rows, pairs, plan):
    """Of head j. By token without the diagonal: it would only cancel, and at strong decay it is all there is."""
    if plan.by_token:
        terms.pairs[j, rows] = jnp.where(distances(plan.C, keys_first=True) > 0, pairs, 0.0).astype(terms.pairs.dtype)
    else:
        terms.pairs[j] += pairs


def add_writes(terms, rows, valid, writes, plan):
    if plan.by_token:
        terms.writes[rows] = writes.astype(terms.writes.dtype)
        return
    if not whole(valid, plan.C):  # fewer decays are on the way to its end than in a whole chunk, whose weights all get
        time = iota(writes.shape, 0)
        writes *= jnp.maximum(valid - 1 - time, 0).astype(jnp.float32) / jnp.maximum(plan.C - 1 - time, 1).astype(jnp.float32)
    terms.writes[...] += writes


def add_reads(terms, rows, reads, plan):
    if plan.by_token:
        terms.reads[rows] = reads.astype(terms.reads.dtype)
    else:
        terms.reads[...] += reads


def add_kept(terms, rows, valid, kept, plan):
    if not plan.by_token:
        terms.kept[0:1] += kept * jnp.float32(valid)
        return
    for j in range(plan.together):
        terms.kept[j, :, rows] = jnp.broadcast_to(_sum(only_head(kept, j, plan)), (8, plan.C))


def write_total(out_ref, terms, plan):
    """The gradient of each head's log decay, from the sums over its chunks."""
    distance = distances(plan.C, keys_first=True).astype(jnp.float32)
    time = iota(terms.reads.shape, 0).astype(jnp.float32)
    lanes = terms.reads[...] * (time + 1.0) + terms.writes[...] * (plan.C - 1.0 - time)
    for j in range(plan.together):
        total = _sum(terms.pairs[j] * distance) + _sum(only_head(lanes, j, plan)) + _sum(only_head(terms.kept[0:1], j, plan))
        out_ref[j] = jnp.broadcast_to(total, (8, 128))


def write_rows(terms, plan, i, valid):
    """Rows e and f of each head for chunk i; z is there."""
    rows = chunk_tokens(i, plan)
    for j in range(plan.together):
        pairs = terms.pairs[j, rows]
        e = _ones(pairs, 0) - _ones(pairs, 1) + _ones(only_head(terms.reads[rows], j, plan), 1)
        terms.kept[j, 0:1, rows] = e[0:1]
        terms.kept[j, 1:2, rows] = _ones(only_head(terms.writes[rows], j, plan), 1)[0:1]


def _ones(x, axis):
    """Sum over an axis of x (C, any), as 8 equal rows: by the matrix unit, which turns them too."""
    return dot(jnp.ones((8, x.shape[axis]), x.dtype), x, (1, axis))


def _sum(x):
    return jnp.sum(jnp.sum(x, axis=0, keepdims=True), axis=1, keepdims=True)

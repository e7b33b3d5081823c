"""Experts: tokens to the experts that they chose, through grouped matmuls, and back.

Letters: B batch, T time, D model, F ffn, E experts, k choices per token, N tokens and M = N k choices of one shard, R rows of a buffer.
"""
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from effmodels.config import ConfigError
from effmodels.parallel import axes, exchange, ops, options
from pallas_kernels.target import target


def expert_ffn(
    x_BTD, ids_BTk, weights_BTk, w_in, w_out_EFD, activation, *, capacity=None, exact=False, return_overflow=False, implementation=None
):  # fmt: skip
    """Sum over k of weights * expert(x), each token computed by the experts named in ids; [B, T, D] in x's dtype.

    ids: int32 expert numbers, those of one token different; E (one past the last) means "not routed" (padding, dropped). w_in: the input
    matrices [E, D, F], one or two (gated). activation(h, ...) takes as many arrays. Dropless: rows are sorted by expert and multiplied
    group by group (MegaBlocks, arXiv:2211.15841). ffn columns may be split over the tensor axis, partial sums are added at the end.

    Experts that are split over a mesh axis stay where they are and tokens travel, as `parallel.experts` says; with "gather" the weights
    do. What `parallel.recv_bound` leaves no room for becomes NaN, so that the step fails; exact=True makes room for the worst case.
    capacity: tokens that one expert is asked for of one row at most, which makes buffers smaller. return_overflow: (y, how many choices of
    all shards found no room, float32). Raises ConfigError for sizes that do not divide.
    """
    mesh, num_experts = axes.current_mesh(), w_out_EFD.shape[0]
    columns, over, way = ops.weight_axes("expert_mlp", "batch", "seq"), _expert_axes(), None
    if columns or over:
        dims = ("expert" if over else None, "expert_mlp" if columns else None, None)
        axes.checked_spec(w_out_EFD.shape, dims, mesh=mesh, array="experts")
    if over:
        way = _way(over, x_BTD.shape, ids_BTk.shape[-1], num_experts, capacity, exact)
    names = tuple(f"w{i}" for i in range(len(w_in)))
    # Cast here, so that the sum of their gradients over other shards travels in the compute dtype.
    *w_in, w_out_EFD = (w.astype(x_BTD.dtype) for w in (*w_in, w_out_EFD))

    def local(x, ids, weights, w_out, **inputs):
        def ffn(rows_RD, group_sizes_e):
            def matmul(lhs, rhs):
                return ops.grouped_matmul(lhs, rhs, group_sizes_e, implementation=implementation)

            kept = (checkpoint_name(matmul(rows_RD, inputs[n]), "expert_mlp") for n in names)
            return matmul(activation(*kept), w_out)

        y, overflow = _routed(x, ids, weights, ffn, num_experts, way)
        y = jax.lax.psum(y, columns) if columns else y
        return (y, overflow) if return_overflow else y

    rows = ("batch", "seq", None)
    split, columns_spec = over if way else None, columns or None
    arrays = {"x": (x_BTD, rows), "ids": (ids_BTk, rows), "weights": (weights_BTk, rows)}
    arrays |= {"w_out": (w_out_EFD, PartitionSpec(split, columns_spec, None))}
    arrays |= {name: (w, PartitionSpec(split, None, columns_spec)) for name, w in zip(names, w_in)}
    return ops.run_sharded(local, arrays, (rows, ()) if return_overflow else rows)


class _Way(NamedTuple):
    """How tokens reach experts of other shards."""

    form: str  # "padded" or "ragged"
    axis: tuple  # mesh axes that split the experts
    rows: int  # per pair of shards, see `exchange.pair_rows`
    may_overflow: bool
    row_axes: tuple  # mesh axes that split the tokens


def _expert_axes():
    mesh, rules = axes.current_mesh(), axes.current_rules()
    return () if mesh is None else tuple(a for a in axes.as_tuple(rules["expert"]) if mesh.shape.get(a, 1) > 1)


def room(batch, time, k, num_experts, capacity=None):
    """(form, rows that each pair of shards has room for, those of the worst case, those of even loads) under the mesh in force.

    None where no token travels: experts that are not split, or parallel.experts="gather".
    """
    over = _expert_axes()
    way = _way(over, (batch, time), k, num_experts, capacity, exact=False) if over else None
    if way is None:
        return None
    even = batch * time * k // (axes.shards("batch") * axes.shards("seq") * math.prod(axes.current_mesh().shape[a] for a in over))
    return way.form, way.rows, _way(over, (batch, time), k, num_experts, capacity, exact=True).rows, even


def _way(over, shape, k, num_experts, capacity, exact):
    """The _Way of a batch of this shape over these mesh axes; None: the weights travel."""
    mesh, rules, chosen = axes.current_mesh(), axes.current_rules(), options.current()
    form, on_cpu = chosen.experts, target().platform == "cpu"
    if form == "auto":
        form = "padded" if on_cpu else "ragged"
    if form == "gather":
        return None
    if form == "ragged" and on_cpu:
        raise ConfigError("parallel.experts='ragged': XLA has no ragged all-to-all on CPUs. Use 'padded', or 'auto', which picks it there.")
    local = shape[0] // axes.shards("batch"), shape[1] // axes.shards("seq"), k, num_experts, math.prod(mesh.shape[a] for a in over)
    worst = exchange.pair_rows(*local, capacity=capacity)
    rows = worst if exact else exchange.pair_rows(*local, capacity=capacity, recv_bound=chosen.recv_bound)
    row_axes = tuple(a for dim in ("batch", "seq") for a in axes.as_tuple(rules[dim]) if mesh.shape.get(a, 1) > 1)
    return _Way(form, over, rows, rows < worst, row_axes)


def _routed(x_BTD, ids_BTk, weights_BTk, ffn, num_experts, way):
    """(y_BTD, overflow) of one shard; ffn(rows_RD, group_sizes) multiplies rows that are sorted by expert."""
    B, T, D = x_BTD.shape
    k, x_ND, ids_M = ids_BTk.shape[-1], x_BTD.reshape(B * T, D), ids_BTk.reshape(-1)
    order_M = jnp.argsort(ids_M, stable=True)
    rank_M = jnp.argsort(order_M)
    counts_E = jnp.bincount(ids_M, length=num_experts).astype(jnp.int32)
    overflow = jnp.zeros((), jnp.float32)
    if way is None:
        y_MD = exchange.take_rows(1, ffn(exchange.take_rows(k, x_ND, order_M, rank_M), counts_E), rank_M, order_M)
    else:
        y_MD, lost_M = _exchanged(x_ND, k, ids_M, (order_M, rank_M), counts_E, ffn, way)
        # A wrong result that looks right is worse than none.
        y_MD = jnp.where(lost_M[:, None], jnp.nan, y_MD)
        if way.may_overflow:
            overflow = jax.lax.psum(jnp.sum(lost_M, dtype=jnp.float32), way.row_axes)
    # In token order, so that sums are in a fixed order and repeat bit for bit.
    return jnp.einsum("BTkD,BTk->BTD", y_MD.reshape(B, T, k, D), weights_BTk.astype(y_MD.dtype)), overflow


def _exchanged(x_ND, k, ids_M, order, counts_E, ffn, way):
    """(y_MD, lost_M): each choice's output, computed where its expert is, and which choices were routed but found no room."""
    path = exchange.Exchange(way.form, way.rows, exchange.share_counts(counts_E, way.axis), jax.lax.axis_index(way.axis), way.axis)
    choice_S, slot_M = path.send_order(ids_M, *order)
    blocks = path.received()
    index_R, inverse_R = exchange.regroup(blocks, path.total)
    received_RD = path.there(exchange.take_rows(k, x_ND, choice_S, slot_M))
    y_RD = ffn(exchange.take_rows(1, received_RD, index_R, inverse_R), jnp.sum(blocks[:, :-1], axis=0, dtype=jnp.int32))
    returned_SD = path.back(exchange.take_rows(1, y_RD, inverse_R, index_R), choice_S.shape[0])
    return exchange.take_rows(1, returned_SD, slot_M, choice_S), (slot_M < 0) & (ids_M < counts_E.shape[0])

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
from effmodels.parallel import axes, exchange, ops, options, scatter
from pallas_kernels.target import target


def expert_ffn(
    x_BTD, ids_BTk, weights_BTk, w_in, w_out_EFD, activation, *, biases=(), capacity=None, exact=False, return_overflow=False,
    implementation=None,
):  # fmt: skip
    """Sum over k of weights * expert(x), each token computed by the experts named in ids; [B, T, D] in x's dtype.

    ids: int32 expert numbers, those of one token different; E (one past the last) means "not routed" (padding, dropped). w_in: the input
    matrices [E, D, F], one or two (gated). activation(h, ...) takes as many arrays. biases: none, or one per matrix, the last [E, D], the
    others [E, F]. Dropless: rows are sorted by expert and multiplied group by group (MegaBlocks, arXiv:2211.15841). ffn columns may be
    split over the tensor axis, partial sums are added at the end.

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
    # Cast here, so that the sum of their gradients over other shards travels in the compute dtype.
    *w_in, w_out_EFD = (w.astype(x_BTD.dtype) for w in (*w_in, w_out_EFD))
    parts, named_biases = len(w_in), {f"b{i}": b.astype(x_BTD.dtype) for i, b in enumerate(biases)}
    rings = scatter.rings(options.current().gradient_rings, "embed", taken=(*over, *columns))

    def local(x, ids, weights, w_out, **inputs):
        biases = [inputs.pop(f"b{i}") for i in range(len(named_biases))]
        if rings:
            w_out = scatter.gathered(w_out, rings, 2)
            inputs = {n: scatter.gathered(w, rings, 1) for n, w in inputs.items()}

        if columns and biases:  # of the partial sums one has the bias
            biases[-1] = jnp.where(jax.lax.axis_index(columns) == 0, biases[-1], 0)

        def ffn(rows_RD, group_sizes_e, weights_R):
            def matmul(lhs, rhs):
                return ops.grouped_matmul(lhs, rhs, group_sizes_e, implementation=implementation)

            w_in, b_in, R = list(inputs.values()), biases[:-1], rows_RD.shape[0]
            if parts > 1 and side_by_side(R, w_in[0].shape[0], w_in[0].shape[2]):
                # On the shard, since the gradient of what was joined before is summed whole.
                w_in, b_in = ([jnp.concatenate(a, axis=-1)] if a else [] for a in (w_in, b_in))
            kept = [checkpoint_name(matmul(rows_RD, w), "expert_mlp") for w in w_in]
            if biases:
                kept = [h_RF + of_each_row(b, group_sizes_e, R) for h_RF, b in zip(kept, b_in)]
            h_RF = activation(*(kept if len(kept) == parts else jnp.split(kept[0], parts, axis=-1)))
            y_RD = matmul((h_RF * weights_R[:, None]).astype(rows_RD.dtype), w_out)
            if biases:
                y_RD = y_RD + (of_each_row(biases[-1], group_sizes_e, R) * weights_R[:, None]).astype(y_RD.dtype)
            return y_RD

        y, overflow = _routed(x, ids, weights, ffn, num_experts, way)
        y = jax.lax.psum(y, columns) if columns else y
        return (y, overflow) if return_overflow else y

    rows = ("batch", "seq", None)
    split, columns_spec, wide = over if way else None, columns or None, tuple(a for ring in rings for a in ring) or None
    arrays = {"x": (x_BTD, rows), "ids": (ids_BTk, rows), "weights": (weights_BTk, rows)}
    arrays |= {"w_out": (w_out_EFD, PartitionSpec(split, columns_spec, wide))}
    arrays |= {f"w{i}": (w, PartitionSpec(split, wide, columns_spec)) for i, w in enumerate(w_in)}
    arrays |= {n: (b, PartitionSpec(split, columns_spec if n != f"b{parts}" else None)) for n, b in named_biases.items()}
    return ops.run_sharded(local, arrays, (rows, ()) if return_overflow else rows)


def side_by_side(rows, experts, columns):
    """Whether gates and inputs of a shard's experts are joined: the rows are read once, and their gradient is one product, not a sum.

    Copied for that, the matrices must be smaller than the rows.
    """
    return rows >= 2 * experts * columns


def of_each_row(vectors_eF, group_sizes_e, rows):
    """[R, F]: the vector of each row's expert, 0 past the last group; rows are sorted by expert.

    A product with a one-hot matrix: its gradient is one too, where a gather's would add rows up one after the other.
    """
    ends_e, row_R = jnp.cumsum(group_sizes_e, dtype=jnp.int32), jnp.arange(rows, dtype=jnp.int32)[:, None]
    own_Re = (row_R >= ends_e - group_sizes_e) & (row_R < ends_e)
    return jnp.matmul(own_Re.astype(vectors_eF.dtype), vectors_eF, precision="highest")


LANES = 128  # a row that travels fills them


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
    """(y_BTD, overflow) of one shard; ffn(rows_RD, group_sizes, weights_R) multiplies rows that are sorted by expert.

    Choice m = j N + n is the j-th of token n: with the k choices outermost, [M, D] splits into k arrays of tokens without a relayout.
    """
    B, T, D = x_BTD.shape
    k, x_ND = ids_BTk.shape[-1], x_BTD.reshape(B * T, D)
    ids_M, weights_M = (a.reshape(B * T, k).T.reshape(-1) for a in (ids_BTk, weights_BTk))
    order_M = jnp.argsort(ids_M, stable=True)
    rank_M = jnp.argsort(order_M)
    counts_E = jnp.sum(ids_M == jnp.arange(num_experts, dtype=ids_M.dtype)[:, None], axis=1, dtype=jnp.int32)
    overflow = jnp.zeros((), jnp.float32)
    if way is None:
        # Weighted before the last matrix, so that the backward pass needs none of its products, neither to compute nor to sort back.
        weights_R = exchange.permuted(weights_M, order_M, rank_M)
        y_RD = ffn(exchange.spread_rows(k, x_ND, order_M, rank_M), counts_E, weights_R)
        return exchange.sum_rows(k, y_RD, order_M, rank_M).reshape(B, T, D), overflow
    y_MD, lost_M = _exchanged(x_ND, weights_M, k, ids_M, (order_M, rank_M), counts_E, ffn, way)
    # A wrong result that looks right is worse than none.
    y_MD = jnp.where(lost_M[:, None], jnp.nan, y_MD)
    if way.may_overflow:
        overflow = jax.lax.psum(jnp.sum(lost_M, dtype=jnp.float32), way.row_axes)
    # In token order, so that sums are in a fixed order and repeat bit for bit.
    return jnp.sum(y_MD.reshape(k, B, T, D), axis=0), overflow


def _exchanged(x_ND, weights_M, k, ids_M, order, counts_E, ffn, way):
    """(y_MD, lost_M): each choice's weighted output, computed where its expert is, and which choices were routed but found no room.

    The weights travel too: applied before the last matrix, its products are not made again, and not sent back, for the backward pass.
    """
    path = exchange.Exchange(way.form, way.rows, exchange.share_counts(counts_E, way.axis), jax.lax.axis_index(way.axis), way.axis)
    choice_S, slot_M = path.send_order(ids_M, *order)
    blocks = path.received()
    index_R, inverse_R = exchange.regroup(blocks, path.total)
    received_RD = path.there(exchange.take_rows(k, x_ND, choice_S, slot_M))
    weights_ML = jnp.broadcast_to(weights_M[:, None], (*weights_M.shape, LANES))
    weights_RL = exchange.take_rows(1, path.there(exchange.take_rows(1, weights_ML, choice_S, slot_M)), index_R, inverse_R)
    rows_RD, sizes_e = exchange.take_rows(1, received_RD, index_R, inverse_R), jnp.sum(blocks[:, :-1], axis=0, dtype=jnp.int32)
    y_RD = ffn(rows_RD, sizes_e, weights_RL[:, 0])
    returned_SD = path.back(exchange.take_rows(1, y_RD, inverse_R, index_R), choice_S.shape[0])
    return exchange.take_rows(1, returned_SD, slot_M, choice_S), (slot_M < 0) & (ids_M < counts_E.shape[0])

"""Experts: tokens to the experts that they chose, through grouped matmuls, and back.

Letters: B batch, T time, D model, F ffn, E experts, k choices per token, N tokens and M = N k choices of one shard, R rows of a buffer.
"""
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from effmodels.config import ConfigError
from effmodels.parallel import axes, exchange, ops, options, scatter, travel
from pallas_kernels.target import target


def expert_ffn(
    x_BTD, ids_BTk, weights_BTk, w_in, w_out_EFD, activation, *, biases=(), capacity=None, groups=(1, 1), exact=False,
    return_overflow=False, implementation=None,
):  # fmt: skip
    """Sum over k of weights * expert(x), each token computed by the experts named in ids; [B, T, D] in x's dtype.

    ids: int32 expert numbers, those of one token different; E (one past the last) means "not routed" (padding, dropped). w_in: the input
    matrices [E, D, F], one or two (gated). activation(h, ...) takes as many arrays. biases: none, or one per matrix, the last [E, D], the
    others [E, F]. Dropless: rows are sorted by expert and multiplied group by group (MegaBlocks, arXiv:2211.15841). ffn columns may be
    split over the tensor axis, partial sums are added at the end.

    Experts that are split over a mesh axis stay where they are and tokens travel, as `parallel.experts` says; with "gather" the weights
    do. What `parallel.recv_bound` leaves no room for becomes NaN, so that the step fails; exact=True makes room for the worst case.
    capacity: tokens that one expert is asked for of one row at most; groups: (number of equal groups of experts, of how many of them a
    token's experts are at most): both make buffers smaller. return_overflow: (y, how many choices of all shards found no room, float32).
    Raises ConfigError for sizes that do not divide.
    """
    mesh, num_experts = axes.current_mesh(), w_out_EFD.shape[0]
    columns, over, way = ops.weight_axes("expert_mlp", "batch", "seq"), _expert_axes(), None
    if columns or over:
        dims = ("expert" if over else None, "expert_mlp" if columns else None, None)
        axes.checked_spec(w_out_EFD.shape, dims, mesh=mesh, array="experts")
    if over:
        way = _way(over, x_BTD.shape, ids_BTk.shape[-1], num_experts, capacity, exact, groups)
    # Cast here, so that the sum of their gradients over other shards travels in the compute dtype.
    *w_in, w_out_EFD = (w.astype(x_BTD.dtype) for w in (*w_in, w_out_EFD))
    parts, named_biases = len(w_in), {f"b{i}": b.astype(x_BTD.dtype) for i, b in enumerate(biases)}
    rings = scatter.rings(options.current().gradient_rings, "embed", taken=(*over, *columns))
    if rings and x_BTD.shape[2] % (pieces := math.prod(mesh.shape[a] for ring in rings for a in ring)):
        raise ConfigError(f"parallel.gradient_rings: experts of width {x_BTD.shape[2]} cannot be split over {pieces}; choose others.")

    def local(x, ids, weights, w_out, **inputs):
        *b_in, b_out = (inputs.pop(f"b{i}") for i in range(len(named_biases))) if biases else (None,)
        w_in, out_layout = list(inputs.values()), "EKN"
        if rings:
            # What is split is joined and turned before it is gathered, where it is small. Of the last dim, what arrives would be copied.
            w_in = [scatter.gathered(w, rings, 1) for w in joined(w_in)]
            b_in, w_out, out_layout = joined(b_in), scatter.gathered(w_out.swapaxes(1, 2), rings, 1), "ENK"
        if columns and biases:  # of the partial sums one has the bias
            b_out = jnp.where(jax.lax.axis_index(columns) == 0, b_out, 0)

        def ffn(rows_RD, group_sizes_e, weights_R):
            def matmul(lhs, rhs, layout="EKN"):
                return ops.grouped_matmul(lhs, rhs, group_sizes_e, rhs_layout=layout, implementation=implementation)

            matrices, vectors, R = w_in, b_in, rows_RD.shape[0]
            if len(w_in) > 1 and side_by_side(R, w_in[0].shape[0], w_in[0].shape[2]):
                # On the shard, since the gradient of what was joined before is summed whole.
                matrices, vectors = joined(w_in), joined(b_in)
            kept = [checkpoint_name(matmul(rows_RD, w), "expert_mlp") for w in matrices]
            if biases:
                kept = [h_RF + of_each_row(b, group_sizes_e, R) for h_RF, b in zip(kept, vectors)]
            h_RF = activation(*(kept if len(kept) == parts else jnp.split(kept[0], parts, axis=-1)))
            y_RD = matmul((h_RF * weights_R[:, None]).astype(rows_RD.dtype), w_out, out_layout)
            if biases:
                y_RD = y_RD + (of_each_row(b_out, group_sizes_e, R) * weights_R[:, None]).astype(y_RD.dtype)
                # Past the last group the gradient of y may be anything, and a one-hot matrix times that is no zero.
                y_RD = jnp.where((jnp.arange(R) < jnp.sum(group_sizes_e))[:, None], y_RD, 0)
            return y_RD

        y, overflow = _routed(x, ids, weights, ffn, num_experts, way, implementation)
        y = jax.lax.psum(y, columns) if columns else y
        return (y, overflow) if return_overflow else y

    rows = ("batch", "seq", None)
    split, columns_spec, wide = over if way else None, columns or None, tuple(a for ring in rings for a in ring) or None
    arrays = {"x": (x_BTD, rows), "ids": (ids_BTk, rows), "weights": (weights_BTk, rows)}
    arrays |= {"w_out": (w_out_EFD, PartitionSpec(split, columns_spec, wide))}
    arrays |= {f"w{i}": (w, PartitionSpec(split, wide, columns_spec)) for i, w in enumerate(w_in)}
    arrays |= {n: (b, PartitionSpec(split, columns_spec if n != f"b{parts}" else None)) for n, b in named_biases.items()}
    return ops.run_sharded(local, arrays, (rows, ()) if return_overflow else rows)


def joined(arrays):
    """Gates and inputs as one list entry, side by side; [] of none."""
    return [jnp.concatenate(arrays, axis=-1)] if arrays else []


def side_by_side(rows, experts, columns):
    """Whether gates and inputs of a shard's experts are joined: the rows are read once, and their gradient is one product, not a sum.

    Copied for that, the matrices must be smaller than the rows.
    """
    return rows >= 4 * experts * columns


def of_each_row(vectors_eF, group_sizes_e, rows):
    """[R, F]: the vector of each row's expert, 0 past the last group; rows are sorted by expert.

    A product with a one-hot matrix: its gradient is one too, where a gather's would add rows up one after the other.
    """
    ends_e, row_R = jnp.cumsum(group_sizes_e, dtype=jnp.int32), jnp.arange(rows, dtype=jnp.int32)[:, None]
    own_Re = (row_R >= ends_e - group_sizes_e) & (row_R < ends_e)
    return jnp.matmul(own_Re.astype(vectors_eF.dtype), vectors_eF, precision="highest")


def _expert_axes():
    mesh, rules = axes.current_mesh(), axes.current_rules()
    return () if mesh is None else tuple(a for a in axes.as_tuple(rules["expert"]) if mesh.shape.get(a, 1) > 1)


def room(batch, time, k, num_experts, capacity=None, groups=(1, 1)):
    """(Way, rows that each pair of shards has room for in the worst case, those of even loads) under the mesh in force.

    None where no token travels: experts that are not split, or parallel.experts="gather".
    """
    over = _expert_axes()
    way = _way(over, (batch, time), k, num_experts, capacity, False, groups) if over else None
    if way is None:
        return None
    even = batch * time * k // (axes.shards("batch") * axes.shards("seq") * math.prod(axes.current_mesh().shape[a] for a in over))
    return way, _way(over, (batch, time), k, num_experts, capacity, True, groups).rows, even


def _way(over, shape, k, num_experts, capacity, exact, groups):
    """The Way of a batch of this shape over these mesh axes; None: the weights travel."""
    mesh, rules, chosen = axes.current_mesh(), axes.current_rules(), options.current()
    form, on_cpu = chosen.experts, target().platform == "cpu"
    if form == "auto":
        form = "padded" if on_cpu else "ragged"
    if form == "gather":
        return None
    if form == "ragged" and on_cpu:
        raise ConfigError("parallel.experts='ragged': XLA has no ragged all-to-all on CPUs. Use 'padded', or 'auto', which picks it there.")
    tokens, shards = (shape[0] // axes.shards("batch"), shape[1] // axes.shards("seq")), math.prod(mesh.shape[a] for a in over)
    row_axes = tuple(a for dim in ("batch", "seq") for a in axes.as_tuple(rules[dim]) if mesh.shape.get(a, 1) > 1)
    bounds = {"capacity": capacity, "recv_bound": None if exact else chosen.recv_bound}
    return travel.way(form, over, tokens, k, num_experts, shards, groups=groups, row_axes=row_axes, **bounds)


def _routed(x_BTD, ids_BTk, weights_BTk, ffn, num_experts, way, implementation):
    """(y_BTD, overflow) of one shard; ffn(rows_RD, group_sizes, weights_R) multiplies rows that are sorted by expert.

    Choice m = j N + n is the j-th of token n: with the k choices outermost, [M, D] splits into k arrays of tokens without a relayout.
    """
    B, T, D = x_BTD.shape
    k, x_ND = ids_BTk.shape[-1], x_BTD.reshape(B * T, D)
    ids_M, weights_M = (a.reshape(B * T, k).T.reshape(-1) for a in (ids_BTk, weights_BTk))
    counts_E = jnp.sum(ids_M == jnp.arange(num_experts, dtype=ids_M.dtype)[:, None], axis=1, dtype=jnp.int32)
    overflow = jnp.zeros((), jnp.float32)
    if way is None:
        order_M = jnp.argsort(ids_M, stable=True)
        rank_M = jnp.argsort(order_M)
        # Weighted before the last matrix, so that the backward pass needs none of its products, neither to compute nor to sort back.
        weights_R = travel.kept(exchange.permuted(weights_M, order_M, rank_M))
        y_RD = ffn(travel.kept(exchange.take_rows(k, (False, False), x_ND, order_M, rank_M)), counts_E, weights_R)
        return exchange.sum_rows(k, (False, False), y_RD, rank_M, order_M).reshape(B, T, D), overflow
    y_ND, lost_kN = travel.there_and_back(x_ND, weights_M, ids_M, counts_E, ffn, way, implementation)
    if way.may_overflow:
        overflow = jax.lax.psum(jnp.sum(lost_kN, dtype=jnp.float32), way.row_axes)
    # A wrong result that looks right is worse than none.
    return jnp.where(jnp.any(lost_kN, axis=0)[:, None], jnp.nan, y_ND).reshape(B, T, D), overflow

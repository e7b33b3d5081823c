"""Experts: tokens to the experts that they chose, through grouped matmuls, and back.

Letters: B batch, T time, D model, F ffn, E experts, k choices per token, M = rows of one shard (tokens x k).
"""
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from effmodels.parallel import axes, ops


def expert_ffn(x_BTD, ids_BTk, weights_BTk, w_in, w_out_EFD, activation, *, implementation=None):
    """Sum over k of weights * expert(x), each token computed by the experts named in ids; [B, T, D] in x's dtype.

    ids: int32 expert numbers; E (one past the last) means "not routed" (padding, dropped). w_in: the input matrices [E, D, F], one or two
    (gated). activation(h, ...) takes as many arrays. Dropless: rows are sorted by expert and multiplied group by group (MegaBlocks,
    arXiv:2211.15841). Every shard sorts its own tokens; ffn columns may be split over the tensor axis, partial sums are added at the end.
    """
    num_experts = w_out_EFD.shape[0]
    names = tuple(f"w{i}" for i in range(len(w_in)))
    partial_axes = ops.weight_axes("expert_mlp", "batch")

    def local(x, ids, weights, w_out, **inputs):
        y = _sorted_ffn(x, ids, weights, [inputs[n] for n in names], w_out, activation, num_experts, implementation)
        return jax.lax.psum(y, partial_axes) if partial_axes else y

    rows = ("batch", None, None)
    if partial_axes:  # refuses a width that does not divide
        axes.checked_spec(w_out_EFD.shape, (None, "expert_mlp", None), mesh=axes.current_mesh(), array="experts")
    columns = partial_axes or None
    arrays = {"x": (x_BTD, rows), "ids": (ids_BTk, rows), "weights": (weights_BTk, rows)}
    arrays |= {"w_out": (w_out_EFD, PartitionSpec(None, columns, None))}
    arrays |= {name: (w, PartitionSpec(None, None, columns)) for name, w in zip(names, w_in)}
    return ops.run_sharded(local, arrays, rows)


def _sorted_ffn(x_BTD, ids_BTk, weights_BTk, w_in, w_out_EFD, activation, num_experts, implementation):
    B, T, D = x_BTD.shape
    k = ids_BTk.shape[-1]
    ids_M = ids_BTk.reshape(-1)
    order_M = jnp.argsort(ids_M, stable=True)
    group_sizes_E = jnp.bincount(ids_M, length=num_experts).astype(jnp.int32)
    rows_MD = x_BTD.reshape(B * T, D)[order_M // k]

    def matmul(lhs, rhs):
        return ops.grouped_matmul(lhs, rhs.astype(lhs.dtype), group_sizes_E, implementation=implementation)

    y_MD = matmul(activation(*(matmul(rows_MD, w) for w in w_in)), w_out_EFD)
    # Back to token order by the inverse permutation: a gather, so that sums are in a fixed order and repeat bit for bit.
    y_BTkD = y_MD[jnp.argsort(order_M)].reshape(B, T, k, D)
    return jnp.einsum("BTkD,BTk->BTD", y_BTkD, weights_BTk.astype(y_MD.dtype))

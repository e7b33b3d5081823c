"""Grouped matmul as a dense one-hot einsum over all experts in float32: the slow twin.

M rows, K in, N out, E experts.
"""
import jax.numpy as jnp

from pallas_kernels.checks import accumulator


def multiply(lhs_MK, rhs_EKN, group_sizes_E, rhs_scale_EN, transposed=False):
    """out [M,N] in the dtype of lhs; transposed: rhs is [E,N,K]."""
    rhs_EKN = rhs_EKN.swapaxes(1, 2) if transposed else rhs_EKN
    dtype = accumulator(lhs_MK.dtype)
    ends_E = jnp.cumsum(group_sizes_E)
    row_M1 = jnp.arange(lhs_MK.shape[0])[:, None]
    mine_ME = (row_M1 >= ends_E - group_sizes_E) & (row_M1 < ends_E)
    used_M1 = mine_ME.any(1, keepdims=True)
    lhs_MK = jnp.where(used_M1, lhs_MK, 0)  # a row of no group may hold nan, which 0 * nan would spread
    w_EKN = rhs_EKN.astype(dtype)
    if rhs_scale_EN is not None:
        w_EKN = w_EKN * rhs_scale_EN.astype(dtype)[:, None, :]
    out_MN = jnp.einsum("me,mk,ekn->mn", mine_ME.astype(dtype), lhs_MK.astype(dtype), w_EKN, precision="highest")
    return jnp.where(used_M1, out_MN, 0).astype(lhs_MK.dtype)  # its gradient may be nan too

"""Grouped matmul on a Hopper GPU, out and both gradients from `gpu_products`. bfloat16 and float16.

M rows sorted by group, K in, N out, E groups.
"""
import functools

import jax
import jax.numpy as jnp

from pallas_kernels import gpu
from pallas_kernels.grouped_matmul import gpu_products


def unsupported(lhs_MK, rhs_EKN, group_sizes_E, rhs_scale_EN, transposed=False):
    """Why this kernel cannot run these inputs, or None."""
    if reason := gpu.unsupported_here() or gpu.unsupported_dtype(lhs_MK.dtype):
        return reason
    if not jnp.issubdtype(rhs_EKN.dtype, jnp.floating):
        return "int8 matrices are not widened in shared memory yet"
    if rhs_scale_EN is not None:
        return "a scale per column is not applied before the sums are rounded yet"
    return None


def multiply(lhs_MK, rhs_EKN, group_sizes_E, rhs_scale_EN, transposed=False, *, interpret=False):
    """out [M,N] in the dtype of lhs; transposed: rhs is [E,N,K]."""
    return _multiply(transposed, interpret, lhs_MK, rhs_EKN, group_sizes_E.astype(jnp.int32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _multiply(transposed, interpret, lhs_MK, rhs, group_sizes_E):
    return _rows(lhs_MK, rhs, group_sizes_E, transposed, interpret)


def _multiply_fwd(transposed, interpret, *operands):
    return _multiply(transposed, interpret, *operands), operands


def _multiply_bwd(transposed, interpret, operands, dout_MN):
    lhs_MK, rhs, group_sizes_E = operands
    dlhs_MK = _rows(dout_MN, rhs, group_sizes_E, not transposed, interpret)
    left, right = (dout_MN, lhs_MK) if transposed else (lhs_MK, dout_MN)
    return dlhs_MK, _matrices(left, right, group_sizes_E, interpret), None


_multiply.defvjp(_multiply_fwd, _multiply_bwd)


def _rows(lhs, rhs, group_sizes_E, transposed, interpret):
    M, N = lhs.shape[0], rhs.shape[1 if transposed else 2]
    lhs = gpu.pad_axis(gpu.pad_axis(lhs, 0, gpu.ROWS), 1, gpu.COLUMNS)
    rhs = gpu.pad_axis(gpu.pad_axis(rhs, 1, gpu.COLUMNS), 2, gpu.COLUMNS)
    tiles, groups = _schedule(group_sizes_E, lhs.shape[0])
    return gpu_products.rows(lhs, rhs, tiles, groups, transposed=transposed, interpret=interpret)[:M, :N]


def _matrices(lhs, dout, group_sizes_E, interpret):
    K, N = lhs.shape[1], dout.shape[1]
    lhs, dout = (gpu.pad_axis(gpu.pad_axis(x, 0, gpu.ROWS), 1, gpu.COLUMNS) for x in (lhs, dout))
    ends_E = jnp.cumsum(group_sizes_E)
    bounds = jnp.stack([ends_E - group_sizes_E, ends_E], axis=1)
    return gpu_products.matrices(lhs, dout, bounds, interpret=interpret)[:, :K, :N]


def _schedule(group_sizes_E, M):
    """(range of groups of each tile of rows [tiles, 2], (matrix, first row, end row) of each group [E, 3]), of groups with rows only."""
    ends_E = jnp.cumsum(group_sizes_E)
    order_E = jnp.argsort(group_sizes_E == 0, stable=True).astype(jnp.int32)
    starts, ends = (ends_E - group_sizes_E)[order_E], ends_E[order_E]
    used = group_sizes_E[order_E] > 0
    row = jnp.arange(0, M, gpu_products.ROWS, dtype=jnp.int32)[:, None]
    first = (used & (ends <= row)).sum(1)
    stop = (used & (starts < row + gpu_products.ROWS)).sum(1)
    return jnp.stack([first, stop], axis=1).astype(jnp.int32), jnp.stack([order_E, starts, ends], axis=1).astype(jnp.int32)

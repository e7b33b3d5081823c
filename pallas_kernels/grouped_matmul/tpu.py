"""Grouped matmul for TPUs: the custom gradient around the kernels of tpu_rows and tpu_matrices.

M rows sorted by expert, K in, N out, E experts.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.grouped_matmul.tpu_matrices import grouped_matrices
from pallas_kernels.grouped_matmul.tpu_rows import grouped_rows


def multiply(lhs_MK, rhs_EKN, group_sizes_E, rhs_scale_EN, transposed=False, *, interpret):
    """out [M,N] in the dtype of lhs; transposed: rhs is [E,N,K], without a scale."""
    return _grouped(transposed, interpret, lhs_MK, rhs_EKN, group_sizes_E, rhs_scale_EN)


def unsupported(lhs_MK, rhs_EKN, group_sizes_E, rhs_scale_EN, transposed=False):
    """Why these inputs cannot run on a TPU, or None."""
    if lhs_MK.dtype not in (jnp.float32, jnp.bfloat16):
        return f"{lhs_MK.dtype} is not multiplied on a TPU; give float32 or bfloat16"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _grouped(transposed, interpret, lhs_MK, rhs, group_sizes_E, rhs_scale_EN):
    # Under vmap one problem follows the other: the tables of a batch of problems do not fit one grid.
    @jax.custom_batching.sequential_vmap
    def run(lhs_MK, rhs, group_sizes_E, rhs_scale_EN):
        return grouped_rows(lhs_MK, rhs, group_sizes_E, out_scale_EO=rhs_scale_EN, transposed=transposed, interpret=interpret)

    return run(lhs_MK, rhs, group_sizes_E, rhs_scale_EN)


def _grouped_fwd(transposed, interpret, *operands):
    return _grouped(transposed, interpret, *operands), operands


def _grouped_bwd(transposed, interpret, operands, dout_MN):
    lhs_MK, rhs, group_sizes_E, rhs_scale_EN = operands
    floating = jnp.issubdtype(rhs.dtype, jnp.floating)

    @jax.custom_batching.sequential_vmap
    def rows(dout_MN, rhs, group_sizes_E, rhs_scale_EN):
        return grouped_rows(dout_MN, rhs, group_sizes_E, lhs_scale_EC=rhs_scale_EN, transposed=not transposed, interpret=interpret,
                            name="grouped_matmul_dlhs")

    @jax.custom_batching.sequential_vmap
    def matrices(lhs_MK, dout_MN, rhs, group_sizes_E, rhs_scale_EN):
        left, right = (dout_MN, lhs_MK) if transposed else (lhs_MK, dout_MN)
        return grouped_matrices(left, right, group_sizes_E, None if rhs_scale_EN is None else rhs, rhs_scale_EN,
                                dtype=rhs.dtype if floating else None, interpret=interpret)

    dlhs_MK = rows(dout_MN, rhs, group_sizes_E, rhs_scale_EN)
    drhs, dscale_EN = None, None
    if floating or rhs_scale_EN is not None:
        drhs, dscale_EN = matrices(lhs_MK, dout_MN, rhs, group_sizes_E, rhs_scale_EN)
    if not floating:
        drhs = np.zeros(rhs.shape, jax.dtypes.float0)
    return dlhs_MK, drhs, None, None if dscale_EN is None else dscale_EN.astype(rhs_scale_EN.dtype)


_grouped.defvjp(_grouped_fwd, _grouped_bwd)

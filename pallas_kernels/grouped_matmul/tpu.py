"""Grouped matmul for TPUs: the custom gradient around the kernels of tpu_rows and tpu_matrices.

M rows sorted by expert, K in, N out, E experts.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.grouped_matmul.tpu_matrices import grouped_matrices
from pallas_kernels.grouped_matmul.tpu_rows import grouped_rows


def multiply(lhs_MK, rhs_EKN, group_sizes_E, rhs_scale_EN, *, interpret):
    """out [M,N] in the dtype of lhs."""
    return _grouped(interpret, lhs_MK, rhs_EKN, group_sizes_E, rhs_scale_EN)


def unsupported(lhs_MK, rhs_EKN, group_sizes_E, rhs_scale_EN):
    """Why these inputs cannot run on a TPU, or None."""
    if lhs_MK.dtype not in (jnp.float32, jnp.bfloat16):
        return f"{lhs_MK.dtype} is not multiplied on a TPU; give float32 or bfloat16"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(interpret, lhs_MK, rhs_EKN, group_sizes_E, rhs_scale_EN):
    # Under vmap one problem follows the other: the tables of a batch of problems do not fit one grid.
    @jax.custom_batching.sequential_vmap
    def run(lhs_MK, rhs_EKN, group_sizes_E, rhs_scale_EN):
        return grouped_rows(lhs_MK, rhs_EKN, group_sizes_E, out_scale_EO=rhs_scale_EN, transposed=False, interpret=interpret)

    return run(lhs_MK, rhs_EKN, group_sizes_E, rhs_scale_EN)


def _grouped_fwd(interpret, *operands):
    return _grouped(interpret, *operands), operands


def _grouped_bwd(interpret, operands, dout_MN):
    lhs_MK, rhs_EKN, group_sizes_E, rhs_scale_EN = operands
    floating = jnp.issubdtype(rhs_EKN.dtype, jnp.floating)

    @jax.custom_batching.sequential_vmap
    def rows(dout_MN, rhs_EKN, group_sizes_E, rhs_scale_EN):
        return grouped_rows(dout_MN, rhs_EKN, group_sizes_E, lhs_scale_EC=rhs_scale_EN, transposed=True, interpret=interpret)

    @jax.custom_batching.sequential_vmap
    def matrices(lhs_MK, dout_MN, rhs_EKN, group_sizes_E, rhs_scale_EN):
        return grouped_matrices(lhs_MK, dout_MN, group_sizes_E, None if rhs_scale_EN is None else rhs_EKN, rhs_scale_EN,
                                dtype=rhs_EKN.dtype if floating else None, interpret=interpret)

    dlhs_MK = rows(dout_MN, rhs_EKN, group_sizes_E, rhs_scale_EN)
    drhs_EKN, dscale_EN = None, None
    if floating or rhs_scale_EN is not None:
        drhs_EKN, dscale_EN = matrices(lhs_MK, dout_MN, rhs_EKN, group_sizes_E, rhs_scale_EN)
    if not floating:
        drhs_EKN = np.zeros(rhs_EKN.shape, jax.dtypes.float0)
    return dlhs_MK, drhs_EKN, None, None if dscale_EN is None else dscale_EN.astype(rhs_scale_EN.dtype)


_grouped.defvjp(_grouped_fwd, _grouped_bwd)

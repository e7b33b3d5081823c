"""Grouped matmul in plain jnp: on a CPU a loop over the experts that have rows, elsewhere `jax.lax.ragged_dot`.

M rows sorted by expert, K in, N out, E experts, R rows of a block.
XLA:CPU lowers `ragged_dot` to E dense masked matmuls (measured M=4096 K=256 N=512 E=8: 8 to 10 times one dense matmul). Here
the rows of an expert go in blocks of 256, its rest in blocks of 64: work M*K*N + at most 63 rows per expert. A block writes all
its rows; what it writes past its group is zero, and the next group, which comes later, overwrites it.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.checks import accumulator
from pallas_kernels.products import product

_BLOCKS = (256, 64)


def multiply(lhs_MK, rhs_EKN, group_sizes_E, rhs_scale_EN, transposed=False):
    """out [M,N] in the dtype of lhs; transposed: rhs is [E,N,K]."""
    rhs_EKN = rhs_EKN.swapaxes(1, 2) if transposed else rhs_EKN
    out_MN = _grouped(lhs_MK, rhs_EKN, group_sizes_E)
    if rhs_scale_EN is not None:
        # A scale per column commutes with the matmul: the int8 values stay int8 in memory.
        expert_M = jnp.searchsorted(jnp.cumsum(group_sizes_E), jnp.arange(lhs_MK.shape[0]), side="right", method="scan_unrolled")
        out_MN = out_MN * rhs_scale_EN.astype(out_MN.dtype)[jnp.minimum(expert_M, rhs_EKN.shape[0] - 1)]
        out_MN = _used_rows(out_MN, group_sizes_E)  # here: the gradient of a row of no group may be nan
    return out_MN.astype(lhs_MK.dtype)


@jax.custom_vjp
def _grouped(lhs_MK, rhs_EKN, group_sizes_E):
    """lhs rows times their rhs, in the accumulator's dtype."""
    return _rows(lhs_MK, rhs_EKN, group_sizes_E)


def _grouped_fwd(lhs_MK, rhs_EKN, group_sizes_E):
    return _grouped(lhs_MK, rhs_EKN, group_sizes_E), (lhs_MK, rhs_EKN, group_sizes_E)


def _grouped_bwd(residuals, dout_MN):
    lhs_MK, rhs_EKN, group_sizes_E = residuals
    dout_MN = dout_MN.astype(lhs_MK.dtype)
    dlhs_MK = _rows(dout_MN, rhs_EKN.swapaxes(1, 2), group_sizes_E).astype(lhs_MK.dtype)
    if not jnp.issubdtype(rhs_EKN.dtype, jnp.floating):
        return dlhs_MK, np.zeros(rhs_EKN.shape, jax.dtypes.float0), None
    drhs_EKN = _matrices(lhs_MK, dout_MN, group_sizes_E)
    return dlhs_MK, drhs_EKN.astype(rhs_EKN.dtype), None


_grouped.defvjp(_grouped_fwd, _grouped_bwd)


# The form is chosen when the program is lowered for its platform, so that compiling for a TPU on a CPU machine gets the TPU's form.
# Under vmap one problem follows the other: a batched `ragged_dot` has no transpose, a batched loop would run every trip on a copy.


@jax.custom_batching.sequential_vmap
def _rows(lhs_MK, rhs_EKN, group_sizes_E):
    return jax.lax.platform_dependent(lhs_MK, rhs_EKN, group_sizes_E, cpu=_rows_cpu, default=_rows_ragged_dot)


@jax.custom_batching.sequential_vmap
def _matrices(lhs_MK, dout_MN, group_sizes_E):
    return jax.lax.platform_dependent(lhs_MK, dout_MN, group_sizes_E, cpu=_matrices_cpu, default=_matrices_ragged_dot)


def _used_rows(x_MK, group_sizes_E):
    """Zeroes the rows of no group, which may hold anything."""
    return jnp.where((jnp.arange(x_MK.shape[0]) < group_sizes_E.sum())[:, None], x_MK, 0)


def _rows_ragged_dot(lhs_MK, rhs_EKN, group_sizes_E):
    lhs_MK = _used_rows(lhs_MK, group_sizes_E)
    # "highest": float32 rows are not rounded to bfloat16 on a TPU.
    precision = "highest" if lhs_MK.dtype == jnp.float32 else None
    return jax.lax.ragged_dot(
        lhs_MK, rhs_EKN.astype(lhs_MK.dtype), group_sizes_E, precision=precision, preferred_element_type=accumulator(lhs_MK.dtype)
    )


def _matrices_ragged_dot(lhs_MK, dout_MN, group_sizes_E):
    zeros_EKN = jnp.zeros((group_sizes_E.shape[0], lhs_MK.shape[1], dout_MN.shape[1]), lhs_MK.dtype)
    dout_MN = _used_rows(dout_MN, group_sizes_E)
    _, transpose = jax.vjp(lambda rhs_EKN: _rows_ragged_dot(lhs_MK, rhs_EKN, group_sizes_E), zeros_EKN)
    return transpose(dout_MN.astype(accumulator(lhs_MK.dtype)))[0].astype(accumulator(lhs_MK.dtype))


def _rows_cpu(lhs_MK, rhs_EKN, group_sizes_E):
    M, dtype = lhs_MK.shape[0], accumulator(lhs_MK.dtype)
    ends_E = jnp.cumsum(group_sizes_E)
    blocks = [min(rows, M) for rows in _BLOCKS]
    padded_MK = jnp.pad(lhs_MK, ((0, blocks[0]), (0, 0)))

    def one_expert(i, out_MN):
        e = order_E[i]
        w_KN = rhs_EKN[e].astype(lhs_MK.dtype)

        def one_block(out_MN, start, x_RK):
            y_RN = product("rk,kn->rn", x_RK, w_KN, dtype)
            return jax.lax.dynamic_update_slice_in_dim(out_MN, y_RN, start, 0)

        return _over_blocks(one_block, out_MN, padded_MK, ends_E[e] - group_sizes_E[e], ends_E[e], blocks)

    # Only experts with rows are visited, in order: an idle expert's weights are not even read.
    order_E = jnp.argsort(group_sizes_E == 0, stable=True)
    out_MN = jnp.zeros((padded_MK.shape[0], rhs_EKN.shape[2]), dtype)
    return jax.lax.fori_loop(0, (group_sizes_E > 0).sum(), one_expert, out_MN)[:M]


def _matrices_cpu(lhs_MK, dout_MN, group_sizes_E):
    """sum over the rows m of each group of lhs[m]^T dout[m]: [E,K,N]."""
    M, dtype = lhs_MK.shape[0], accumulator(lhs_MK.dtype)
    ends_E = jnp.cumsum(group_sizes_E)
    blocks = [min(rows, M) for rows in _BLOCKS]
    padded_MK, dout_MN = (jnp.pad(x, ((0, blocks[0]), (0, 0))) for x in (lhs_MK, dout_MN))
    used = ends_E[-1]

    def one_expert(_, e):
        def one_block(sum_KN, start, x_RK):
            dy_RN = jax.lax.dynamic_slice_in_dim(dout_MN, start, x_RK.shape[0])
            # Past its group x is 0, and dy another group's, or of none: anything.
            dy_RN = jnp.where((start + jnp.arange(x_RK.shape[0]) < used)[:, None], dy_RN, 0)
            return sum_KN + product("rk,rn->kn", x_RK, dy_RN, dtype)

        zeros_KN = jnp.zeros((lhs_MK.shape[1], dout_MN.shape[1]), dtype)
        return None, _over_blocks(one_block, zeros_KN, padded_MK, ends_E[e] - group_sizes_E[e], ends_E[e], blocks)

    return jax.lax.scan(one_expert, None, jnp.arange(group_sizes_E.shape[0]))[1]


def _over_blocks(one_block, carry, padded_MK, start, end, blocks):
    """carry = one_block(carry, first row, rows with those past `end` zeroed) over [start, end): whole large blocks, then small ones."""
    large, small = blocks

    def step(rows, begin, i, carry):
        first = begin + i * rows
        x_RK = jax.lax.dynamic_slice_in_dim(padded_MK, first, rows)
        return one_block(carry, first, jnp.where((first + jnp.arange(rows) < end)[:, None], x_RK, 0))

    whole = (end - start) // large
    carry = jax.lax.fori_loop(0, whole, functools.partial(step, large, start), carry)
    rest = start + whole * large
    return jax.lax.fori_loop(0, (end - rest + small - 1) // small, functools.partial(step, small, rest), carry)

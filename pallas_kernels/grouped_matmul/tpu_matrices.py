"""Grouped matmul on a TPU, matrices out: the gradient of rhs, drhs[e] = sum over the rows m of e of lhs[m]^T dout[m], zero for an empty e.

Grid (output columns, contraction rows of rhs, visits): columns are split over the cores of a chip; the visits of an expert follow each
other and add to one accumulator. A tile inside one expert is one matmul; of a tile that a border cuts, only the sub-tiles with rows of
the expert are multiplied, the other rows masked on both sides (they may be nan).
With a scale per column the same sums give its gradient: dscale[e,n] = sum over k of rhs[e,k,n] drhs[e,k,n], before the scale is applied.

M rows, K in, N out, E experts, J tiles of K.
"""
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped_matmul import tpu_blocks
from pallas_kernels.grouped_matmul.tpu_visits import matrix_visits
from pallas_kernels.tpu import precision


def grouped_matrices(lhs_MK, dout_MN, group_sizes_E, rhs_EKN=None, scale_EN=None, *, dtype, interpret):
    """(drhs [E,K,N] in `dtype`, or None if dtype is None; dscale [E,N] float32, or None without rhs). drhs is multiplied by the scale."""
    (M, K), N, E = lhs_MK.shape, dout_MN.shape[1], group_sizes_E.shape[0]
    w_bytes = (0 if dtype is None else jnp.dtype(dtype).itemsize) + (0 if rhs_EKN is None else rhs_EKN.dtype.itemsize)
    tm, tk, tn = tpu_blocks.matrix_blocks(M, K, N, lhs_MK.dtype.itemsize, w_bytes)
    visits = matrix_visits(group_sizes_E, M, tm)

    def spec(block, index):
        return pl.BlockSpec(block, lambda n, k, v, *tables: index(n, k, v, type(visits)(*tables)))

    matrix = spec((None, tk, tn), lambda n, k, v, t: (t.matrix[v], k, n))
    operands = [lhs_MK, dout_MN]
    in_specs = [spec((tm, tk), lambda n, k, v, t: (t.tile[v], k)), spec((tm, tn), lambda n, k, v, t: (t.tile[v], n))]
    out_shapes, out_specs = [], []
    if scale_EN is not None and dtype is not None:
        operands.append(scale_EN.astype(jnp.float32)[:, None])
        in_specs.append(spec((None, 1, tn), lambda n, k, v, t: (t.matrix[v], 0, n)))
    if rhs_EKN is not None:
        operands.append(rhs_EKN)
        in_specs.append(matrix)
    if dtype is not None:
        out_shapes.append(jax.ShapeDtypeStruct((E, K, N), dtype))
        out_specs.append(matrix)
    if rhs_EKN is not None:
        out_shapes.append(jax.ShapeDtypeStruct((E, pl.cdiv(K, tk), 1, N), jnp.float32))
        out_specs.append(spec((None, None, 1, tn), lambda n, k, v, t: (t.matrix[v], k, 0, n)))
    kernel = functools.partial(_kernel, tables=type(visits), K=K, scaled=scale_EN is not None and dtype is not None,
                               matrices=dtype is not None, columns=rhs_EKN is not None)
    out = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(visits), grid=(pl.cdiv(N, tn), pl.cdiv(K, tk), visits.start.shape[0]), in_specs=in_specs,
            out_specs=out_specs, scratch_shapes=[pltpu.VMEM((tk, tn), jnp.float32)]),
        out_shape=out_shapes,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"),
                                             vmem_limit_bytes=tpu_blocks.vmem_limit()),
        cost_estimate=pl.CostEstimate(flops=2 * M * K * N, transcendentals=0,
                                      bytes_accessed=pl.cdiv(N, tn) * lhs_MK.nbytes + pl.cdiv(K, tk) * dout_MN.nbytes
                                      + E * K * N * w_bytes),
        interpret=interpret,
        name="grouped_matmul_drhs",
    )(*visits, *operands)
    drhs_EKN = out[0] if dtype is not None else None
    return drhs_EKN, None if rhs_EKN is None else out[-1].sum((1, 2))


def _kernel(*refs, tables, K, scaled, matrices, columns):
    visits, refs = tables(*refs[:len(tables._fields)]), list(refs[len(tables._fields):])
    x_ref, dy_ref, acc_ref = refs.pop(0), refs.pop(0), refs.pop()
    scale_ref = refs.pop(0) if scaled else None
    rhs_ref = refs.pop(0) if columns else None
    dscale_ref = refs.pop() if columns else None
    drhs_ref = refs.pop() if matrices else None
    k, v = pl.program_id(1), pl.program_id(2)
    tm, tk = x_ref.shape
    start, stop = visits.start[v], visits.stop[v]
    whole = (start == 0) & (stop == tm)

    first, last = visits.first[v] == 1, visits.last[v] == 1

    def add(x, dy, so_far):
        return so_far + jax.lax.dot_general(x, dy, (((0,), (0,)), ((), ())), precision=precision(x.dtype),
                                            preferred_element_type=jnp.float32)

    def finish(sums):
        if columns:
            terms = sums * rhs_ref[...].astype(jnp.float32)
            if K % tk:  # past the array
                terms = jnp.where(k * tk + jax.lax.broadcasted_iota(jnp.int32, terms.shape, 0) < K, terms, 0)
            dscale_ref[...] = terms.sum(0, keepdims=True)
        if matrices:
            drhs_ref[...] = (sums * scale_ref[...] if scaled else sums).astype(drhs_ref.dtype)

    @pl.when(whole & ~last)
    def _():
        acc_ref[...] = add(x_ref[...], dy_ref[...], jnp.where(first, 0.0, acc_ref[...]))

    @pl.when(whole & last)
    def _():
        finish(add(x_ref[...], dy_ref[...], jnp.where(first, 0.0, acc_ref[...])))

    @pl.when(first & (start == stop))
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)

    @pl.when(~whole & (start < stop))
    def _():
        sub = min(tpu_blocks.SUB, tm)

        def one(i, _):
            begin = pl.multiple_of(i * sub, sub)
            row = begin + jax.lax.broadcasted_iota(jnp.int32, (sub, 1), 0)
            mine = (row >= start) & (row < stop)
            x, dy = (jnp.where(mine, ref[pl.ds(begin, sub), :], 0) for ref in (x_ref, dy_ref))
            acc_ref[...] = add(x, dy, jnp.where(first & (i == start // sub), 0.0, acc_ref[...]))
            return _

        jax.lax.fori_loop(start // sub, (stop + sub - 1) // sub, one, 0)

    @pl.when(last & ~whole)
    def _():
        finish(acc_ref[...])

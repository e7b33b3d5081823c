"""Grouped matmul on a TPU, rows out: out[m] = lhs[m] @ rhs[group of m], and with rhs transposed the gradient of lhs.

Grid (cores, output columns of a core, visits, contraction): columns are independent and split over the cores of a chip; a visit is a
tile of rows and the part of it that belongs to one group (see tpu_visits). A tile inside one group is one matmul; of a tile that a border
cuts, only the sub-tiles with rows of the group are multiplied, and only those rows stored. Nothing of what is read past a group reaches a
stored row.

Where all of the contraction fits in one step, the columns of an expert's matrix are fetched by hand, while the expert before is at
work: as a block of the grid they would be due within the one step before the change, and the matrix units would wait. The chain of
fetches runs on from the last expert of one block of columns to the first of the next, so a core's blocks follow each other.

M rows, C contracted, O out, E experts.
"""
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped_matmul import tpu_blocks
from pallas_kernels.grouped_matmul.tpu_visits import RowVisits, row_visits
from pallas_kernels.tpu import LANES, chip, precision


def grouped_rows(lhs_MC, rhs, group_sizes_E, lhs_scale_EC=None, out_scale_EO=None, *, transposed, interpret, name="grouped_matmul"):
    """[M,O] in the dtype of lhs: (lhs * lhs_scale[group]) @ rhs[group] * out_scale[group]; rhs [E,C,O], or [E,O,C] if transposed."""
    (M, C), dtype = lhs_MC.shape, lhs_MC.dtype
    O = rhs.shape[1 if transposed else 2]
    tm, tc, to = tpu_blocks.row_blocks(M, C, O, dtype.itemsize, rhs.dtype.itemsize)
    columns = pl.cdiv(O, to)
    cores = min(chip().cores, columns)
    by_hand = tc == C and O % to == 0 and columns % cores == 0
    outer, inner = (cores, columns // cores) if by_hand else (columns, 1)
    visits = row_visits(group_sizes_E, M, tm)
    steps = pl.cdiv(C, tc)

    def spec(block, index):
        def with_tables(core, o, v, c, *tables):
            t = RowVisits(*tables)
            return index(core * inner + o, v, jnp.where(t.live[v] == 1, c, steps - 1), t)

        return pl.BlockSpec(block, with_tables)

    operands, in_specs = [lhs_MC, rhs], [spec((tm, tc), lambda o, v, c, t: (t.in_tile[v], c))]
    if by_hand:
        in_specs.append(pl.BlockSpec(memory_space=pl.ANY))
    elif transposed:
        in_specs.append(spec((None, to, tc), lambda o, v, c, t: (t.matrix[v], o, c)))
    else:
        in_specs.append(spec((None, tc, to), lambda o, v, c, t: (t.matrix[v], c, o)))
    if lhs_scale_EC is not None:
        in_specs.append(spec((None, 1, tc), lambda o, v, c, t: (t.matrix[v], 0, c)))
        operands.append(lhs_scale_EC.astype(jnp.float32)[:, None])
    if out_scale_EO is not None:
        in_specs.append(spec((None, 1, to), lambda o, v, c, t: (t.matrix[v], 0, o)))
        operands.append(out_scale_EO.astype(jnp.float32)[:, None])
    matrix = (to, tc) if transposed else (tc, to)
    scratch = [pltpu.VMEM((tm, to) if steps > 1 else (8, LANES), jnp.float32)]
    if by_hand:
        scratch += [pltpu.VMEM((2, *matrix), rhs.dtype), pltpu.SemaphoreType.DMA((2,))]
        if rhs.dtype != dtype:
            scratch.append(pltpu.VMEM(matrix, dtype))
    return pl.pallas_call(
        functools.partial(_kernel, C=C, transposed=transposed, lhs_scaled=lhs_scale_EC is not None, out_scaled=out_scale_EO is not None),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(visits), grid=(outer, inner, visits.start.shape[0], steps), in_specs=in_specs,
            out_specs=spec((tm, to), lambda o, v, c, t: (t.out_tile[v], o)), scratch_shapes=scratch),
        out_shape=jax.ShapeDtypeStruct((M, O), dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary", "arbitrary"),
                                             vmem_limit_bytes=tpu_blocks.vmem_limit()),
        cost_estimate=pl.CostEstimate(flops=2 * M * C * O, transcendentals=0,
                                      bytes_accessed=columns * lhs_MC.nbytes + rhs.nbytes + M * O * dtype.itemsize),
        interpret=interpret,
        name=name,
    )(*visits, *operands)


def _kernel(*refs, C, transposed, lhs_scaled, out_scaled):
    tables = len(RowVisits._fields)
    visits, x_ref, w_ref, refs = RowVisits(*refs[:tables]), refs[tables], refs[tables + 1], list(refs[tables + 2:])
    lhs_scale_ref = refs.pop(0) if lhs_scaled else None
    out_scale_ref = refs.pop(0) if out_scaled else None
    o_ref, acc_ref, *buffers = refs
    v, c, steps = pl.program_id(2), pl.program_id(3), pl.num_programs(3)
    (tm, tc), dtype = x_ref.shape, x_ref.dtype
    start, stop, live = visits.start[v], visits.stop[v], visits.live[v] == 1
    whole = (start == 0) & (stop == tm)
    weights = _fetched(visits, v, w_ref, transposed, dtype, *buffers) if buffers else lambda: w_ref[...].astype(dtype)

    def product(rows, left):
        """lhs[rows] @ rhs; `left` is how much of the block is inside the array, along the contraction."""
        x, w = x_ref[rows, :], weights()
        if lhs_scaled:
            x = (x.astype(jnp.float32) * lhs_scale_ref[...]).astype(dtype)
        if left < tc:  # what lies past the array may be nan, on both sides
            x = jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) < left, x, 0)
            w = jnp.where(jax.lax.broadcasted_iota(jnp.int32, w.shape, 1 if transposed else 0) < left, w, 0)
        dims = (((1,), (1 if transposed else 0,)), ((), ()))
        return jax.lax.dot_general(x, w, dims, precision=precision(dtype), preferred_element_type=jnp.float32)

    def store(rows, mask, y):
        if out_scaled:
            y = y * out_scale_ref[...]
        y = y.astype(dtype)
        o_ref[rows, :] = y if mask is None else jnp.where(mask, y, o_ref[rows, :])

    def multiply(rows, mask):
        if C == tc:
            store(rows, mask, product(rows, C))
            return

        def so_far():
            return jnp.where(c == 0, 0.0, acc_ref[rows, :])

        @pl.when(c < steps - 1)
        def _():
            acc_ref[rows, :] = so_far() + product(rows, tc)

        @pl.when(c == steps - 1)
        def _():
            store(rows, mask, so_far() + product(rows, C - C // tc * tc or tc))

    def owned(rows, first):
        row = first + jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
        return (row >= start) & (row < stop)

    @pl.when(live & whole)
    def _():
        multiply(slice(None), None)

    @pl.when(live & ~whole)
    def _():
        sub = min(tpu_blocks.SUB, tm)

        def one(i, _):
            first = pl.multiple_of(i * sub, sub)
            multiply(pl.ds(first, sub), owned(sub, first))
            return _

        jax.lax.fori_loop(start // sub, (stop + sub - 1) // sub, one, 0)

    @pl.when(~live & (start < stop) & (c == 0))
    def _():
        o_ref[...] = jnp.where(owned(tm, 0), jnp.zeros((), dtype), o_ref[...])


def _fetched(visits, v, w_ref, transposed, dtype, buffer_ref, arrived_ref, *converted_ref):
    """The expert's columns of rhs, fetched from HBM one expert ahead: a function that gives them, in `dtype`."""
    # Read out here: the interpreter knows no program_id inside a condition.
    inner, last = pl.program_id(1), pl.num_programs(1) - 1
    block = pl.program_id(0) * (last + 1) + inner
    turn = (visits.turn[v] + inner * visits.experts[v]) % 2
    axis = 1 if transposed else 2
    to = buffer_ref.shape[axis]

    def fetch(matrix, turn, block):
        columns = pl.ds(pl.multiple_of(block * to, to), to) if to < w_ref.shape[axis] else slice(None)
        part = w_ref.at[matrix, columns, :] if transposed else w_ref.at[matrix, :, columns]
        return pltpu.make_async_copy(part, buffer_ref.at[turn], arrived_ref.at[turn])

    @pl.when((v == 0) & (inner == 0) & (visits.live[v] == 1))
    def _():
        fetch(visits.matrix[v], turn, block).start()

    @pl.when(visits.opens[v] == 1)
    def _():
        fetch(visits.matrix[v], turn, block).wait()

        @pl.when(visits.following[v] >= 0)
        def _():
            fetch(visits.following[v], 1 - turn, block).start()

        @pl.when((visits.following[v] < 0) & (inner < last))
        def _():
            fetch(visits.matrix[0], 1 - turn, block + 1).start()

        for ref in converted_ref:
            ref[...] = buffer_ref[turn].astype(dtype)

    return (lambda: converted_ref[0][...]) if converted_ref else (lambda: buffer_ref[turn])

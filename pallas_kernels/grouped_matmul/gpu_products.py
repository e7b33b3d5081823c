"""The two GPU kernels of the grouped matmul: rows times the matrix of their group, and the product of two row sets per group.

M rows sorted by group, K contracted, N out, E groups. Tiles are 128 rows (64 of each computing warpgroup) by up to 256 columns; the
contracted axis goes in steps of 64.

Both are persistent: one block per multiprocessor walks over output tiles, and its copying warpgroup fills a ring of operand tiles across
them, so the next tile's operands arrive while the last one is written. Tiles of rows start at multiples of 128, wherever the groups do:
every output tile is computed by one block, which adds up the products of all groups that have rows in it, each with the rows of the
others set to zero in shared memory (a select: a poisoned row stays in its group). So a tile is written once, whole; rows of no group are
0, and the result does not depend on any order. The cost: a tile that g groups share is multiplied g times.
"""
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import gpu

MULTIPROCESSORS = 132  # of an H100 or H200 SXM; right for any count
HALF = 64  # rows of a tile of one computing warpgroup
ROWS = gpu.COMPUTE * HALF
STEP = 64  # of the contracted axis: one swizzled row of 16-bit values
BAND = 8  # row tiles that share a column tile before the next one: what the blocks read at a time stays in the L2 cache


def columns_of_tile(N):
    """Columns of an output tile; N is a multiple of 64."""
    return N if N <= 256 else 256 if N % 256 == 0 or N >= 1024 else 128


def stages(columns):
    """Ring slots that fit: a slot is a [128, 64] and a [64, columns] tile; beside them two [64, 64] pieces of out per warpgroup."""
    slot, fixed = 2 * STEP * (ROWS + columns), gpu.COMPUTE * 2 * 2 * HALF * HALF + 2048
    return min(6, (gpu.SMEM - fixed) // slot)


def rows(lhs, rhs, tiles, groups, *, transposed, interpret):
    """out[m] = lhs[m] @ rhs[group of m] (its transpose with `transposed`), 0 for a row of no group: [M,N] in the dtype of lhs.

    Args:
      lhs: [M,K]; rhs: [E,K,N], or [E,N,K] with `transposed`. 16-bit, same dtype. M a multiple of 8, K and N of 64.
      tiles: int32 [ceil(M / 128), 2], the range of groups with rows in each tile.
      groups: int32 [E, 3], matrix, first row and end row of each group that has rows, in order.
    """
    M, K = lhs.shape
    N = rhs.shape[1] if transposed else rhs.shape[2]
    columns = columns_of_tile(N)

    def steps_of(tiles_ref, mi):
        return tiles_ref[mi, 0], tiles_ref[mi, 1], K // STEP

    def body(lhs_ref, rhs_ref, tiles_ref, groups_ref, out_ref, ring, out_smem):
        def copy(tile, step):
            mi, ni = tile
            first, stop, k_steps = steps_of(tiles_ref, mi)

            def group(j, step):
                matrix = groups_ref[j, 0]

                def one(k, step):
                    k, n = pl.ds(k * STEP, STEP), pl.ds(ni * columns, columns)
                    left = [lhs_ref.at[pl.ds(mi * ROWS + w * HALF, HALF), k] for w in range(gpu.COMPUTE)]
                    _fill(ring, step, left, rhs_ref.at[matrix, n, k] if transposed else rhs_ref.at[matrix, k, n])
                    return step + 1

                return lax.fori_loop(0, k_steps, one, step)

            return lax.fori_loop(first, stop, group, step)

        def compute(tile, step, wg, acc_ref):
            mi, _ = tile
            first, stop, k_steps = steps_of(tiles_ref, mi)
            begin, row = step, mi * ROWS + wg * HALF

            def group(j, step):
                start, end = groups_ref[j, 1], groups_ref[j, 2]
                partial = (row < start) | (row + HALF > end)

                def one(_, step):
                    left, right = _wait(ring, step)

                    @pl.when(partial)
                    def _():
                        _keep_rows(left.at[wg], row, start, end)
                        gpu.mosaic().commit_smem()

                    _multiply(ring, begin, step, acc_ref, left.at[wg], right.transpose((1, 0)) if transposed else right)
                    return step + 1

                return lax.fori_loop(0, k_steps, one, step)

            return lax.fori_loop(first, stop, group, step)

        def place(tile, wg, piece):
            mi, ni = tile
            return out_ref.at[pl.ds(mi * ROWS + wg * HALF, HALF), pl.ds(ni * columns + piece * HALF, HALF)]

        grid = (pl.cdiv(M, ROWS), pl.cdiv(N, columns))
        _persistent(grid[0] * grid[1], lambda i: _band(i, *grid), columns, ring, copy, compute, place, out_smem)

    right = (columns, STEP) if transposed else (STEP, columns)
    kernel = _kernel(body, jax.ShapeDtypeStruct((M, N), lhs.dtype), (HALF, STEP), right, columns, lhs.dtype, interpret)
    return kernel(lhs, rhs, tiles, groups)


def matrices(lhs, dout, bounds, *, interpret):
    """out[e] = sum over the rows m of group e of lhs[m]^T dout[m]: [E,K,N] in the dtype of lhs; 0 for a group without rows.

    Args:
      lhs: [M,K], dout: [M,N]: 16-bit, same dtype. M a multiple of 8, K and N of 64.
      bounds: int32 [E, 2], first row and end row of each group.
    """
    (_, K), N, E = lhs.shape, dout.shape[1], bounds.shape[0]
    columns = columns_of_tile(N)

    def blocks(bounds_ref, e):
        """(first row, end row, first block of 64 rows, number of blocks); a group without rows has none."""
        start, end = bounds_ref[e, 0], bounds_ref[e, 1]
        first = lax.div(start, jnp.int32(STEP))
        return start, end, first, jnp.where(end > start, lax.div(end + STEP - 1, jnp.int32(STEP)) - first, 0)

    def body(lhs_ref, dout_ref, bounds_ref, out_ref, ring, out_smem, masked):
        def copy(tile, step):
            e, ki, ni = tile
            _, _, first, count = blocks(bounds_ref, e)

            def one(i, step):
                m = pl.ds((first + i) * STEP, STEP)
                left = [lhs_ref.at[m, pl.ds(ki * ROWS + w * HALF, HALF)] for w in range(gpu.COMPUTE)]
                _fill(ring, step, left, dout_ref.at[m, pl.ds(ni * columns, columns)])
                return step + 1

            return lax.fori_loop(0, count, one, step)

        def compute(tile, step, wg, acc_ref):
            start, end, first, count = blocks(bounds_ref, tile[0])
            begin = step

            def one(i, step):
                left, right = _wait(ring, step)
                row = (first + i) * STEP

                @pl.when((row < start) | (row + STEP > end))
                def _():
                    # Rows of no group may hold anything: both sides are masked. `right` is shared, each warpgroup masks its half.
                    _keep_rows(left.at[wg], row, start, end)
                    for w, half in enumerate(_halves(columns)):
                        pl.when(wg == w)(lambda half=half: _keep_rows(right.at[:, half], row, start, end))
                    gpu.mosaic().commit_smem()
                    gpu.mosaic().barrier_arrive(masked)
                    gpu.mosaic().barrier_wait(masked)

                _multiply(ring, begin, step, acc_ref, left.at[wg].transpose((1, 0)), right)
                return step + 1

            return lax.fori_loop(0, count, one, step)

        def place(tile, wg, piece):
            e, ki, ni = tile
            return out_ref.at[e, pl.ds(ki * ROWS + wg * HALF, HALF), pl.ds(ni * columns + piece * HALF, HALF)]

        k_tiles, n_tiles = pl.cdiv(K, ROWS), pl.cdiv(N, columns)

        def tile_of(i):
            e, rest = _divide(i, k_tiles * n_tiles)
            return e, *_band(rest, k_tiles, n_tiles)

        _persistent(E * k_tiles * n_tiles, tile_of, columns, ring, copy, compute, place, out_smem)

    barrier = gpu.mosaic().Barrier(num_arrivals=gpu.COMPUTE)
    out_type = jax.ShapeDtypeStruct((E, K, N), lhs.dtype)
    kernel = _kernel(body, out_type, (STEP, HALF), (STEP, columns), columns, lhs.dtype, interpret, barrier)
    return kernel(lhs, dout, bounds)


# What both share: the walk over tiles, the ring, the product of one step, the way out.


def _kernel(body, out_type, left, right, columns, dtype, interpret, *scratch):
    plgpu = gpu.mosaic()
    slots = stages(columns)
    ring = (
        gpu.smem((slots, gpu.COMPUTE, *left), dtype), gpu.smem((slots, *right), dtype),
        plgpu.Barrier(num_arrivals=gpu.COMPUTE + 1, num_barriers=slots),  # full: one arrival per copy
        plgpu.Barrier(num_arrivals=gpu.COMPUTE, num_barriers=slots),  # empty
    )
    return plgpu.kernel(
        body, out_type=out_type, scratch_types=[ring, gpu.smem((gpu.COMPUTE, 2, HALF, HALF), dtype), *scratch],
        grid=(MULTIPROCESSORS,), grid_names=("block",), num_threads=gpu.COMPUTE + 1, thread_name="wg",
        compiler_params=gpu.compiler_params(), interpret=gpu.interpretation(interpret),
    )


def _persistent(count, tile_of, columns, ring, copy, compute, place, out_smem):
    """Every block's share of `count` tiles: `copy` and `compute` go through the same steps of the ring, tile after tile."""
    plgpu = gpu.mosaic()
    block, wg = lax.axis_index("block"), lax.axis_index("wg")
    share = lax.div(count - block + MULTIPROCESSORS - 1, jnp.int32(MULTIPROCESSORS))
    tile = lambda i: tile_of(block + i * MULTIPROCESSORS)  # noqa: E731

    @pl.when(wg == gpu.COPIER)
    def _copy():
        plgpu.set_max_registers(gpu.COPY_REGISTERS, action="decrease")
        lax.fori_loop(0, share, lambda i, step: copy(tile(i), step), jnp.int32(0))

    @pl.when(wg < gpu.COMPUTE)
    def _compute():
        plgpu.set_max_registers(gpu.COMPUTE_REGISTERS, action="increase")

        def one_tile(i, step):
            def multiplied(acc_ref):
                end = compute(tile(i), step, wg, acc_ref)
                acc = acc_ref[...]

                @pl.when(end > step)
                def _():
                    _release(ring, end - 1)

                return acc, end

            acc, end = pl.run_scoped(multiplied, plgpu.ACC((HALF, columns), jnp.float32))
            for piece in range(columns // HALF):
                out = out_smem.at[wg, piece % 2]
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the piece before the last one has left
                out[...] = acc[:, piece * HALF : (piece + 1) * HALF].astype(out.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out, place(tile(i), wg, piece))
            return end

        lax.fori_loop(0, share, one_tile, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)


def _fill(ring, step, left, right):
    plgpu = gpu.mosaic()
    left_slots, right_slots, full, empty = ring
    slot = _slot(ring, step)

    @pl.when(step >= left_slots.shape[0])
    def _():
        plgpu.barrier_wait(empty.at[slot])

    for w, source in enumerate(left):
        plgpu.copy_gmem_to_smem(source, left_slots.at[slot, w], full.at[slot])
    plgpu.copy_gmem_to_smem(right, right_slots.at[slot], full.at[slot])


def _wait(ring, step):
    slot = _slot(ring, step)
    gpu.mosaic().barrier_wait(ring[2].at[slot])
    return ring[0].at[slot], ring[1].at[slot]


def _release(ring, step):
    gpu.mosaic().barrier_arrive(ring[3].at[_slot(ring, step)])


def _slot(ring, step):
    return lax.rem(step, jnp.int32(ring[0].shape[0]))


def _multiply(ring, begin, step, acc_ref, left, right):
    """Issues the product of this step and, once the one before is done, gives its slot back."""
    gpu.mosaic().wgmma(acc_ref, left, right)
    gpu.mosaic().wgmma_wait(1)

    @pl.when(step > begin)
    def _():
        _release(ring, step - 1)


def _keep_rows(ref, row, start, end):
    """Zeroes the rows of a tile (its first is `row`) outside [start, end), in shared memory."""
    plgpu = gpu.mosaic()
    x = plgpu.load(ref, layout=plgpu.Layout.WGMMA)
    at = gpu.iota(x.shape, 0) + row
    ref[...] = jnp.where((at >= start) & (at < end), x, jnp.zeros_like(x))


def _halves(columns):
    """Column slices of the shared tile that each computing warpgroup masks; a tile of one or three swizzled rows does not split evenly."""
    middle = (columns // HALF + 1) // 2 * HALF
    return [slice(0, middle)] + ([slice(middle, columns)] if middle < columns else [])


def _band(i, row_tiles, column_tiles):
    """The i-th (row tile, column tile): down a band of `BAND` row tiles, then the next column tile, then the next band."""
    band, rest = _divide(i, BAND * column_tiles)
    height = jnp.minimum(BAND, row_tiles - band * BAND)
    column, row = _divide(rest, height)
    return band * BAND + row, column


def _divide(i, by):
    by = jnp.asarray(by, jnp.int32)
    return lax.div(i, by), lax.rem(i, by)

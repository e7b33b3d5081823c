"""What the GPU kernels share: which GPUs they are for, memory and registers of one, the ring of tiles between the warpgroup that copies
and those that multiply, and when to interpret.

They are Mosaic GPU kernels (`jax.experimental.pallas.mosaic_gpu`) for Hopper: the copies are TMA, the products wgmma, and Hopper is the
one generation that has both. A block is `COMPUTE` warpgroups that multiply and one that issues copies, 128 threads each.
"""
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.target import target

COMPUTE = 2  # warpgroups that multiply
COPIER = COMPUTE  # index of the one that issues copies
SMEM = 227 * 1024  # bytes of shared memory that one block may use; each array is aligned to SMEM_ALIGNMENT
SMEM_ALIGNMENT = 1024
# 65,536 registers over 3 x 128 threads, in steps of 8: what two computing warpgroups and a copying one may hold.
COMPUTE_REGISTERS, COPY_REGISTERS = 240, 24
ROWS = 8  # TMA takes rows in tiles of 8: a tiled axis that is longer must be a multiple
COLUMNS = 64  # 16-bit columns of one swizzled row (128 bytes): head dims are padded to a multiple
LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453
# By name because the driver gives names. GH200 is Hopper next to a Grace CPU.
HOPPER = ("H100", "H200", "H800", "H20", "GH200")
# The GPU interpreter of jax 0.11 wants the last completion of every barrier to be waited for; nobody waits for the last slots of a ring.
_OLDEST_JAX, _OLDEST_INTERPRETING_JAX = (0, 11, 2), (0, 12)


def mosaic():
    """`jax.experimental.pallas.mosaic_gpu`, imported late: a process without a GPU that asks for no GPU kernel never loads it."""
    from jax.experimental.pallas import mosaic_gpu

    return mosaic_gpu


def unsupported_here():
    """Why no GPU kernel of this library runs in the program being traced, or None."""
    here = target()
    on_gpu = here.platform == "gpu"
    oldest = _OLDEST_JAX if on_gpu else _OLDEST_INTERPRETING_JAX
    if jax.__version_info__ < oldest:
        why = "older than all that these kernels were compiled with" if on_gpu else "it has no GPU interpreter that runs them"
        return f"jax {jax.__version__} is below {'.'.join(map(str, oldest))}: {why}"
    if on_gpu and not any(name in here.kind.replace("-", " ").split() for name in HOPPER):
        return f"it needs a Hopper GPU (wgmma: {', '.join(HOPPER)}), this is {here.kind}"
    return None


def unsupported_dtype(dtype):
    """Why operands of this dtype are not multiplied, or None."""
    if dtype in (jnp.bfloat16, jnp.float16):
        return None
    if dtype == jnp.float32:
        return "wgmma multiplies float32 as tf32 (10 bits of mantissa), which breaks float32's error bound"
    return f"{jnp.dtype(dtype).name} is not multiplied by wgmma here, only bfloat16 and float16"


def interpretation(interpret):
    """What `plgpu.kernel(interpret=...)` takes: False, or the parameters of the GPU interpreter."""
    return mosaic().InterpretGPUParams() if interpret is True else interpret


def compiler_params(**kwargs):
    # approx_math: exp2 is one instruction, with a relative error of 2^-22.
    return mosaic().CompilerParams(**{"approx_math": True, **kwargs})


def launch(name, body, grid, out_type, scratch_types, interpret, **params):
    """The kernel as a function of its inputs. `grid` is {axis name: size}; `body` takes refs of inputs, outputs and scratch, once per
    warpgroup ("wg" is its index)."""
    return mosaic().kernel(
        body, out_type=out_type, scratch_types=scratch_types, grid=tuple(grid.values()), grid_names=tuple(grid), num_threads=COMPUTE + 1,
        thread_name="wg", compiler_params=compiler_params(**params), interpret=interpret, kernel_name=name)


def smem(shape, dtype):
    """Shared memory in the form that wgmma and TMA both take: tiles of 8 rows x 128 swizzled bytes."""
    plgpu = mosaic()
    columns = 128 // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((ROWS, columns)), plgpu.SwizzleTransform(128)))


def zeros(shape):
    """A float32 tile in the layout of a wgmma accumulator; one axis: a value per row of it."""
    return full(shape, 0.0)


def full(shape, value):
    layout = mosaic().Layout.WGMMA
    return mosaic().layout_cast(jnp.full(shape, value, jnp.float32), layout if len(shape) == 2 else layout.reduce(1))


def rows(x, shape):
    """One value per row -> the tile."""
    return lax.broadcast_in_dim(x, shape, (0,))


def columns(x, shape):
    """One value per column -> the tile."""
    return lax.broadcast_in_dim(x, shape, (1,))


def iota(shape, axis):
    return mosaic().broadcasted_iota(jnp.int32, shape, axis, layout=mosaic().Layout.WGMMA)


def load_rows(ref, shared=True):
    """Values of one axis, one per row of a tile. `shared`: from shared memory; else from global memory, which "optimized" excludes."""
    return mosaic().load(ref, layout=mosaic().Layout.WGMMA.reduce(1), optimized=shared)


def load_columns(ref, shared=True):
    """Values of one axis, one per column of a tile."""
    return mosaic().load(ref, layout=mosaic().Layout.WGMMA.reduce(0), optimized=shared)


def store(ref, value):
    """A value in registers into global memory, without a way through shared memory."""
    if hasattr(mosaic(), "store"):
        mosaic().store(ref, value, optimized=False)
    else:  # jax 0.11, where an assignment does just that; since 0.12 it does not
        ref[...] = value


def product(a, b, shape, before_wait=None):
    """a @ b as a float32 tile; `a` in shared memory or registers, `b` in shared memory. `before_wait` runs while the product does."""

    def multiply(acc_ref):
        mosaic().wgmma(acc_ref, a, b)
        if before_wait is not None:
            before_wait()
        return acc_ref[...]

    return pl.run_scoped(multiply, mosaic().ACC(shape, jnp.float32))


def two_products(shape, first, second, between):
    """(between(a @ b), c @ d) for first = (a, b), second = (c, d) in shared memory; `between` runs while the second one multiplies."""

    def multiply(first_ref, second_ref):
        mosaic().wgmma(first_ref, *first)
        mosaic().wgmma(second_ref, *second)
        result = between(mosaic().wgmma_accumulator_load(first_ref, wait_n=1))
        return result, mosaic().wgmma_accumulator_load(second_ref)

    return pl.run_scoped(multiply, *(mosaic().ACC(shape, jnp.float32) for _ in range(2)))


def per_step(i, *refs):
    """ref.at[i] of each, computed anew where it is called: hoisted out of a loop, the addresses of a wide tile's wgmmas fill registers."""
    i = lax.optimization_barrier(i)
    return tuple(None if ref is None else ref.at[i] for ref in refs)


def accumulate(interpret, *products):
    """Tiles acc + a @ b for (acc, a, b) in `products`, all in flight at once; `a` in shared memory or registers, `b` in shared memory.

    The interpreter of jax 0.12 knows neither accumulators that start from a value nor operands in registers: there it is a plain dot.
    """
    if interpret is not False:
        value = lambda x: (x if isinstance(x, jax.Array) else x[...]).astype(jnp.float32)  # noqa: E731
        sums = [acc + jnp.dot(value(a), value(b), precision=lax.Precision.HIGHEST) for acc, a, b in products]
        mosaic().commit_smem()  # a wgmma's reads precede the next copy into the slot; those of a load need this for it
        return sums

    def multiply(acc_refs):
        for acc_ref, (_, a, b) in zip(acc_refs, products, strict=True):
            mosaic().wgmma(acc_ref, a, b)

    return list(pl.run_state(multiply)(tuple(mosaic().ACC.init(acc) for acc, _, _ in products)))


class Ring:
    """Slots of shared memory that the copying warpgroup fills and every computing warpgroup empties, in order.

    `slots`, `full`, `empty` are refs made from `ring_scratch`. Step i uses slot i % stages; both sides must go through the same steps.
    """

    def __init__(self, slots, full, empty, stages):
        self.slots, self.full, self.empty, self.stages = slots, full, empty, stages

    def fill(self, step, *sources):
        """Copier: sources are slices of global memory, one per array of slots."""

        @pl.when(step >= self.stages)
        def _():
            mosaic().barrier_wait(self.empty.at[self._slot(step)])

        for slots, source in zip(self.slots, sources, strict=True):
            mosaic().copy_gmem_to_smem(source, slots.at[self._slot(step)], self.full.at[self._slot(step)])

    def wait(self, step):
        """Computing: the slot of this step, or the tuple of slots, once it is full."""
        mosaic().barrier_wait(self.full.at[self._slot(step)])
        return self.at(step)

    def at(self, step):
        found = tuple(slots.at[self._slot(step)] for slots in self.slots)
        return found[0] if len(found) == 1 else found

    def release(self, step):
        """Computing: this warpgroup has read the slot for the last time."""
        mosaic().barrier_arrive(self.empty.at[self._slot(step)])

    def _slot(self, step):
        # Also for one stage: a Python 0 that enters a nested scope stops the lowering of jax 0.12.
        return lax.rem(step, jnp.int32(self.stages))


def ring_scratch(stages, *tiles):
    """Scratch of a Ring: ((slots, ...), full, empty). `tiles` are (shape, dtype); one axis: a plain vector, two: a tile for wgmma."""
    plgpu = mosaic()
    make = lambda shape, dtype: smem((stages, *shape), dtype) if len(shape) == 2 else plgpu.SMEM((stages, *shape), dtype)  # noqa: E731
    return (
        tuple(make(shape, dtype) for shape, dtype in tiles),
        plgpu.Barrier(num_arrivals=len(tiles), num_barriers=stages),
        plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),
    )


def pad_axis(x, axis, multiple, value=0):
    """`x` with `axis` padded to a multiple; x itself when it is one."""
    extra = -x.shape[axis] % multiple
    return x if extra == 0 else jnp.pad(x, [(0, extra if a == axis % x.ndim else 0) for a in range(x.ndim)], constant_values=value)

"""Programs that the tests of the plan measure, as `instrument.measure` takes them: functions that return (f, arguments)."""
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu import flash_attention as flash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask


def published_attention(heads, backward=False):
    """What apple/axlearn timed on a TPU v4 (tpu_attention_benchmark.py, commit 0728da1): B2 T2048 H128, causal, bias, blocks of 512."""
    b, t, h, block = 2, 2048, 128, 512
    names = ("block_q", "block_k_major", "block_k", "block_q_major_dkv", "block_k_major_dkv", "block_k_dkv", "block_q_dkv")
    sizes = flash.BlockSizes(block_b=1, **dict.fromkeys((*names, "block_k_major_dq", "block_k_dq", "block_q_dq"), block))

    def attend(q_BTNH, k_BTNH, v_BTNH, bias_BNTT):
        q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q_BTNH * h**-0.5, k_BTNH, v_BTNH))
        return jnp.swapaxes(flash.flash_attention(q, k, v, ab=bias_BNTT, causal=True, block_sizes=sizes), 1, 2)

    x = jax.ShapeDtypeStruct((b, t, heads, h), jnp.bfloat16)
    bias = jax.ShapeDtypeStruct((b, heads, t, t), jnp.bfloat16)
    mean = lambda *args: attend(*args).mean()  # noqa: E731
    return (jax.grad(mean, argnums=(0, 1, 2)) if backward else attend), (x, x, x, bias)


def splash(heads=16, length=4096, head_dim=128, block=1024):
    """jax's splash attention, causal, forward: its tables of blocks are constants."""
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((length, length))] * heads)
    sizes = splash_attention_kernel.BlockSizes(block_q=block, block_kv=block, block_kv_compute=block)
    kernel = splash_attention_kernel.make_splash_mha_single_device(mask=mask, block_sizes=sizes)
    x = jax.ShapeDtypeStruct((heads, length, head_dim), jnp.bfloat16)
    return lambda q, k, v: kernel(q, k, v), (x, x, x)


def matmul(size=8192):
    x = jax.ShapeDtypeStruct((size, size), jnp.bfloat16)
    return jnp.matmul, (x, x)


def ragged_dot(rows=8192, groups=8, known=True):
    """lax.ragged_dot: group sizes as an argument that is known, or not."""
    sizes = np.full(groups, rows // groups, np.int32)
    lhs, rhs = jax.ShapeDtypeStruct((rows, 1024), jnp.bfloat16), jax.ShapeDtypeStruct((groups, 1024, 4096), jnp.bfloat16)
    return jax.lax.ragged_dot, (lhs, rhs, sizes if known else jax.ShapeDtypeStruct(sizes.shape, sizes.dtype))


def visits(blocks=64, visited=(3, 1), known=True):
    """A kernel with a grid of sum(visited) steps, each of which copies one of the blocks; half the steps do work."""

    def body(count_ref, table_ref, x_ref, y_ref):
        @pl.when(table_ref[1, pl.program_id(0)] > 0)
        def _():
            y_ref[...] = x_ref[...] * 2

    def f(x, table):
        steps = jnp.sum(table[2])
        spec = pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(steps,),
            in_specs=[pl.BlockSpec((8, 128), lambda i, count, table: (table[0, i], 0))],
            out_specs=pl.BlockSpec((8, 128), lambda i, count, table: (i, 0)),
        )
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return pl.pallas_call(body, out_shape=shape, grid_spec=spec, name="visits")(steps[None], table, x)

    table = np.zeros((3, 8), np.int32)
    table[0], table[1, ::2], table[2, : len(visited)] = np.arange(8)[::-1], 1, visited
    x = jax.ShapeDtypeStruct((8 * blocks, 128), jnp.float32)
    return f, (x, table if known else jax.ShapeDtypeStruct(table.shape, table.dtype))


def visits_in_a_scan():
    """The kernel of `visits` with one more step in each iteration."""
    f, (x, table) = visits()

    def scanned(x, table):
        return jax.lax.scan(lambda x, i: (f(x, table.at[2].set(0).at[2, 0].set(i + 1)), None), x, jnp.arange(3))[0]

    return scanned, (x, table)


def divided(steps=42):
    """A kernel whose block indices are quotients and remainders."""
    block = pl.BlockSpec((8, 128), lambda i: (i % 6 * 7 + i // 6, 0))
    x = jax.ShapeDtypeStruct((8 * steps, 128), jnp.float32)
    body = lambda x_ref, y_ref: y_ref.__setitem__(..., x_ref[...] * 2)  # noqa: E731
    return pl.pallas_call(body, out_shape=x, grid=(steps,), in_specs=[block], out_specs=block, name="divided"), (x,)


def fails():
    """A kernel that asks for more memory than a core has."""
    x = jax.ShapeDtypeStruct((8192, 2048), jnp.float32)
    return pl.pallas_call(lambda x_ref, y_ref: y_ref.__setitem__(..., x_ref[...]), out_shape=x, name="too_large"), (x,)

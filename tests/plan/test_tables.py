"""Values of the small arguments of kernels, followed through a traced program."""
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from effmodels.plan.schedule import tables


def call(table, x, name="kernel"):
    """A kernel with one table in scalar memory."""
    block = pl.BlockSpec((8, 128), lambda i, table: (table[i], 0))
    spec = pltpu.PrefetchScalarGridSpec(num_scalar_prefetch=1, grid=(2,), in_specs=[block], out_specs=block)
    body = lambda table_ref, x_ref, y_ref: y_ref.__setitem__(..., x_ref[...])  # noqa: E731
    return pl.pallas_call(body, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), grid_spec=spec, name=name)(table, x)


X = jax.ShapeDtypeStruct((16, 128), jnp.float32)
TABLE = np.array([1, 0], np.int32)


def calls(f, *arguments):
    return tables.kernel_calls(jax.jit(f).trace(*arguments).jaxpr, arguments)


def test_a_constant_and_an_argument():
    (found,) = calls(lambda x: call(TABLE, x), X)
    assert found.name == "kernel" and found.shapes == ((2,), (16, 128))
    assert list(found.values) == [0] and found.values[0].tolist() == [1, 0]
    (found,) = calls(lambda table, x: call(table, x), TABLE, X)
    assert found.values[0].tolist() == [1, 0]


def test_a_table_computed_from_a_known_argument():
    (found,) = calls(lambda sizes, x: call(jnp.cumsum(sizes)[1:] * 2, x), np.array([1, 2, 3], np.int32), X)
    assert found.values[0].tolist() == [6, 12]


def test_what_is_not_known_is_absent():
    (found,) = calls(lambda table, x: call(table + jnp.int32(x[0, 0]), x), TABLE, X)
    assert found.values == {}


def test_inside_calls():
    """Through jit, remat, custom derivatives and their gradients."""

    @jax.custom_vjp
    def f(table, x):
        return call(table, x, "forward")

    f.defvjp(lambda table, x: (f(table, x), table), lambda table, g: (None, call(1 - table, g, "backward")))
    loss = lambda x: jax.checkpoint(jax.jit(lambda x: f(jnp.asarray(TABLE), x).sum()))(x)  # noqa: E731
    found = calls(jax.grad(loss), X)
    assert {c.name: c.values[0].tolist() for c in found} == {"forward": [1, 0], "backward": [0, 1]}


def test_in_a_scan_every_iteration_is_known():
    def scan(x, table):
        def body(carry, step):
            x, count = carry
            y = call(table, x) + call(table + step, x, "scanned") + call(table * count, x, "carried")
            return (y + call(table + jnp.int32(x[0, 0]), x, "data"), count + 3), None

        return jax.lax.scan(body, (x, 1), jnp.arange(3))[0]

    found = {c.name: [run[0].tolist() if run else None for run in c.runs] for c in calls(scan, X, TABLE)}
    assert found == {
        "kernel": [[1, 0]] * 3,
        "scanned": [[1, 0], [2, 1], [3, 2]],
        "carried": [[1, 0], [4, 0], [7, 0]],
        "data": [None] * 3,
    }
    (found,) = calls(lambda x, table: jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: call(table, x), x), X, TABLE)
    assert found.values[0].tolist() == [1, 0]


def test_large_values_are_not_computed():
    """A mask of a long sequence is no table."""
    (found,) = calls(lambda x: call(jnp.tril(jnp.ones((4096, 4096), jnp.int32))[-2:, 0], x), X)
    assert found.values == {}

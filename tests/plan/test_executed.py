"""FLOPs counted in a jaxpr, against counts by hand."""
import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from effmodels.plan.formulas import executed

M, K, N = 6, 10, 14
A, B = jnp.ones((M, K)), jnp.ones((K, N))
ONE = 2 * M * K * N


def count(f, *arguments):
    return executed.flops(jax.make_jaxpr(f)(*arguments))


def test_a_product_and_both_of_its_gradients():
    assert count(jnp.matmul, A, B) == (ONE, 0)
    assert count(jax.grad(lambda a, b: jnp.sum((a @ b) ** 2), argnums=(0, 1)), A, B) == (3 * ONE, 0)


def test_a_batched_product():
    assert count(lambda a, b: jnp.einsum("emk,ekn->emn", a, b), jnp.ones((3, M, K)), jnp.ones((3, K, N))) == (3 * ONE, 0)


def test_loops_are_multiplied():
    def f(a, b):
        inner = lambda c, _: (jax.lax.scan(lambda c, _: (c + jnp.sum(a @ b), None), c, None, length=5)[0], None)  # noqa: E731
        return jax.lax.scan(inner, 0.0, None, length=7)[0]

    assert count(f, A, B) == (35 * ONE, 0)


def test_a_loop_of_unknown_length_counts_once_and_is_told():
    assert count(lambda a, b, n: jax.lax.fori_loop(0, n, lambda i, c: c + jnp.sum(a @ b), 0.0), A, B, 3) == (ONE, 1)


def test_the_dearer_branch_counts():
    assert count(lambda p, a, b: jax.lax.cond(p, lambda: a @ b, lambda: a @ b + (a @ b) * 2), True, A, B) == (2 * ONE, 0)


def test_recomputation_counts():
    f = jax.checkpoint(lambda a, b: jnp.sum(jnp.sin(a @ b)))
    assert count(jax.value_and_grad(f), A, B) == (3 * ONE, 0)  # forward, again, and the gradient of a


def test_what_no_result_depends_on_does_not_count():
    """The forward pass inside a gradient rule that calls `jax.vjp`, in a loop too."""

    @jax.custom_vjp
    def product(a, b):
        return a @ b

    product.defvjp(lambda a, b: (a @ b, (a, b)), lambda kept, dy: jax.vjp(jnp.matmul, *kept)[1](dy))
    f = jax.grad(lambda a, bs: jax.lax.scan(lambda c, b: (c + jnp.sum(product(a, b) ** 2), None), 0.0, bs)[0], argnums=(0, 1))
    assert count(f, A, jnp.stack([B] * 5)) == (5 * 3 * ONE, 0)


def test_parts_on_devices_count_on_each():
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    f = jax.shard_map(lambda a, b: a @ b, mesh=mesh, in_specs=(P("x"), P()), out_specs=P("x"), check_vma=False)
    with jax.set_mesh(mesh):
        assert count(f, A, B) == (4 * ONE, 0)  # split over x, repeated on y


@pytest.mark.parametrize("transposed", [False, True])
def test_groups_of_rows(transposed):
    def f(a, w, sizes):
        return jnp.sum(jax.lax.ragged_dot(a, w, sizes) ** 2)

    sizes = jnp.array([2, 4])
    got = count(jax.grad(f, argnums=1) if transposed else f, A, jnp.ones((2, K, N)), sizes)
    assert got == ((2 if transposed else 1) * ONE, 0)


def test_a_convolution():
    x, w = jnp.ones((2, 3, 8, 8)), jnp.ones((5, 3, 3, 3))
    assert count(lambda x, w: jax.lax.conv(x, w, (1, 1), "SAME"), x, w) == (2 * 2 * 5 * 64 * 27, 0)


def test_kernels_count_what_they_say():
    def kernel(x_ref, y_ref):
        y_ref[...] = x_ref[...]

    estimate = pl.CostEstimate(flops=1234, bytes_accessed=0, transcendentals=0)
    assert count(pl.pallas_call(kernel, out_shape=A, cost_estimate=estimate), A) == (1234, 0)
    assert count(pl.pallas_call(kernel, out_shape=A), A) == (0, 0)

"""Grouped matmul against a loop over rows: values, every gradient, empty groups and rows past the last group."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import grouped_matmul
from pallas_kernels.grouped_matmul import xla
from tests.numerics import assert_close, assert_trees_close


def oracle(lhs, rhs, sizes, dout):
    """One row at a time in float64: (out, d lhs, d rhs)."""
    lhs, rhs, dout = (np.asarray(x, np.float64) for x in (lhs, rhs, dout))
    out, dlhs, drhs = np.zeros((len(lhs), rhs.shape[2])), np.zeros_like(lhs), np.zeros_like(rhs)
    for m, e in enumerate(np.repeat(np.arange(len(sizes)), sizes)):
        out[m], dlhs[m] = lhs[m] @ rhs[e], rhs[e] @ dout[m]
        drhs[e] += np.outer(lhs[m], dout[m])
    return out, dlhs, drhs


def operands(M, K, N, E, dtype=np.float32):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.standard_normal(s).astype(dtype)) for s in ((M, K), (E, K, N), (M, N)))


@pytest.mark.parametrize("layout", ["EKN", "ENK"])
@pytest.mark.parametrize("implementation, sizes, M", [
    ("reference", [0, 5, 0, 9, 3], 20), ("xla", [0, 5, 0, 9, 3], 20), ("xla", [1], 1), ("xla", [300, 1, 63, 64, 65, 257], 800),
    ("xla", [0, 0], 7),
])
def test_equals_oracle(implementation, sizes, M, layout):
    lhs, rhs, dout = operands(M, 5, 7, len(sizes))
    turn = (lambda w: w.swapaxes(1, 2)) if layout == "ENK" else lambda w: w

    @jax.jit
    def run(lhs, rhs, group_sizes):
        f = functools.partial(grouped_matmul, implementation=implementation, rhs_layout=layout)
        out, vjp = jax.vjp(lambda x, w: f(x, w, group_sizes), lhs, turn(rhs))
        dlhs, drhs = vjp(dout)
        return out, dlhs, turn(drhs)

    got = run(lhs, rhs, jnp.array(sizes, jnp.int32))
    assert_trees_close(got, oracle(lhs, rhs, sizes, dout), rel=1e-5)
    used = sum(sizes)
    assert (got[0][used:] == 0).all() and (got[1][used:] == 0).all()
    assert all((got[2][e] == 0).all() for e, size in enumerate(sizes) if size == 0)


def test_float64_and_bfloat16_and_ragged_dot(x64):
    sizes = jnp.array([30, 0, 70], jnp.int32)
    lhs, rhs, dout = operands(110, 16, 8, 3, np.float64)
    run = jax.jit(grouped_matmul)
    assert_close("float64", run(lhs, rhs, sizes), oracle(lhs, rhs, [30, 0, 70], dout)[0], rel=1e-14)
    low = run(lhs.astype(jnp.bfloat16), rhs.astype(jnp.bfloat16), sizes)
    assert low.dtype == jnp.bfloat16
    assert_close("bfloat16", low.astype(jnp.float32), jax.lax.ragged_dot(lhs, rhs, sizes), rel=1e-2)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_poison_past_the_last_group_stays_there(implementation):
    """Rows that belong to no group may hold anything, and so may the gradients of their zeros: nothing else sees them."""
    lhs, rhs, dout = operands(100, 8, 8, 2)
    lhs, dout, sizes = lhs.at[70:].set(jnp.nan), dout.at[70:].set(jnp.nan), jnp.array([40, 30], jnp.int32)

    @jax.jit
    def values(lhs, rhs, dout):
        out, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, implementation=implementation), lhs, rhs)
        return out, pull(dout)

    out, grads = values(lhs, rhs, dout)
    assert all(jnp.isfinite(a).all() for a in (out, *grads)) and not out[70:].any() and not grads[0][70:].any()


@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas_tpu"])
def test_poison_past_the_last_group_reaches_no_scale(implementation):
    lhs, rhs, dout = operands(10, 8, 8, 3)
    dout, sizes = dout.at[7:].set(jnp.nan), jnp.array([3, 0, 4], jnp.int32)

    @jax.jit
    def gradient(scale):
        out, pull = jax.vjp(lambda s: grouped_matmul(lhs, rhs, sizes, rhs_scale_EN=s, implementation=implementation), scale)
        return pull(dout)[0]

    found = gradient(jnp.ones((3, 8)))
    assert jnp.isfinite(found).all() and found[0].all() and not found[1].any()


def test_the_form_for_other_platforms_equals_the_one_for_cpu():
    lhs, rhs, dout = operands(100, 8, 6, 3)
    lhs, dout, sizes = lhs.at[80:].set(jnp.nan), dout.at[80:].set(jnp.nan), jnp.array([20, 0, 60], jnp.int32)

    @jax.jit
    def both():
        rows = [f(lhs, rhs, sizes) for f in (xla._rows_cpu, xla._rows_ragged_dot)]
        return rows, [f(lhs, dout, sizes) for f in (xla._matrices_cpu, xla._matrices_ragged_dot)]

    for one, other in both():
        assert_close("rows or matrices", one, other, rel=1e-6)


def test_vmap_is_one_problem_after_the_other():
    """Each problem with its own sizes, gradients included (a batched `ragged_dot` has no transpose)."""
    lhs, rhs, _ = operands(20, 4, 4, 2)
    sizes = jnp.array([[5, 15], [12, 3]], jnp.int32)
    grad = jax.grad(lambda x, w, g: (grouped_matmul(x, w, g) ** 2).sum(), (0, 1))
    together = jax.jit(jax.vmap(grad, (None, None, 0)))(lhs, rhs, sizes)
    for i in range(2):
        assert_trees_close([x[i] for x in together], list(grad(lhs, rhs, sizes[i])), rel=1e-6)


def test_int8_with_scale():
    lhs, rhs, dout = operands(90, 8, 6, 3)
    sizes = jnp.array([20, 0, 60], jnp.int32)
    values, scale = jnp.round(20 * rhs).astype(jnp.int8), 0.05 + jnp.arange(18.0).reshape(3, 6) / 18

    def run(implementation, values):
        f = lambda x, s: (grouped_matmul(x, values, sizes, rhs_scale_EN=s, implementation=implementation) * dout).sum()  # noqa: E731
        return jax.jit(jax.value_and_grad(f, (0, 1)))(lhs, scale)

    assert_trees_close(run("xla", values), run("reference", values.astype(jnp.float32)), rel=1e-5)
    assert_trees_close(run("reference", values), run("reference", values.astype(jnp.float32)), rel=1e-6)


def test_two_runs_are_bitwise_equal():
    lhs, rhs, _ = operands(500, 16, 16, 4)
    f = jax.jit(jax.grad(lambda x, w: (grouped_matmul(x, w, jnp.array([100, 300, 0, 90])) ** 2).sum(), (0, 1)))
    for one, two in zip(f(lhs, rhs), f(lhs, rhs)):
        assert (np.asarray(one) == np.asarray(two)).all()


X, W, G = jnp.zeros((4, 3)), jnp.zeros((2, 3, 5)), jnp.zeros(2, jnp.int32)


@pytest.mark.parametrize("args, kwargs, error, message", [
    ((jnp.zeros((4, 2)), W, G), {}, ValueError, r"lhs_MK must have shape \(4, 3\) \(K of rhs_EKN\), got \(4, 2\)"),
    ((X, W[0], G), {}, ValueError, r"rhs_EKN must have 3 axes \[E, K, N\]"),
    ((X, W, jnp.zeros(3, jnp.int32)), {}, ValueError, r"group_sizes_E must have shape \(2,\)"),
    ((X, W, jnp.zeros(2)), {}, TypeError, "group_sizes_E must be an integer array, got float32"),
    ((X, W.astype(jnp.int8), G), {}, ValueError, r"rhs_EKN is int8 without rhs_scale_EN; give the scale of shape \(2, 5\)"),
    ((X, W.astype(jnp.bfloat16), G), {}, TypeError, "rhs_EKN has dtype bfloat16 but lhs_MK has float32"),
    ((X, W, G), dict(rhs_scale_EN=jnp.zeros(5)), ValueError, r"rhs_scale_EN must have shape \(2, 5\)"),
    ((X, W, G), dict(rhs_layout="NKE"), ValueError, "rhs_layout='NKE'; expected 'EKN', or without rhs_scale_EN 'ENK'"),
    ((X, W, G), dict(rhs_layout="ENK", rhs_scale_EN=jnp.zeros((2, 5))), ValueError, "rhs_layout='ENK' with rhs_scale_EN; expected 'EKN'"),
    ((X, W.swapaxes(1, 2), G), dict(rhs_layout="EKN"), ValueError, r"lhs_MK must have shape \(4, 5\)"),
    ((X, W, G), dict(implementation="pallas_gpu"), NotImplementedError, r"grouped_matmul\[pallas_gpu\]: .* Use implementation='xla'"),
])
def test_bad_input_is_refused(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        grouped_matmul(*args, **kwargs)

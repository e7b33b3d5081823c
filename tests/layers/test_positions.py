"""Rotations against complex numbers: a pair (a, b) is a + ib, and position t multiplies it by exp(i t frequency)."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effmodels.layers import positions
from effmodels.layers.positions import halves, retnet_frequencies, rope_frequencies, rotate
from tests.numerics import assert_close

POSITIONS = np.array([[0, 1, 2, 7, 4000], [5, 4, 3, 2, 1]])


def turned(x_BTNH, frequencies, interleaved):
    """The same in complex numbers, float64."""
    half, out = len(frequencies), np.array(x_BTNH)
    pairs = [(2 * i, 2 * i + 1) if interleaved else (i, i + half) for i in range(half)]
    for (i, j), frequency in zip(pairs, frequencies):
        z = (x_BTNH[..., i] + 1j * x_BTNH[..., j]) * np.exp(1j * POSITIONS * frequency)[:, :, None]
        out[..., i], out[..., j] = z.real, z.imag
    return out


def test_weights_in_halves_rotate_like_interleaved_ones(x64):
    """The same numbers in another order, so that products of queries and keys stay."""
    x, w = np.random.default_rng(0).normal(size=(2, 5, 8)), np.random.default_rng(1).normal(size=(8, 3, 10))
    frequencies = retnet_frequencies(10, 10_000.0)
    got = rotate(np.einsum("btd,dnh->btnh", x, halves(w)), POSITIONS, frequencies)
    want = rotate(np.einsum("btd,dnh->btnh", x, w), POSITIONS, frequencies, interleaved=True)
    assert_close("rotated", got, halves(np.asarray(want)), rel=1e-13)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dims", [2, 6, 10])  # of ten
def test_rotation_is_a_complex_product(dims, interleaved, x64):
    x = np.random.default_rng(0).normal(size=(2, 5, 3, 10))
    frequencies = retnet_frequencies(dims, 10_000.0) if interleaved else rope_frequencies(dims, 500.0)
    got = rotate(x, POSITIONS, frequencies, interleaved=interleaved)
    assert_close("rotated", got, turned(x, frequencies, interleaved), rel=1e-13)
    assert np.array_equal(np.asarray(got)[..., dims:], x[..., dims:]), "dims past the rotated ones must pass through"


def test_frequencies_of_rope_and_retnet():
    assert_close("rope", rope_frequencies(8, 10_000.0), [1.0, 0.1, 0.01, 0.001], rel=1e-12)
    # torchscale: linspace with its end point, so that the slowest pair turns at 1 / theta exactly.
    assert_close("retnet", retnet_frequencies(8, 10_000.0), [1.0, 10 ** (-4 / 3), 10 ** (-8 / 3), 1e-4], rel=1e-12)


def test_bfloat16_inputs_keep_exact_positions():
    """Positions stay float32: in bfloat16 257 would be 256."""
    import jax.numpy as jnp

    x = np.ones((1, 1, 1, 2), np.float32)
    got = rotate(jnp.asarray(x, jnp.bfloat16), np.array([[257]]), np.array([1.0]))
    want = np.array([np.cos(257.0) - np.sin(257.0), np.cos(257.0) + np.sin(257.0)])
    assert got.dtype == jnp.bfloat16
    assert_close("rotated", np.asarray(got, np.float64).ravel(), want, rel=4e-3)


def test_no_frequencies_leave_x_alone():
    x = np.ones((1, 2, 1, 3), np.float32)
    assert rotate(x, np.zeros((1, 2)), np.zeros(0)) is x


@pytest.mark.parametrize("magnitude", [1.0, 1.25])
def test_rotation_by_a_product_is_that_by_slices(magnitude, monkeypatch):
    """What a TPU runs in bfloat16, and its gradient: a product with 0, 1 and -1 rounds nothing."""
    x, dy = (jnp.asarray(np.random.default_rng(i).normal(size=(2, 5, 3, 10)), jnp.bfloat16) for i in range(2))

    def run():
        def form(x):
            return rotate(x, POSITIONS, retnet_frequencies(10, 10_000.0), magnitude=magnitude)

        return jax.jit(lambda x, dy: (form(x), jax.vjp(form, x)[1](dy)[0]))(x, dy)

    want = run()
    monkeypatch.setattr(positions, "on_tpu", lambda: True)
    for got, slices in zip(run(), want):
        # A fused multiply-add may round a float32 once less before the rounding to bfloat16.
        assert_close("rotated", np.asarray(got, np.float64), np.asarray(slices, np.float64), rel=1e-4)
    assert "dot_general" in str(jax.make_jaxpr(lambda x: rotate(x, POSITIONS, retnet_frequencies(10, 1e4)))(x))

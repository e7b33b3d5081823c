"""What a backward pass keeps and needs: programs whose arrays can be counted by hand, and the policies against each other."""
import jax
import jax.numpy as jnp
import pytest

from configs import quickstart
from effmodels.config import ModelConfig
from effmodels.models.resolve import resolve
from effmodels.plan import chips
from effmodels.plan.formulas import liveness

CPU = chips.measured("cpu", 1e11, 1e10)
N = 16
SQUARE = 4 * N * N


def most(f, *shapes, weights=frozenset()):
    arrays = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    layer = liveness.Layer((), liveness._working(jax.make_jaxpr(f)(*arrays).jaxpr, weights), (0, 0), (0, 0))
    return layer.working_bytes(lambda a: a.itemsize * a.shape[0] * a.shape[1])


PROGRAMS = {
    # name: (program of squares, squares that live at once besides the arguments)
    "chain of products": (lambda a, b: (a @ b) @ b @ b, 2),
    "elementwise ends in the place of its operand": (lambda a, b: jnp.tanh(a @ b) @ b, 2),
    "elementwise between elementwise is no array": (lambda a, b: jnp.exp(jnp.tanh(a @ b) + 1) @ b, 2),
    "what is read later lives on": (lambda a, b: (a @ b, (a @ b + a) @ b @ b)[1] + (c := a @ b) @ c, 3),
    "what nobody reads is not made": (lambda a, b: (a @ b @ b @ b, a @ b)[1], 1),
    "calls are looked into": (lambda a, b: jax.jit(lambda x: jax.checkpoint(jnp.tanh)(x @ b) @ b)(a), 2),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_arrays_that_live_at_once(name):
    f, squares = PROGRAMS[name]
    assert most(f, (N, N), (N, N)) == squares * SQUARE


def test_gradients_of_weights_leave_at_once():
    """Four results of a weight's shape: held to the end unless it is a weight's."""
    f = lambda a, b: [a @ b, b @ a, a @ a, b @ b]  # noqa: E731
    assert most(f, (N, N), (N, N)) == 4 * SQUARE
    assert most(f, (N, N), (N, N), weights={(N, N)}) == SQUARE


@pytest.fixture(scope="module")
def periods():
    resolved = resolve(ModelConfig.from_mapping(quickstart.get_config("test").model))
    kinds = tuple(dict.fromkeys(resolved.layers))
    return {remat: liveness.period(resolved, kinds, remat, 64, CPU) for remat in ("none", "dots", "full")}


def test_policies_are_ordered(periods):
    kept = {name: p.kept_bytes(lambda a: a.itemsize * a.shape[1] if len(a.shape) == 3 else 0) for name, p in periods.items()}
    assert kept["none"] > kept["dots"] > kept["full"]
    # All but the product that ends a layer. The form for CPUs makes a few products of a chunk again by itself.
    assert 0.95 < periods["full"].recomputed <= 1 and periods["none"].recomputed < 0.1
    (full, again), (none, once) = periods["full"].flops, periods["none"].flops
    assert full == pytest.approx(none, rel=0.02) and again > 1.3 * once


def test_full_recomputation_keeps_the_residual_stream_alone(periods):
    arrays = [a.shape for a in periods["full"].kept if len(a.shape) > 2]
    assert set(arrays) == {(1, 64, 32)} and len(arrays) == 3, "what enters each layer"

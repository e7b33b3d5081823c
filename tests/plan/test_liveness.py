"""What a backward pass keeps and needs: programs whose arrays can be counted by hand, and the policies against each other."""
import math

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
    return layer.working_bytes(lambda a: a.itemsize * math.prod(a.shape))


def stream(a, b):
    """A sum of products, of which each reads the sum by another name."""
    x = a @ b
    for _ in range(6):
        x = x + jax.lax.reshape(jax.lax.reshape(x, (N * N,)), (N, N)) @ b
    return x


PROGRAMS = {
    # name: (program of squares, squares that live at once besides the arguments)
    "chain of products": (lambda a, b: (a @ b) @ b @ b, 2),
    "elementwise ends in the place of its operand": (lambda a, b: jnp.tanh(a @ b) @ b, 2),
    "elementwise between elementwise is no array": (lambda a, b: jnp.exp(jnp.tanh(a @ b) + 1) @ b, 2),
    "what is read later lives on": (lambda a, b: (a @ b, (a @ b + a) @ b @ b)[1] + (c := a @ b) @ c, 3),
    "a sum by another name is the same array": (stream, 2),
    "of what is summed the sum alone waits": (lambda a, b: (s := jnp.sum(a @ b, 0), (c := a @ b) @ c @ b + s)[1], 2),
    "what nobody reads is not made": (lambda a, b: (a @ b @ b @ b, a @ b)[1], 1),
    "calls are looked into": (lambda a, b: jax.jit(lambda x: jax.checkpoint(jnp.tanh)(x @ b) @ b)(a), 2),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_arrays_that_live_at_once(name):
    f, squares = PROGRAMS[name]
    assert most(f, (N, N), (N, N)) // SQUARE == squares


def test_gradients_of_weights_leave_at_once():
    """Four results of a weight's shape: held to the end unless it is a weight's."""
    f = lambda a, b: [a @ b, b @ a, a @ a, b @ b]  # noqa: E731
    assert most(f, (N, N), (N, N)) == 4 * SQUARE
    assert most(f, (N, N), (N, N), weights={(N, N)}) == SQUARE


def test_layers_of_a_period_make_again_before_gradients_but_loops_wait():
    """The last layer's backward pass is first: with it is what the others made again. A loop in a loop copies what its layers kept."""
    array = liveness.Array((10,), 1, False, 0, 9)
    ahead = liveness.Array((4,), 1, False, 0, 9, ahead=True)
    layer = liveness.Layer((liveness.Array((3,), 1, False),), (array, ahead), (2, 4), (1, 2))
    size = lambda a: a.shape[0]  # noqa: E731
    assert liveness.Period(((layer, 1),)).working_bytes(size, True) == 14
    assert liveness.Period(((layer, 1),) * 3).working_bytes(size, True) == 14 + 2 * 4
    looped = liveness.Period(((layer, 5), (layer, 1)))
    assert looped.working_bytes(size, True) == 14 + 5 * 3 and looped.working_bytes(size, False) == 14
    assert looped.kept_bytes(size) == 6 * 3 and looped.flops == (12, 24) and looped.recomputed == 0


def test_a_weight_is_not_held_between_what_is_made_again_and_its_gradients():
    """A cast weight that the first product reads, and the last one: alive before the gradients and at their end, not meanwhile."""

    def f(w, x, dy):
        cast = w.astype(jnp.bfloat16)
        d = dy @ jnp.tanh(x @ cast)
        for _ in range(3):
            d = dy @ d
        return jax.lax.dot_general(d, cast, (((1,), (1,)), ((), ())))

    shapes = jax.ShapeDtypeStruct((N, 2 * N), jnp.float32), *[jax.ShapeDtypeStruct((3 * N, n), jnp.bfloat16) for n in (N, 3 * N)]
    held = [a for a in liveness._working(jax.make_jaxpr(f)(*shapes).jaxpr, {(N, 2 * N)}, 1) if a.weight]
    assert len(held) == 2 and held[0].death < held[1].birth - 2 and held[0].shape == held[1].shape == (N, 2 * N)


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

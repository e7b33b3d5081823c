"""Stacked and scanned layers equal separate layers in a loop: initial values bit for bit, outputs, gradients, shared modules.

Letters: R repeats, D width.
"""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effmodels.layers.param import ParamInfo, param
from effmodels.models import state as model_state
from effmodels.parallel import stack
from tests.contract.cases import draw, jit
from tests.numerics import assert_trees_close

R, D = 3, 5


class Layer(nnx.Module):
    def __init__(self, key):
        rngs = nnx.Rngs(key)
        self.w = param(jax.random.normal, rngs.params(), (D, D), ("embed", "mlp"), in_dims=("embed",))
        self.inner = nnx.List([nnx.Dict(b=param(jax.random.normal, rngs.params(), (D,), ("norm",), in_dims=()))])


class Shared(nnx.Module):
    def __init__(self, key):
        self.w = param(jax.random.normal, key, (D, D), ("embed", "mlp"), in_dims=("embed",))


def run_layer(layer, carry, x, shared=None):
    y = jnp.tanh(carry @ layer.w[...] + layer.inner[0]["b"][...] + (0 if x is None else x))
    return (y if shared is None else y + jnp.sin(carry @ shared.w[...])), jnp.sum(y)


def keys():
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(3), i))(jnp.arange(R))


def test_stack_equals_separate_builds_bit_for_bit():
    stacked, separate = stack.stack(Layer, keys()), [Layer(k) for k in keys()]
    _, params, _ = model_state.split(stacked)
    for r, layer in enumerate(separate):
        for path, value in model_state.split(layer)[1].items():
            assert np.array_equal(params[path][r], value), path
    infos = model_state.info(stacked)
    assert infos["w"] == ParamInfo(("layers", "embed", "mlp"), ("embed",), ("layers",))
    assert infos["inner.0.b"] == ParamInfo(("layers", "norm"), (), ("layers",))


@pytest.mark.parametrize("remat", ["none", "full", "dots", "dots_no_batch"])
def test_scan_equals_a_loop_and_shared_gradients_sum_over_repeats(remat, x64):
    definitions = [model_state.split(jax.eval_shape(lambda b=b: b(jax.random.key(0))))[0] for b in (Layer, Shared)]
    params = {"w": draw(R, D, D), "inner.0.b": draw(R, D, seed=1)}
    shared, carry, xs = {"w": draw(D, D, seed=2)}, draw(2, D, seed=3), draw(R, D, seed=4)

    def module(i, arrays):
        return model_state.merge(definitions[i], arrays, {})

    def scanned(params, shared, carry, xs):
        out, ys = stack.scan(run_layer, module(0, params), carry, xs, shared=module(1, shared), remat=remat)
        return jnp.sum(out**2) + jnp.sum(ys * jnp.arange(1.0, R + 1))

    def looped(params, uses, carry, xs):
        total = 0.0
        for r in range(R):
            layer = module(0, {p: a[r] for p, a in params.items()})
            carry, y = run_layer(layer, carry, xs[r], module(1, uses[r]))
            total += (r + 1.0) * y
        return jnp.sum(carry**2) + total

    @jit
    def both(*args):
        params, shared, carry, xs = args
        got = jax.value_and_grad(scanned, argnums=(0, 1, 2, 3))(*args)
        value, (gp, per_use, gc, gx) = jax.value_and_grad(looped, argnums=(0, 1, 2, 3))(params, [shared] * R, carry, xs)
        return got, (value, (gp, jax.tree.map(lambda *g: sum(g), *per_use), gc, gx))

    got, want = both(params, shared, carry, xs)
    assert_trees_close(got, want, rel=1e-12)


def test_scan_without_xs_or_shared():
    stacked = stack.stack(Layer, keys())
    out, ys = stack.scan(run_layer, stacked, jnp.ones((1, D)))
    assert out.shape == (1, D) and ys.shape == (R,)

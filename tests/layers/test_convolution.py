"""The short convolution: values and gradients of a loop over tokens, documents, decoding with holes, and rows split over devices.

Letters: B batch, T time, N and H channels.
"""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effmodels.config import ConfigError
from effmodels.layers.convolution import ShortConvolution
from effmodels.models import state as model_state
from effmodels.parallel import axes, layouts, mesh
from effmodels.parallel.options import Options
from tests.contract.cases import draw, fill, jit
from tests.numerics import assert_close, assert_trees_close

pytestmark = pytest.mark.usefixtures("x64")
N, H = 4, 3
SEGMENTS = np.array([[1] * 5 + [2] * 2 + [3] * 1 + [4] * 13 + [0] * 3, [0] * 2 + [7] * 20 + [0] * 2], np.int32)


def make(width=4, bias=True, swish=True):
    def build():
        return ShortConvolution(
            (N, H), ("heads", "head_dim"), ("act_heads", None), rngs=nnx.Rngs(0), width=width, bias=bias, swish=swish, param_dtype="float64"
        )

    return fill(build)[:2]


def loop(params, x, segments, swish=True):
    """One token and tap at a time; taps outside of the token's document are left out."""
    width, y = params["weight"].shape[-1], []
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            total = params.get("bias", 0.0) * jnp.ones((N, H))
            for back in range(min(width, t + 1)):
                if segments[b, t] and segments[b, t - back] == segments[b, t]:
                    total = total + params["weight"][..., width - 1 - back] * x[b, t - back]
            y.append(total)
    y = jnp.stack(y).reshape(x.shape)
    return y / (1 + jnp.exp(-y)) if swish else y


def with_grads(f, params, x):
    probe = draw(*x.shape, seed=3)
    (_, y), grads = jax.value_and_grad(lambda p, x: (jnp.sum(f(p, x) * probe), f(p, x)), argnums=(0, 1), has_aux=True)(params, x)
    return y, grads


@pytest.mark.parametrize("width, bias, packed, swish", [(4, True, True, True), (2, False, False, True), (3, False, True, False)])
def test_values_and_gradients_are_those_of_the_loop(width, bias, packed, swish):
    graphdef, params = make(width, bias, swish)
    x, segments = draw(2, 11, N, H), SEGMENTS[:, :11] if packed else np.ones((2, 11), np.int32)

    @jit
    def run(params, x):
        got = with_grads(lambda p, x: model_state.merge(graphdef, p, {})(x, segments if packed else None), params, x)
        return got, with_grads(lambda p, x: loop(p, x, segments, swish), params, x)

    assert_trees_close(*run(params, x), rel=1e-13)


def test_a_row_shorter_than_the_taps_and_a_document_that_comes_back():
    graphdef, params = make()
    conv = model_state.merge(graphdef, params, {})
    x = jnp.asarray(draw(1, 3, N, H))
    assert_close("two tokens", conv(x[:, :2]), loop(params, x[:, :2], np.ones((1, 2))), rel=1e-14)
    # Ids 1, 2, 1: the third token starts anew, as a state does; padding in between ends nothing.
    alone = loop(params, x[:, 2:], np.ones((1, 1)))
    assert_close("comes back", conv(x, np.array([[1, 2, 1]]))[:, 2:], alone, rel=1e-14)
    assert_close("padding inside", conv(x, np.array([[1, 0, 1]])), loop(params, x, np.array([[1, 0, 1]])), rel=1e-14)


def test_prefill_in_chunks_with_holes_is_one_call():
    """Of every valid token; invalid ones are no taps, wherever they are."""
    graphdef, params = make()
    valid = np.ones((2, 13), bool)
    valid[0, :3] = valid[0, 5] = valid[0, 8:11] = valid[1, 6:] = False
    x = draw(2, 13, N, H)

    @jit
    def run(params, x):
        conv = model_state.merge(graphdef, params, {})
        last, parts = conv.init_state(2, jnp.float64), []
        for start, stop in ((0, 1), (1, 4), (4, 11), (11, 12), (12, 13)):
            y, last = conv.prefill(x[:, start:stop], last, valid[:, start:stop])
            parts.append(y)
        _, all_valid = conv.prefill(x, conv.init_state(2, jnp.float64))
        return jnp.concatenate(parts, axis=1), last, all_valid

    got, last, all_valid = run(params, x)
    for b in range(2):
        alone = x[b][valid[b]]
        want = loop(params, jnp.asarray(alone)[None], np.ones((1, len(alone))))[0]
        assert_close(f"row {b}", np.asarray(got)[b][valid[b]], want, rel=1e-14)
        assert np.array_equal(np.asarray(last)[b], alone[-3:])
    assert np.array_equal(np.asarray(all_valid), x[:, -3:])


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_a_split_row_is_one_device(layout):
    graphdef, params = make()
    x = draw(2, 24, N, H)

    def run(params, x, segments):
        return with_grads(lambda p, x: model_state.merge(graphdef, p, {})(x, segments), params, x)

    want, (want_p, want_x) = jit(lambda p, x: with_grads(lambda p, x: model_state.merge(graphdef, p, {})(x, SEGMENTS), p, x))(params, x)
    with axes.use(mesh.make_mesh({"seq": 4, "tensor": 2}), parallel=Options(layout=layout)):
        back = lambda a: layouts.from_layout(a, layout, 4)  # noqa: E731
        to = lambda a: layouts.to_layout(a, layout, 4)  # noqa: E731
        call = lambda p, x: back(model_state.merge(graphdef, p, {})(to(x), to(SEGMENTS)))  # noqa: E731
        got, (got_p, got_x) = jit(lambda p, x: with_grads(call, p, x))(params, x)
    assert_close("values", got, want, rel=1e-14)
    assert_close("gradient of x", got_x, want_x, rel=1e-13)
    assert_trees_close(got_p, want_p, rel=1e-13)


def test_what_cannot_be_split_says_so():
    graphdef, params = make(width=5)
    conv, devices = model_state.merge(graphdef, params, {}), mesh.make_mesh({"seq": 8})
    with axes.use(devices), pytest.raises(ConfigError, match="4 tokens before each stretch are needed, but a stretch has 3"):
        conv(jnp.zeros((1, 24, N, H)))
    with axes.use(devices, parallel=Options(layout="striped")), pytest.raises(ConfigError, match="'striped' layout have no neighbours"):
        conv(jnp.zeros((1, 48, N, H)))

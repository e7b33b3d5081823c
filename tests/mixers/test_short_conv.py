"""The gated short convolution against a loop over tokens and taps, and a sequence split over devices against one device.

Letters: T time, D model.
"""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effmodels.config import ConfigError
from effmodels.layers.context import Ctx
from effmodels.mixers.base import Env
from effmodels.mixers.short_conv import ShortConv
from effmodels.models import state as model_state
from tests.contract.cases import draw, fill, jit
from tests.mixers.split import assert_split_is_whole
from tests.numerics import assert_close, assert_trees_close

T, D = 11, 8
SEGMENTS = np.array([1] * 5 + [2] * 1 + [3] * 3 + [0] * 2, np.int32)


def make(**fields):
    return fill(lambda: ShortConv(ShortConv.Config(**fields), Env(d_model=D, param_dtype="float64"), rngs=nnx.Rngs(0)))[:2]


def naive(p, x, segments):
    """One row: a token and a tap at a time; a tap outside of the token's document is left out."""
    b, c, inner = (x @ p["w" + n] + p.get("b" + n, 0.0) for n in "bcx")
    taps, rows = p["conv.weight"], []
    for t in range(len(x)):
        total = p.get("conv.bias", 0.0) * jnp.ones(D)
        for back in range(min(taps.shape[1], t + 1)):
            if segments[t] and segments[t - back] == segments[t]:
                total = total + taps[:, -1 - back] * b[t - back] * inner[t - back]
        rows.append(c[t] * total)
    return jnp.stack(rows) @ p["wo"] + p.get("bo", 0.0)


@pytest.mark.core
@pytest.mark.parametrize("fields", [{}, {"conv_width": 4, "bias": True}])
def test_values_and_gradients_are_those_of_the_loop(fields, x64):
    graphdef, params = make(**fields)
    x, probe = draw(T, D, seed=1), draw(T, D, seed=2) * (SEGMENTS > 0)[:, None]

    @jit
    def run(params, x):
        def of(f):
            return jax.grad(lambda p, x: (jnp.sum(f(p, x) * probe), f(p, x)), argnums=(0, 1), has_aux=True)(params, x)

        ctx = Ctx(segment_ids_BT=SEGMENTS[None])
        return of(lambda p, x: model_state.merge(graphdef, p, {})(x[None], ctx)[0]), of(lambda p, x: naive(p, x, SEGMENTS))

    (got_grads, got), (want_grads, want) = run(params, x)
    assert_close("values", got[SEGMENTS > 0], want[SEGMENTS > 0], rel=1e-13)
    assert_trees_close(got_grads, want_grads, rel=1e-12)


@pytest.mark.parametrize("layout", ["contiguous", pytest.param("zigzag", marks=pytest.mark.slow)])
def test_a_split_sequence_is_one_device(layout, x64):
    """Values and gradients of packed rows, time split over four devices and channels over two; a document ends at a shard's edge."""
    graphdef, params = make(bias=True)
    assert_split_is_whole(graphdef, params, D, layout, rel=1e-13)


def test_padding_on_the_left_leaves_no_trace(x64):
    """Whatever lies in the padding, the state after it is the empty one, and the tokens behind it are those of a row without."""
    graphdef, params = make(bias=True)
    mixer, x = model_state.merge(graphdef, params, {}), draw(1, T, D)
    valid = np.arange(T)[None] >= 4

    def ctx(valid_BT):
        return Ctx(segment_ids_BT=valid_BT.astype(np.int32), mode="prefill")

    y, state = mixer.prefill(x, ctx(valid), mixer.init_state(1, T, "float64"), valid)
    alone, want = mixer.prefill(x[:, 4:], ctx(valid[:, 4:]), mixer.init_state(1, T, "float64"))
    assert_close("tokens", y[:, 4:], alone, rel=1e-14)
    assert np.array_equal(state.x_BwC, want.x_BwC)
    _, padded = mixer.prefill(x[:, :4], ctx(valid[:, :4]), mixer.init_state(1, T, "float64"), valid[:, :4])
    assert not np.any(padded.x_BwC)


def test_parameters_of_the_published_layer():
    """LFM2-8B-A1B: in 2048 x 6144, three taps of 2048 channels, out 2048 x 2048."""
    cost = ShortConv.cost(ShortConv.Config(), Env(d_model=2048), 1024)
    assert cost.params == 2048 * 6144 + 3 * 2048 + 2048 * 2048
    assert cost.state_bytes == 2 * 2 * 2048 and cost.decode_flops == 2 * cost.params


def test_bad_configs_say_what_to_do():
    with pytest.raises(ConfigError, match="short_conv: expected conv_width >= 1, got conv_width=0"):
        ShortConv.check(ShortConv.Config(conv_width=0), Env(d_model=D))

"""The dense feed-forward layer against its formula, its default width, and its errors."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effmodels.channel import base
from effmodels.channel.mlp import MLP, hidden_size
from effmodels.config import ConfigError
from effmodels.layers.context import Ctx
from effmodels.mixers.base import Env
from effmodels.models import state as model_state
from tests.channel import oracles
from tests.contract.cases import D_MODEL, draw, make_channel
from tests.numerics import assert_close, assert_trees_close


@pytest.mark.parametrize("fields", [{}, {"swiglu_alpha": 1.3, "swiglu_limit": 0.6}])
def test_clamped_swiglu_and_every_gradient(fields, x64):
    """gpt-oss's activation; of values past the limit the gradient is exactly zero."""
    graphdef, params, buffers = make_channel("mlp", {"hidden": 7, "activation": "swiglu_clamped", "bias": True, **fields})
    x, probe = draw(2, 3, D_MODEL), draw(2, 3, D_MODEL, seed=2)

    def loss(run):
        return jax.grad(lambda params, x: jnp.sum(run(params, x) * probe), argnums=(0, 1))(params, x)

    got = loss(lambda params, x: model_state.merge(graphdef, params, buffers)(x, Ctx())[0])
    assert_trees_close(got, loss(lambda params, x: oracles.mlp(jnp, params, x, "swiglu_clamped", **fields)), rel=1e-11)
    want = oracles.mlp(np, params, x, "swiglu_clamped", **fields)
    assert_close("y", model_state.merge(graphdef, params, buffers)(x, Ctx())[0], want, rel=1e-12)
    function, _ = base.activation(MLP.Config(activation="swiglu_clamped"))
    for gate, up, zero in ((7.5, 1.0, 0), (1.0, -7.5, 1), (1.0, 7.5, 1)):
        assert jax.grad(function, argnums=zero)(gate, up) == 0.0
    assert jax.grad(function)(-7.5, 1.0) != 0.0, "the gate is cut from above only"


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "gelu", "relu2"])
def test_values(activation, x64):
    graphdef, params, buffers = make_channel("mlp", {"hidden": 7, "activation": activation})
    x = draw(2, 3, D_MODEL)
    y, aux = model_state.merge(graphdef, params, buffers)(x, Ctx())
    assert aux is None and len(params) == (3 if "glu" in activation else 2)
    assert_close("y", y, oracles.mlp(np, params, x, activation), rel=1e-12)


def test_default_width_keeps_the_parameter_count():
    """4 d without a gate; with one 8/3 d, rounded up to a multiple of 64 (arXiv:2002.05202 section 2)."""
    for activation, d_model, want in (("gelu", 96, 384), ("swiglu", 96, 256), ("swiglu", 768, 2048), ("geglu", 1000, 2688)):
        assert hidden_size(MLP.Config(activation=activation), Env(d_model=d_model)) == want


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"activation": "gelus"}, r"mlp.activation: unknown 'gelus'. Did you mean 'gelu'\?"),
        ({"swiglu_limit": 0.0}, r"expected swiglu_limit > 0, got 0.0"),
        ({"hidden": 0}, r"expected hidden >= 1 or None, got 0"),
    ],
)
def test_bad_configs_say_what_to_do(fields, message):
    with pytest.raises(ConfigError, match=message):
        MLP.check(MLP.Config(**fields), Env(d_model=8))

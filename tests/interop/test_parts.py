"""What families brought into the models: counted exactly, and right where decoding and packing meet it."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effmodels.config import ConfigError
from effmodels.interop.load import model_config
from effmodels.models import Decoder, cost
from effmodels.models import state as model_state
from tests.interop import folders
from tests.numerics import assert_close


def abstract(config):
    return nnx.eval_shape(functools.partial(lambda key: Decoder(config, rngs=nnx.Rngs(key))), jax.random.key(0))


@pytest.mark.parametrize("name", folders.ALL)
def test_parameters_are_counted_exactly(name):
    ref = folders.reference(name)
    family, config = model_config(ref["config"])
    held = sum(int(np.prod(shape)) for n, (_, *shape) in ref["tensors"].items() if not family.ignores(n) and "e_score_correction" not in n)
    assert cost(config, 8).params == model_state.num_params(abstract(config)) == held


@pytest.mark.slow
def test_learned_positions_end_loudly():
    config = {"vocab_size": 11, "d_model": 16, "num_layers": 1, "learned_positions": 6, "mixers": {"attention": {"num_heads": 2}}}
    model = Decoder(config, rngs=nnx.Rngs(0))
    assert np.all(np.isfinite(model(jnp.zeros((1, 6), jnp.int32))))
    with pytest.raises(ConfigError, match="learned_positions=6: a row of 7 tokens is longer"):
        model(jnp.zeros((1, 7), jnp.int32))
    state = model.prefill(jnp.zeros((1, 6), jnp.int32), model.init_state(1, 8))[1]
    assert np.all(np.isnan(model.step(jnp.zeros((1,), jnp.int32), state)[0]))


def test_retention_with_the_decay_normaliser_packed_equals_alone():
    mixers = {"retention": {"num_heads": 2, "decay_norm": True, "head_norm_eps": 1e-2}}
    model = Decoder({"vocab_size": 11, "d_model": 16, "num_layers": 2, "pattern": ("retention",), "mixers": mixers}, rngs=nnx.Rngs(0))
    a, b = np.arange(5) % 11, np.arange(3, 10) % 11
    packed = model(jnp.asarray([[*a, *b]]), segment_ids=jnp.asarray([[1] * 5 + [2] * 7]))
    assert_close("first", packed[:, :5], model(jnp.asarray([a])), 1e-5)
    assert_close("second", packed[:, 5:], model(jnp.asarray([b])), 1e-5)

"""`scan_neighbours`: equal layers in a row inside a period are one compiled layer, with the same numbers."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effmodels.config import ModelConfig
from effmodels.models import Decoder
from effmodels.models import state as model_state

# Two periods of three and one layer, and a tail that is cut off after two.
CONFIG = ModelConfig(
    vocab_size=24, d_model=8, num_layers=10, pattern=("retention",) * 3 + ("attention",), channel=("moe",), dropout=0.2,
    mixers={"attention": {"num_heads": 2}, "retention": {"num_heads": 2, "head_dim": 4, "value_dim": 4}}, implementation="reference",
    channels={"moe": {"num_experts": 3, "top_k": 2, "hidden": 5, "router": "sigmoid", "bias_update_rate": 0.1}}, param_dtype="float64",
)  # fmt: skip


def numbers(config):
    """((loss, choices per layer and expert), gradients of the parameters) and how many matrix products the program has."""
    graphdef, params, buffers = model_state.split(Decoder(config, rngs=nnx.Rngs(0)))
    tokens = jax.random.randint(jax.random.key(1), (2, 7), 1, 24)
    batch = {"tokens": tokens, "targets": tokens, "segment_ids": jnp.asarray([[1, 1, 1, 2, 2, 2, 2], [1] * 7])}

    def loss(params):
        out = model_state.merge(graphdef, params, buffers).loss(batch, key=jax.random.key(2))
        return out.total_sum, out.aux.load_LE

    f = jax.value_and_grad(loss, has_aux=True)
    return jax.jit(f)(params), str(jax.make_jaxpr(f)(params)).count("dot_general")


@pytest.mark.core
@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full"])
def test_numbers_stay_and_the_program_shrinks(remat, x64):
    config = dataclasses.replace(CONFIG, compute_dtype="float64", remat=remat)
    ((value, loads), grads), products = numbers(dataclasses.replace(config, scan_neighbours=True))
    ((want_value, want_loads), want), more = numbers(config)
    assert float(value) == pytest.approx(float(want_value), rel=1e-12)
    np.testing.assert_array_equal(loads, want_loads)
    for path, gradient in grads.items():
        np.testing.assert_allclose(gradient, want[path], rtol=1e-9, atol=1e-12 * np.abs(want[path]).max(), err_msg=path)
    assert products < 0.65 * more

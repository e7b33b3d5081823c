"""CONTRIBUTING's mixer is real: written to one file and registered by one line, it keeps the contract, trains and decodes."""
import importlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effmodels.layers.context import Ctx
from effmodels.mixers.base import Env
from effmodels.mixers.registry import MIXERS
from effmodels.models import Decoder, cost
from effmodels.models import state as model_state
from tests.contract import test_mixers as contract
from tests.contract.cases import packed_batch
from tests.docs.blocks import code_block
from tests.numerics import assert_close

CONFIG = {"vocab_size": 32, "d_model": 16, "num_layers": 2, "pattern": ("ema",), "mixers": {"ema": {"decay": 0.8}}}


@pytest.fixture
def ema(tmp_path, monkeypatch):
    """The documented file and line, with a folder of the test in place of effmodels/mixers."""
    (tmp_path / "contributed_ema.py").write_text(code_block("CONTRIBUTING.md", "mixer file"))
    name, target = code_block("CONTRIBUTING.md", "registry line").strip().rstrip(",").split(": ")
    package, cls = target.strip('"').split(":")
    assert (name, package) == ('"ema"', "effmodels.mixers.ema")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(MIXERS, "ema", f"contributed_ema:{cls}")
    yield importlib.import_module("contributed_ema")
    del sys.modules["contributed_ema"]


def test_the_short_one_keeps_the_mixer_contract(tmp_path, monkeypatch, x64):
    """A subclass in fifteen lines: as it stands in the document."""
    (tmp_path / "contributed_gated.py").write_text(code_block("CONTRIBUTING.md", "short mixer file"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(MIXERS, "gated_retention", "contributed_gated:GatedRetention")
    fields = {"num_heads": 2, "head_dim": 4, "value_dim": 6}
    contract.test_prefill_chunks_and_steps_equal_call("gated_retention", fields)
    contract.test_causality_packing_and_gradients("gated_retention", fields)
    config = {"vocab_size": 32, "d_model": 16, "num_layers": 2, "pattern": ("gated_retention",), "mixers": {"gated_retention": fields}}
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    assert model_state.num_params(model) == cost(config, 16).params
    del sys.modules["contributed_gated"]


def test_it_keeps_the_mixer_contract(ema, x64):
    contract.test_prefill_chunks_and_steps_equal_call("ema", {})
    contract.test_causality_packing_and_gradients("ema", {"decay": 0.7})
    contract.test_every_dim_is_named_and_state_bytes_are_exact("ema", {})


def test_it_is_the_average_that_it_says_it_is(ema, x64):
    x, ids = np.random.default_rng(0).normal(size=(1, 7, 16)), np.array([[1, 1, 1, 2, 2, 0, 3]])
    env = Env(d_model=16, param_dtype="float64")

    @jax.jit
    def run(x, ids):
        mixer = ema.EMA(ema.EMA.Config(decay=0.75), env, rngs=nnx.Rngs(0))
        return mixer(x, Ctx(segment_ids_BT=ids))[0], mixer.w[...]

    got, w = run(x, ids)
    average = np.zeros(16)
    for t in range(7):
        average = np.zeros(16) if t and ids[0, t] != ids[0, t - 1] else average
        average = 0.75 * average + 0.25 * x[0, t]
        assert_close(f"token {t}", got[t], average @ w if ids[0, t] else np.zeros(16), rel=1e-12)


@pytest.mark.slow
def test_a_model_with_it_trains_and_decodes(ema):
    model = nnx.eval_shape(build, jax.random.key(0))
    graphdef = model_state.split(model)[0]
    params = jax.jit(lambda key: model_state.split(build(key))[1])(jax.random.key(0))
    assert sum(a.size for a in params.values()) == cost(CONFIG, 16).params
    batch = packed_batch(2, 16, 32)
    loss_and_grads = jax.jit(jax.value_and_grad(lambda params, batch: model_state.merge(graphdef, params, {}).loss(batch).loss))

    before, grads = loss_and_grads(params, batch)
    after, _ = loss_and_grads({p: a - 0.1 * grads[p] for p, a in params.items()}, batch)
    assert after < before, (before, after)
    assert all(np.any(np.asarray(g)) and np.all(np.isfinite(g)) for g in grads.values())

    @jax.jit
    def decode(params, tokens):
        model = model_state.merge(graphdef, params, {})
        first, state = model.prefill(tokens[:, :3], model.init_state(2, 8))
        second, _ = model.step(tokens[:, 3], state)
        return model(tokens), jnp.concatenate([first, second[:, None]], axis=1)

    want, got = decode(params, jnp.asarray(batch["tokens"][:, :4]))
    assert_close("logits of a chunk and a step", got, want, rel=1e-5)


def build(key):
    return Decoder(CONFIG, rngs=nnx.Rngs(key))

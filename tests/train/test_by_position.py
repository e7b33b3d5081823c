"""The loss by position against logits taken one token at a time; rotations changed on a loaded model are those of a model made so."""
import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from effmodels.config import ConfigError, ModelConfig
from effmodels.models import Decoder
from effmodels.models import state as model_state
from effmodels.train.by_position import Bin, loss_by_position, table, with_rope_scaling
from tests.contract.cases import fill, jit, packed_batch

V = 11
CONFIG = ModelConfig(
    vocab_size=V, d_model=16, num_layers=2, pattern=("attention", "short"), channels={"mlp": {"hidden": 16}},
    mixers={"attention": {"num_heads": 2}, "short": {"kind": "attention", "num_heads": 2, "window": 3}},
)  # fmt: skip
SCALING = {"kind": "yarn", "factor": 4.0, "original_length": 8}


def model_of(config):
    return model_state.merge(*fill(lambda: Decoder(config, rngs=nnx.Rngs(0))))


def test_bins_are_means_over_positions():
    model, batches = model_of(CONFIG), [packed_batch(3, 17, V, seed) for seed in (0, 1)]
    bins = loss_by_position(model, batches)
    assert [(b.first, b.last) for b in bins][:5] == [(0, 0), (1, 1), (2, 3), (4, 7), (8, 15)]
    graphdef, *arrays = model_state.split(model)
    logits = jit(lambda p, b, *args: model_state.merge(graphdef, p, b)(*args))
    found = {b: [] for b in bins}
    for batch in batches:
        log_p = jax.nn.log_softmax(np.asarray(logits(*arrays, batch["tokens"], batch["segment_ids"], batch["positions"]), np.float64))
        for row, place in np.argwhere(batch["weights"] > 0):
            (b,) = [b for b in bins if b.first <= batch["positions"][row, place] <= b.last]
            found[b].append(-log_p[row, place, batch["targets"][row, place]])
    for b, losses in found.items():
        assert b.tokens == len(losses) and np.isclose(b.loss, np.mean(losses), rtol=1e-5), b
    assert table([Bin(2, 3, 4.0, 0.0)]).splitlines()[1].split() == ["2..3", "4", "0.0000", "1.00"]


def test_rope_scaling_at_load_time():
    model, tokens = model_of(CONFIG), np.arange(20)[None] % V
    scaled = {name: {**fields, "rope_scaling": SCALING} for name, fields in CONFIG.mixers.items()}
    want = model_of(dataclasses.replace(CONFIG, mixers=scaled))
    graphdef = model_state.split(want)[0]
    got = with_rope_scaling(model, SCALING)
    assert model_state.split(got)[0] == graphdef
    arrays = model_state.split(model)[1:]
    assert not np.allclose(model(tokens), jit(lambda p, b: model_state.merge(graphdef, p, b)(tokens))(*arrays), atol=1e-3)
    with pytest.raises(ConfigError, match="rope_scaling: no mixer of this model rotates by RoPE"):
        with_rope_scaling(model_of(dataclasses.replace(CONFIG, pattern=("retention",), mixers={})), SCALING)

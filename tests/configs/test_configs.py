"""Every config loads without jax, validates, builds in the abstract and counts its parameters; nothing is compiled."""
import dataclasses
import json
import subprocess
import sys

import jax
import pytest
from flax import nnx

from effmodels.models import Decoder, cost
from effmodels.models.state import num_params
from effmodels.train.run_config import RunConfig, jsonable
from tests.configs.catalogue import NAMES, ROOT, VARIANTS, label, load

IMPORT_ALL = """
import importlib, json, sys
for name, arg in json.loads(sys.argv[1]):
    importlib.import_module("configs." + name).get_config(arg)
ours = {m.split(".")[0] for m in sys.modules} & {"jax", "jaxlib", "flax", "numpy", "effmodels", "pallas_kernels", "experiments"}
assert not ours, f"loading configs imported {sorted(ours)}"
"""


def run_config(variant):
    return RunConfig.from_mapping(load(*variant))


@pytest.mark.subprocess
def test_configs_load_without_jax():
    loaded = subprocess.run([sys.executable, "-c", IMPORT_ALL, json.dumps(VARIANTS)], cwd=ROOT, capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr


@pytest.mark.parametrize("variant", VARIANTS, ids=label)
def test_builds_in_the_abstract_and_counts_its_parameters(variant):
    expect, run = load(*variant).expect, run_config(variant)
    model = nnx.eval_shape(lambda key: Decoder(run.model, rngs=nnx.Rngs(key)), jax.random.key(0))
    counted = cost(run.model, run.seq_len)
    assert counted.params == num_params(model), "cost() and the abstract model differ"
    for stated, actual in ((expect.params, counted.params), (expect.active_params, counted.active_params)):
        if stated is not None:
            assert abs(actual / stated - 1) < 1e-3, f"the config states {stated:,.0f} parameters, the model has {actual:,}"


@pytest.mark.parametrize("name", NAMES)
def test_the_full_size_is_stated(name):
    """Whoever reads a config learns its size, and the test above keeps it true."""
    assert load(name).expect.params is not None, f"configs/{name}.py: set c.expect.params"


@pytest.mark.parametrize("variant", VARIANTS, ids=label)
def test_a_run_survives_json(variant):
    """run.json in a workdir holds the config as JSON; load_run and a resumed run read it back."""
    config = load(*variant)
    run = RunConfig.from_mapping(config)
    assert RunConfig.from_mapping(json.loads(json.dumps(jsonable(config)))) == run
    assert RunConfig.from_mapping(json.loads(json.dumps(jsonable(dataclasses.asdict(run))))) == run


@pytest.mark.parametrize("name", NAMES)
def test_unknown_argument(name):
    with pytest.raises(ValueError, match=rf"configs/{name}\.py: unknown argument 'smal'; expected nothing or '\w+'"):
        load(name, "smal")


def test_every_family_has_a_short_form():
    """`:small` or `:test`: the same code in a minute, for whoever changes it."""
    for name in NAMES:
        assert {arg for n, arg in VARIANTS if n == name} & {"small", "test"}, f"configs/{name}.py has no short form"

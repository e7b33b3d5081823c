"""A run that starts from the weights of another run or of a Hugging Face folder: equal arrays, anywhere on a mesh, a fresh optimiser."""
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from configs import quickstart
from effmodels import interop
from effmodels.config import ConfigError, ModelConfig
from effmodels.models import Decoder
from effmodels.models import state as model_state
from effmodels.train import start_from
from effmodels.train.checkpoint import CheckpointMismatch
from effmodels.train.loop import Run, train
from effmodels.train.restore import load_run

ONE = jax.devices()[:1]


def config(corpus, **fields):
    c = quickstart.get_config("test")
    c.data.paths, c.data.holdout, c.data.cache_dir = (str(corpus),), 0.2, str(corpus.parent / "cache")
    c.steps, c.eval.sample_tokens, c.log.tensorboard, c.eval.at_end = 2, 0, "off", False
    c.model.num_layers = 2
    c.update_from_flattened_dict(fields)
    return c


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("first") / "run"
    train(config(corpus), folder, devices=ONE, log=lambda _: None)
    return folder


def params_of(model):
    """By canonical name and layer."""
    arrays = model_state.split(model)[1]
    where = {n: (arrays[path], i) for n, (path, i) in model_state.manifest(model).items() if path in arrays}
    return {n: np.asarray(a if i is None else a[i]) for n, (a, i) in where.items()}


def started(c, folder, devices=None):
    """(canonical parameters, state) before the first step."""
    begun = Run(c, folder, lambda _: None, devices, start=False)
    state = begun.setup.state_of(*start_from.weights(begun.config.start_from, begun.setup))
    graphdef = model_state.split(begun.setup.model)[0]
    return params_of(model_state.merge(graphdef, state.params, state.buffers)), state


@pytest.mark.parametrize("mesh", [{}, {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "model.scan_layers": False}], ids=["one", "mesh"])
def test_a_run_goes_on_under_a_new_optimiser(corpus, run, tmp_path, mesh):
    want = params_of(load_run(run, log=lambda _: None)[0])
    given = config(corpus, **{"start_from": str(run), "optim.name": "lion", "model.dropout": 0.1, **mesh})
    got, state = started(given, tmp_path / "next", None if mesh else ONE)
    assert got.keys() == want.keys()
    for name, array in want.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)
    assert int(state.step) == 0


def test_weights_of_another_dtype_are_cast(corpus, run, tmp_path):
    want = params_of(load_run(run, log=lambda _: None)[0])
    got, _ = started(config(corpus, **{"start_from": str(run), "model.param_dtype": "bfloat16"}), tmp_path / "next", ONE)
    for name, array in got.items():
        np.testing.assert_array_equal(array, want[name].astype(array.dtype), err_msg=name)
    assert any(a.dtype == jax.numpy.bfloat16 for a in got.values())


def hub(folder):
    """A Hugging Face folder of a small Llama."""
    llama = ModelConfig(
        vocab_size=300, d_model=24, num_layers=3, mixers={"attention": {"num_heads": 4, "num_kv_heads": 2}},
        channels={"mlp": {"hidden": 40}}, tie_embeddings=True,
    )  # fmt: skip
    interop.save_pretrained(Decoder(llama, rngs=nnx.Rngs(0)), folder / "hub", model_type="llama")
    return folder / "hub"


@pytest.mark.slow
def test_a_hugging_face_folder_onto_a_mesh_under_other_rules(corpus, tmp_path):
    source = hub(tmp_path)
    given = config(corpus, **{"start_from": str(source), "mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "rules.embed": "data"})
    model = start_from.merged(given.model.to_dict(), start_from.described(source)[0])
    with given.unlocked():
        given.model = ConfigDict(model)
    got, state = started(given, tmp_path / "next")
    for name, array in params_of(interop.load_pretrained(source)[0]).items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)
    assert "data" in str(state.params["embed"].sharding.spec)


@pytest.mark.parametrize("again", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "twice"])
def test_a_hugging_face_folder_by_command(corpus, tmp_path, again):
    """The model is the folder's; --config.model fields and --rope_scaling go on top; the second time the run resumes."""
    source = hub(tmp_path)
    command = [
        sys.executable, "-m", "experiments.train", "--config=configs/quickstart.py:test", f"--start_from={source}",
        f"--workdir={tmp_path / 'tuned'}", "--config.steps=2", f"--config.data.paths=('{corpus}',)", "--config.data.holdout=0.2",
        f"--config.data.cache_dir={corpus.parent / 'cache'}", "--config.data.tokenizer=bytes", "--config.eval.at_end=False",
        "--config.model.dropout=0.1", "--config.eval.sample_tokens=0", "--rope_scaling=kind=yarn,factor=4,original_length=32",
    ]  # fmt: skip
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert f"parameters read from {source}" in done.stdout
    model = load_run(tmp_path / "tuned", log=lambda _: None)[0]
    theirs = interop.load_pretrained(source)[0]
    assert model.config.dropout == 0.1 and model.config.vocab_size == theirs.config.vocab_size
    assert dict(model.config.mixers["attention"]["rope_scaling"])["kind"] == "yarn"
    moved = {n: np.abs(a - params_of(theirs)[n].astype(np.float32)).max() for n, a in params_of(model).items()}
    assert 0 < max(moved.values()) < 0.1, "two steps from the weights of the folder"
    if again:
        done = subprocess.run([*command, "--config.steps=3"], capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0 and "resumed step 2 of 3" in done.stdout, done.stdout + done.stderr[-3000:]


def test_mistakes(corpus, run, tmp_path):
    with pytest.raises(ConfigError, match="is neither a run's folder"):
        start_from.described(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "run.json").write_text((run / "run.json").read_text())
    with pytest.raises(ConfigError, match="has no checkpoint yet"):
        started(config(corpus, start_from=str(tmp_path / "empty")), tmp_path / "a", ONE)
    with pytest.raises(CheckpointMismatch, match="embed"):
        started(config(corpus, **{"start_from": str(run), "model.d_model": 48}), tmp_path / "b", ONE)

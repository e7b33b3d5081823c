"""Weights that a new run starts from: those of another run or of a Hugging Face folder, onto the mesh of the new one."""
import dataclasses
import functools
import json

import jax
from etils import epath
from flax import nnx

from effmodels import interop
from effmodels.config import ConfigError, ModelConfig, plain
from effmodels.interop.compare import RUNNING
from effmodels.models import Decoder
from effmodels.models import state as model_state
from effmodels.train.checkpoint import Checkpointer
from effmodels.train.restore import RUN_FILE, TOKENIZER_FILE


def described(folder):
    """(mapping of the ModelConfig, tokenizer file or None) of a run's folder or a Hugging Face folder; ConfigError for anything else."""
    folder = _folder(folder)
    if (folder / RUN_FILE).exists():
        return json.loads((folder / RUN_FILE).read_text())["config"]["model"], str(folder / TOKENIZER_FILE)
    found = [folder / name for name in ("tokenizer.json", "tokenizer.model") if (folder / name).exists()]
    return interop.pretrained_config(str(folder)), str(found[0]) if found else None


def merged(given, theirs):
    """The model of a new run as a mapping: `theirs`, run as `given` says (dtypes, scans, recomputation, dropout)."""
    return {**plain(theirs), **{name: given[name] for name in RUNNING if name in given}}


def weights(folder, setup):
    """(params, buffers), by path, of `folder` for the model and on the mesh of a `setup.Setup`.

    Raises ConfigError, InteropError or CheckpointError for weights of another model.
    """
    folder, config = _folder(folder), setup.config.model
    if not (folder / RUN_FILE).exists():
        overrides = {f.name: getattr(config, f.name) for f in dataclasses.fields(ModelConfig)}
        loaded, _ = interop.load_pretrained(str(folder), dtype=config.param_dtype, mesh=setup.mesh, rules=setup.rules, overrides=overrides)
        return model_state.split(loaded)[1:]
    checkpoints = Checkpointer(folder / "checkpoints", log=setup.log)
    if checkpoints.latest() is None:
        raise ConfigError(f"start_from: {folder} has no checkpoint yet; let experiments.train reach its first save.")
    # Read in the dtype that they were written in.
    theirs = ModelConfig.from_mapping(described(folder)[0])
    abstract = nnx.eval_shape(functools.partial(_build, dataclasses.replace(config, param_dtype=theirs.param_dtype)), jax.random.key(0))
    places = setup.shardings.params, setup.shardings.buffers
    arrays = [
        {p: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where[p]) for p, a in part.items()}
        for part, where in zip(model_state.split(abstract)[1:], places)
    ]
    params, buffers, _ = checkpoints.restore_model(*arrays, manifest=setup.names)
    checkpoints.close()
    return params, buffers


def _folder(path):
    folder = epath.Path(path).expanduser()
    if not any((folder / name).exists() for name in (RUN_FILE, "config.json")):
        raise ConfigError(
            f"start_from: {folder} is neither a run's folder ({RUN_FILE}) nor a Hugging Face folder (config.json); give the --workdir of "
            "experiments.train, or a folder with config.json, safetensors and a tokenizer."
        )
    return folder


def _build(config, key):
    return Decoder(config, rngs=nnx.Rngs(key))

"""A trained model from its workdir, to generate from, evaluate or export: config, tokenizer and the newest good checkpoint."""
import functools
import json

import jax
from etils import epath
from flax import nnx

from effmodels import data
from effmodels.config import ConfigError
from effmodels.models import Decoder
from effmodels.models import state as model_state
from effmodels.train.checkpoint import Checkpointer
from effmodels.train.run_config import RunConfig

RUN_FILE, TOKENIZER_FILE = "run.json", "tokenizer.json"


def load_run(workdir, *, step=None, log=print):
    """(model, tokenizer, step) of a run's newest good checkpoint, or of `step`; on the default device.

    Raises ConfigError when the folder holds no run or no checkpoint.
    """
    workdir = epath.Path(workdir)
    if not (workdir / RUN_FILE).exists():
        raise ConfigError(f"{workdir} holds no run ({RUN_FILE} is missing); give the --workdir of experiments.train.")
    config = RunConfig.from_mapping(json.loads((workdir / RUN_FILE).read_text())["config"], jax.default_backend())
    checkpoints = Checkpointer(workdir / "checkpoints", log=log)
    if checkpoints.latest() is None:
        raise ConfigError(f"{workdir} has no checkpoint yet; let experiments.train reach its first save.")
    model = nnx.eval_shape(functools.partial(_build, config.model), jax.random.key(0))
    graphdef, params, buffers = model_state.split(model)
    params, buffers, step = checkpoints.restore_model(params, buffers, manifest=model_state.manifest(model), step=step)
    tokenizer = data.from_dict(json.loads((workdir / TOKENIZER_FILE).read_text()))
    return model_state.merge(graphdef, params, buffers), tokenizer, step


def _build(model_config, key):
    return Decoder(model_config, rngs=nnx.Rngs(key))

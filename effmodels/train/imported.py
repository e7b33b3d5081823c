"""A model that was not trained here as a run's folder, to generate from, evaluate or write elsewhere."""
import dataclasses
import json

import jax
import jax.numpy as jnp
from etils import epath

from effmodels.config import ConfigError
from effmodels.models import state as model_state
from effmodels.train.checkpoint import Checkpointer
from effmodels.train.restore import RUN_FILE, TOKENIZER_FILE
from effmodels.train.run_config import RunConfig, jsonable
from effmodels.train.state import TrainState


def write_run(workdir, model, tokenizer, config, log=print):
    """A workdir with a checkpoint of step 0 that holds the model and no optimiser; config: a run's mapping, whose model is replaced.

    Raises ConfigError when the folder holds a run, or there is no tokenizer.
    """
    workdir = epath.Path(workdir)
    if (workdir / RUN_FILE).exists():
        raise ConfigError(f"{workdir} holds a run already; give another folder.")
    if tokenizer is None:
        raise ConfigError("a run needs a tokenizer, and the folder of these weights has neither tokenizer.json nor tokenizer.model.")
    fields = {f.name: getattr(model.config, f.name) for f in dataclasses.fields(model.config)}
    config = jsonable({**config, "model": fields})
    identity = RunConfig.from_mapping(config, jax.default_backend()).identity()
    _, params, buffers = model_state.split(model)
    checkpoints = Checkpointer(workdir / "checkpoints", mode="sync", log=log)
    state = TrainState(jnp.zeros((), jnp.int32), params, buffers, None)
    checkpoints.save(0, state, manifest=model_state.manifest(model), host={"imported": True})
    checkpoints.close()
    (workdir / TOKENIZER_FILE).write_text(json.dumps(tokenizer.to_dict()))
    (workdir / RUN_FILE).write_text(json.dumps({"identity": identity, "config": config}, indent=1, default=str))

"""Trains a config; the same command resumes.

    python -m experiments.train --config=configs/quickstart.py [--config.steps=100] [--workdir=runs/mine] [--eval_only]
    python -m experiments.train --config=configs/quickstart.py --start_from=SmolLM2-135M --workdir=runs/tuned [--rope_scaling=kind=yarn,...]

--start_from: the model, its weights and its tokenizer are those of a run or of a Hugging Face folder; everything else (data, optimiser,
mesh, dtypes) is the config's, and the optimiser starts afresh.
"""
import os
import sys

from absl import flags
from ml_collections import ConfigDict, config_flags

from experiments import common

common.define_rope_scaling()
_START_FROM = flags.DEFINE_string("start_from", None, "a run's folder or a Hugging Face folder: its model, weights and tokenizer")
_EVAL_ONLY = flags.DEFINE_bool("eval_only", False, "evaluate the newest checkpoint and stop")


def main(argv):
    del argv
    common.set_up_jax()
    from effmodels.parallel import distributed
    from effmodels.train.loop import NonFiniteError, train

    workdir = common.WORKDIR.value or common.default_workdir(config_flags.get_config_filename(flags.FLAGS["config"]))
    try:
        distributed.start(common.CONFIG.value.get("distributed"))
        _prepare(common.CONFIG.value)
        train(common.CONFIG.value, workdir, eval_only=_EVAL_ONLY.value, log=common.say)
    except common.user_errors() as error:
        sys.exit(f"error: {error}")
    except NonFiniteError as error:
        sys.exit(f"stopped: {error}")


def _prepare(config):
    """What --start_from and --rope_scaling say, written into the config; fields of the model given on the command line stay."""
    from effmodels.config import ConfigError
    from effmodels.train import by_position, start_from
    from effmodels.train.run_config import RunConfig, jsonable

    if _START_FROM.value:
        theirs, tokenizer = start_from.described(_START_FROM.value)
        model, given = start_from.merged(jsonable(config.model), theirs), config_flags.get_override_values(flags.FLAGS["config"])
        for path, value in given.items():
            section, *keys = path.split(".")
            if section == "model":
                _set(model, keys, value)
        if tokenizer is None and "data.tokenizer" not in given:
            raise ConfigError(f"--start_from={_START_FROM.value}: the folder has no tokenizer; give --config.data.tokenizer.")
        with config.unlocked(), config.ignore_type():
            config.start_from, config.model = os.path.expanduser(_START_FROM.value), ConfigDict(jsonable(model))
            config.data.tokenizer = given.get("data.tokenizer", tokenizer)
    scaling = common.rope_scaling()
    if scaling is not None:
        with config.unlocked(), config.ignore_type():
            config.model.mixers = ConfigDict(jsonable(by_position.scaled_mixers(RunConfig.from_mapping(config).model, scaling)))


def _set(mapping, keys, value):
    """mapping[k0][k1]... = value, where all but the last key must be there."""
    from effmodels.config import ConfigError

    for key in keys[:-1]:
        if not isinstance(mapping.get(key), dict):
            raise ConfigError(f"--config.model.{'.'.join(keys)}: the model of --start_from={_START_FROM.value} has no {key!r}.")
        mapping = mapping[key]
    mapping[keys[-1]] = value


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
    common.run(main, "config")

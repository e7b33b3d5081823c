"""Trains a config; the same command resumes.

    python -m experiments.train --config=configs/quickstart.py [--config.steps=100] [--workdir=runs/mine] [--eval_only]
"""
import os
import sys

from absl import flags
from ml_collections import config_flags

from experiments import common

_EVAL_ONLY = flags.DEFINE_bool("eval_only", False, "evaluate the newest checkpoint and stop")


def main(argv):
    del argv
    common.set_up_jax()
    from effmodels.parallel import distributed
    from effmodels.train.loop import NonFiniteError, train

    workdir = common.WORKDIR.value or common.default_workdir(config_flags.get_config_filename(flags.FLAGS["config"]))
    try:
        distributed.start(common.CONFIG.value.get("distributed"))
        train(common.CONFIG.value, workdir, eval_only=_EVAL_ONLY.value, log=common.say)
    except common.user_errors() as error:
        sys.exit(f"error: {error}")
    except NonFiniteError as error:
        sys.exit(f"stopped: {error}")


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
    common.run(main, "config")

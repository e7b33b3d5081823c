"""Verifies a config: its mesh against one device, its forms, packing, recomputation, accumulation, resumption, precision.

    python -m experiments.verify --config=configs/moe_1b.py:small [--config.mesh.seq=2] [--devices=8] [--checks=mesh,forms] [--json=FILE]

On simulated devices of this machine's CPU; no data is read. Ends with status 1 when a check fails.
"""
import json
import os
import pathlib
import sys

from absl import flags

from effmodels import simulated
from experiments import common

_DEVICES = flags.DEFINE_integer("devices", 8, "simulated CPU devices; 0: the devices that are here", lower_bound=0)
_JSON = flags.DEFINE_string("json", None, "a file that gets everything that was found")
_CHECKS = flags.DEFINE_list("checks", [], "of mesh, update, forms, packed, remat, accumulation, resume, bf16, dropout; default: all")
_SEED = flags.DEFINE_integer("seed", 0, "of the parameters and the batch")


def main(argv):
    del argv
    _simulate_devices()
    common.set_up_jax()
    from effmodels.verify import verify

    try:
        report = verify(common.CONFIG.value, checks=_CHECKS.value, seed=_SEED.value, log=common.say)
    except common.user_errors() as error:
        sys.exit(f"error: {error}")
    common.say("\n" + report.table())
    if _JSON.value:
        pathlib.Path(_JSON.value).write_text(json.dumps(report.to_dict(), indent=1))
    sys.exit(0 if report.passed else 1)


def _simulate_devices():
    """Before jax is imported: as many devices on the CPU as asked for."""
    if _DEVICES.value:
        os.environ.update(simulated.environment(_DEVICES.value))


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
    common.run(main, "config")

"""Plans a config for a topology that is not here: does it fit, how long is a step, what binds, what to change.

    python -m experiments.plan --config=configs/moe_1b.py --topology=v4:2x2x1 [--slices=2] [--mesh=data=2,fsdp=2] [--what=decode]
    python -m experiments.plan ... --fast                                      # closed form, nothing compiled
    python -m experiments.plan ... --memory                                    # compiled without optimisation: memory only, quick
    python -m experiments.plan ... --search [--search_seconds=600]             # meshes, recomputation, micro-batches that do better
    python -m experiments.plan ... --json=F --html=F --png=F [--require_fit] [--min_mfu=0.4] [--compare=OTHER.json]

The TPU compiler runs on this machine (`pip install -e '.[plan]'`). What is compiled is kept: the second time takes a second. docs/plan.md.
"""
import importlib.util
import json
import os
import pathlib
import sys

from absl import flags
from ml_collections import config_flags

from experiments import common

_TOPOLOGY = flags.DEFINE_string("topology", None, "v4:4x4x4, v4-128, v5e:2x4, v5p:2x2x2, v6e:16x16, 7x:2x2x1, cpu:8, gpu:h200:8")
_SLICES = flags.DEFINE_integer("slices", 1, "slices of that topology, connected by the data centre's network", lower_bound=1)
_MESH = flags.DEFINE_string("mesh", None, "sizes that replace the config's: data=8,fsdp=16")
_WHAT = flags.DEFINE_enum("what", "train", ["train", "prefill", "decode"], "the step: batch_size sequences of seq_len tokens each")
_FAST = flags.DEFINE_bool("fast", False, "closed form in about a second, nothing compiled")
_MEMORY = flags.DEFINE_bool("memory", False, "compile without optimisation: memory only, a fifth of the time")
_SEARCH = flags.DEFINE_bool("search", False, "the config in closed form, then meshes, recomputation, micro-batches that fit and are faster")
_SEARCH_SECONDS = flags.DEFINE_float("search_seconds", 600.0, "time for --search")
_JSON = flags.DEFINE_string("json", None, "a file that gets the whole plan")
_HTML = flags.DEFINE_string("html", None, "a file that gets the plan as a page, with the timeline of a step")
_PNG = flags.DEFINE_string("png", None, "a file that gets the picture")
_TABLES = flags.DEFINE_bool("tables", True, "print the tables after the answer")
_REQUIRE_FIT = flags.DEFINE_bool("require_fit", False, "end with status 1 when it does not fit")
_MIN_MFU = flags.DEFINE_float("min_mfu", 0.0, "end with status 1 when the predicted MFU is lower", lower_bound=0.0, upper_bound=1.0)
_COMPARE = flags.DEFINE_string("compare", None, "a plan saved by --json, or a second config, to put next to this one")


def main(argv):
    del argv
    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing runs here but the compiler
    common.set_up_jax()
    from effmodels.plan import topology
    from effmodels.plan.schedule.dump import CompilerError

    topology.quiet_environment()
    try:
        sys.exit(_plan())
    except (*common.user_errors(), CompilerError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")


def _plan():
    from effmodels.plan import budgets, failures, records, topology
    from effmodels.plan.report import answer, page, picture

    _check_flags()
    place = topology.parse(_TOPOLOGY.value, _SLICES.value)
    name = config_flags.get_config_filename(flags.FLAGS["config"])
    plan = _one(common.CONFIG.value, name, place)
    saving = budgets.saving(plan.checkpoint_bytes, place.hosts, asynchronous=plan.host_save_bytes > 0)
    risk = None
    if plan.what == "train" and place.platform != "cpu":
        risk = failures.failures(plan.chips, saving.blocked_seconds, step_seconds=plan.seconds, steps=plan.steps)
    common.say(answer.text(plan, saving=saving, failures=risk))
    if _TABLES.value:
        common.say("\n" + answer.tables(plan))
    if _COMPARE.value:
        common.say("\n" + answer.compare(_other(place), plan))
    if _JSON.value:
        pathlib.Path(_JSON.value).write_text(json.dumps(records.to_json(plan), indent=1))
    if _HTML.value:
        pathlib.Path(_HTML.value).write_text(page.html_page(plan, saving=saving, failures=risk))
    if _PNG.value:
        picture.save(plan, _PNG.value)
    if _SEARCH.value:
        _search(place)
    return _status(plan)


def _check_flags():
    """What can be known to fail before anything is compiled."""
    from effmodels.config import ConfigError

    if _SEARCH.value and _WHAT.value != "train":
        raise ConfigError(f"--search looks for settings of training, not of --what={_WHAT.value}; leave one of them out.")
    if _SEARCH.value and _MEMORY.value:
        raise ConfigError("--search compares times, which --memory does not estimate; leave one of them out.")
    if _PNG.value and importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError("--png needs matplotlib, which is not installed: pip install -e '.[notebook]'.")
    for flag, value in (("json", _JSON.value), ("html", _HTML.value), ("png", _PNG.value)):
        file = pathlib.Path(value) if value else None
        if file and (file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK)):
            raise ConfigError(f"--{flag}={value}: this file cannot be written; name one in a folder that is there and can be written to.")


def _one(config, name, place):
    from effmodels.plan.compiling import program
    from effmodels.plan.formulas import closed_form

    if _FAST.value or _SEARCH.value:
        return closed_form.plan(program.as_mapping(config, _mesh()), place, what=_WHAT.value, name=name)
    level = "O0" if _MEMORY.value else None
    return program.plan(config, place, mesh=_mesh(), what=_WHAT.value, level=level, name=name, log=common.say)


def _mesh():
    """{"data": 8, ...} of --mesh, or None."""
    if not _MESH.value:
        return None
    from effmodels.config import ConfigError

    pairs = [part.partition("=") for part in _MESH.value.split(",")]
    if any(not sign or not number.strip().lstrip("-").isdigit() for _, sign, number in pairs):
        raise ConfigError(f"--mesh={_MESH.value}: expected sizes as in data=8,fsdp=16.")
    return {axis.strip(): int(number) for axis, _, number in pairs}


def _other(place):
    """The plan that --compare names: a file, or a config on the same topology."""
    from effmodels.config import ConfigError
    from effmodels.plan import records

    file, _, arg = _COMPARE.value.partition(":")
    if not os.path.exists(file):
        raise ConfigError(f"--compare={_COMPARE.value}: there is no file {file}.")
    if file.endswith(".json"):
        return records.from_json(json.loads(pathlib.Path(file).read_text()))
    spec = importlib.util.spec_from_file_location("compared_config", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return _one(module.get_config(arg) if arg else module.get_config(), _COMPARE.value, place)


def _search(place):
    """Prints what fits, fastest first, with the overrides to paste."""
    from effmodels.plan.compiling import program
    from effmodels.plan.formulas import search

    def compiled(config):
        return program.plan(config, place, log=common.say)

    config = program.as_mapping(common.CONFIG.value, _mesh())
    by_compiler = None if _FAST.value or place.platform == "gpu" else compiled
    common.say("\n" + search.search(config, place, seconds=_SEARCH_SECONDS.value, log=common.say, compile=by_compiler).text())


def _status(plan):
    """What the process ends with; says why it is not 0."""
    if _REQUIRE_FIT.value and not plan.fits:
        common.say("status 1: it does not fit (--require_fit).")
        return 1
    if _MIN_MFU.value and not plan.mfu:
        common.say("status 1: there is no estimate of the MFU to compare with --min_mfu.")
        return 1
    if _MIN_MFU.value and plan.mfu < _MIN_MFU.value:
        common.say(f"status 1: the predicted MFU is {plan.mfu:.1%}, below --min_mfu={_MIN_MFU.value:.1%}.")
        return 1
    return 0


def with_underscores(arguments):
    """Flags of this command as absl names them: --require-fit is --require_fit, --no-tables is --notables; the rest as it is."""
    found = []
    for argument in arguments:
        name, sign, value = argument.partition("=")
        bare = name.lstrip("-").replace("-", "_")
        known = next((n for n in (bare, bare.replace("no_", "no", 1)) if n in flags.FLAGS or n.removeprefix("no") in flags.FLAGS), None)
        found.append(f"--{known}{sign}{value}" if name.startswith("-") and "-" in name.lstrip("-") and known else argument)
    return found


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
    sys.argv[1:] = with_underscores(sys.argv[1:])
    common.run(main, "config", "topology")

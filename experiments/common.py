"""What all verbs share: the compilation cache, one-line errors, default folders, output that appears at once."""
import os
import pathlib
import platform
import re
import sys

from absl import app, flags
from ml_collections import config_flags

from effmodels import simulated

CONFIG = config_flags.DEFINE_config_file("config", None, "a file of configs/, perhaps with an argument: configs/moe_1b.py:small")
WORKDIR = flags.DEFINE_string("workdir", None, "the folder of a run (train: default runs/<config>[-arg])")


def run(main, *required):
    """Runs a main; a mistake on the command line ends in one sentence."""
    _restart_with_huge_pages()

    def parse(argv):
        try:
            rest = app.parse_flags_with_usage(argv)
        except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
            text = str(error.args[0] if error.args else error).replace("\\n", " ").replace("\\'", "").replace("'", "")
            sys.exit(f"error: command line: {' '.join(text.split())}")
        _check_config_file()
        return rest

    flags.mark_flags_as_required(required)
    app.run(main, flags_parser=parse)


def _restart_with_huge_pages():
    """Large arrays in huge pages: a quarter more tokens per second on a CPU (docs/log.md).

    glibc reads this setting only when a process starts, hence the restart (same process id); whoever sets the variable is left alone.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _check_config_file():
    """A config file that is not there is only noticed on use, with a traceback; this says it at once."""
    if not flags.FLAGS["config"].present:
        return
    name = config_flags.get_config_filename(flags.FLAGS["config"])
    path = str(name).partition(":")[0]
    if not os.path.exists(path):
        there = ", ".join(sorted(str(p) for p in pathlib.Path("configs").glob("[!_]*.py"))) or "none in this folder"
        sys.exit(f"error: --config={name}: there is no file {path}. Configs here: {there}.")


def set_up_jax():
    """Quiet libraries, and the persistent compilation cache.

    The cache is in $JAX_COMPILATION_CACHE_DIR, else ~/.cache/effmodels/jax; an empty value turns it off.
    """
    import jax
    from absl import logging

    for name, value in simulated.threads(simulated.asked_for()).items():
        os.environ.setdefault(name, value)
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells its every step at INFO; --verbosity=0 shows it
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if folder is None:
        folder = os.path.expanduser("~/.cache/effmodels/jax")
        jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_default_prng_impl", "threefry2x32")


def default_workdir(config_filename):
    """runs/<config>[-arg], so that the same command twice resumes."""
    name, _, arg = str(config_filename).partition(":")
    stem = pathlib.Path(name).stem
    return str(pathlib.Path("runs") / (stem + ("-" + re.sub(r"[^\w.=,-]", "_", arg) if arg else "")))


def load_model(source, *, step=None, dtype=None):
    """(model, tokenizer, step or None) of a run's folder, or of a Hugging Face folder; dtype: of the latter's weights.

    With --rope_scaling the model is made ready for longer rows.
    """
    from effmodels import interop
    from effmodels.train.by_position import with_rope_scaling
    from effmodels.train.restore import RUN_FILE, load_run

    folder = pathlib.Path(source).expanduser()
    if (folder / "config.json").exists() and not (folder / RUN_FILE).exists():
        model, tokenizer, step = *interop.load_pretrained(folder, dtype=dtype), None
    else:
        model, tokenizer, step = load_run(source, step=step, log=lambda text: print(text, file=sys.stderr))
    scaling = rope_scaling()
    return model if scaling is None else with_rope_scaling(model, scaling), tokenizer, step


def define_rope_scaling():
    """The flag of the verbs that load a model."""
    flags.DEFINE_string("rope_scaling", None, "of a loaded model, for longer rows: kind=yarn,factor=4,original_length=512")


def rope_scaling():
    """The mapping that --rope_scaling=name=value,... describes, or None."""
    from effmodels.config import ConfigError

    given, found = flags.FLAGS["rope_scaling"].value if "rope_scaling" in flags.FLAGS else None, {}
    if given is None:
        return None
    for part in given.split(","):
        name, sign, value = (piece.strip() for piece in part.partition("="))
        if not sign or not value:
            raise ConfigError(f"--rope_scaling: expected kind=yarn,factor=4,..., got {part!r}.")
        number = re.fullmatch(r"[-+]?\d+(\.\d*)?(e[-+]?\d+)?", value)
        found[name] = value if number is None else float(value) if {".", "e"} & set(value) else int(value)
    return found


def user_errors():
    """Exceptions whose message is all that a person needs; anything else keeps its traceback."""
    from effmodels.config import ConfigError
    from effmodels.data import DataError
    from effmodels.train.checkpoint import CheckpointError

    return (ConfigError, DataError, CheckpointError)


def say(text):
    """Prints at once, also into a pipe."""
    print(text, flush=True)

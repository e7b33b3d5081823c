"""What all verbs share: the compilation cache, one-line errors, default folders, output that appears at once."""
import os
import pathlib
import re


def set_up_jax():
    """Quiet libraries, and the persistent compilation cache.

    The cache is in $JAX_COMPILATION_CACHE_DIR, else ~/.cache/effmodels/jax; an empty value turns it off.
    """
    import jax
    from absl import flags, logging

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


def user_errors():
    """Exceptions whose message is all that a person needs; anything else keeps its traceback."""
    from effmodels.config import ConfigError
    from effmodels.data import DataError
    from effmodels.train.checkpoint import CheckpointError

    return (ConfigError, DataError, CheckpointError)


def say(text):
    """Prints at once, also into a pipe."""
    print(text, flush=True)

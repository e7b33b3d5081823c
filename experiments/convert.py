"""Weights between Hugging Face folders and runs, both ways, and from one to another dtype or size of files.

    python -m experiments.convert --source=SmolLM2-135M --run=runs/smollm2        # a Hugging Face folder becomes a run
    python -m experiments.convert --source=runs/quickstart --folder=out           # a run becomes a Hugging Face folder
    python -m experiments.convert --source=SmolLM2-135M --folder=out --dtype=bfloat16
"""
import pathlib
import sys

from absl import flags

from experiments import common

common.define_rope_scaling()
_SOURCE = flags.DEFINE_string("source", None, "a Hugging Face folder, or the --workdir of a run")
_FOLDER = flags.DEFINE_string("folder", None, "the Hugging Face folder to write")
_RUN = flags.DEFINE_string("run", None, "the run's folder to write")
_DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16", "float16"], "of the weights; default: as they are")
_MODEL_TYPE = flags.DEFINE_string("model_type", None, "the family to write; default: that of the source, else one that can hold the model")
_SHARD_GB = flags.DEFINE_float("shard_gb", 5.0, "gigabytes of one safetensors file at most", lower_bound=1e-6)
_STEP = flags.DEFINE_integer("step", None, "of a run's checkpoint; default: the newest")


def main(argv):
    del argv
    common.set_up_jax()
    try:
        _convert()
    except common.user_errors() as error:
        sys.exit(f"error: {error}")


def _convert():
    from configs import common as config_defaults
    from effmodels import interop
    from effmodels.config import ConfigError
    from effmodels.train.imported import write_run

    if (_FOLDER.value is None) == (_RUN.value is None):
        raise ConfigError("give one of --folder (a Hugging Face folder) and --run (a run's folder) to say what is written.")
    model, tokenizer, _ = common.load_model(_SOURCE.value, step=_STEP.value, dtype=_DTYPE.value)
    if _RUN.value is not None:
        write_run(_RUN.value, model, tokenizer, config_defaults.base().to_dict(), log=lambda text: print(text, file=sys.stderr))
        common.say(f"wrote {_RUN.value}; try: python -m experiments.generate --workdir={_RUN.value} --prompt=...")
        return
    size = int(_SHARD_GB.value * 1e9)
    kind = interop.save_pretrained(
        model, _FOLDER.value, tokenizer=tokenizer, model_type=_MODEL_TYPE.value, dtype=_DTYPE.value, max_shard_bytes=size
    )  # fmt: skip
    files = sum(1 for _ in pathlib.Path(_FOLDER.value).expanduser().glob("*.safetensors"))
    common.say(f"wrote {_FOLDER.value}: {kind}, {files} file(s) of weights")


if __name__ == "__main__":
    common.run(main, "source")

"""The held-out loss of a run or a Hugging Face folder, and by position in the document; also on longer rows than it was trained on.

    python -m experiments.eval --workdir=runs/quickstart --seq_len=2048 --rope_scaling=kind=yarn,factor=4,original_length=512
"""
import json
import math
import pathlib
import sys

from absl import flags

from experiments import common

common.define_rope_scaling()
_SEQ_LEN = flags.DEFINE_integer("seq_len", None, "tokens of a row; default: the run's", lower_bound=2)
_BATCHES = flags.DEFINE_integer("batches", 16, "batches of held-out text, at most", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "rows of a batch", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "a file to write the figures to")
_STEP = flags.DEFINE_integer("step", None, "of the checkpoint; default: the newest")


def main(argv):
    del argv
    common.set_up_jax()
    try:
        _evaluate()
    except common.user_errors() as error:
        sys.exit(f"error: {error}")


def _evaluate():
    from effmodels import data
    from effmodels.config import ConfigError
    from effmodels.train import by_position, sources

    folder = pathlib.Path(common.WORKDIR.value).expanduser()
    model, _, step = common.load_model(folder, step=_STEP.value)
    given = common.CONFIG.value or _config_of(folder)
    if given is None:
        raise ConfigError(f"{folder} holds no run.json to say which text; give --config=configs/X.py, whose `data` is used.")
    seq_len, options = _SEQ_LEN.value or given["seq_len"], dict(given["data"]) | {"tokenizer": str(folder / "tokenizer.json")}
    prepared = data.prepare(options, seq_len, images=sources.image_spec(model.config), log=lambda text: print(text, file=sys.stderr))
    rows = data.batches(prepared, batch_size=_BATCH_SIZE.value, seed=0, split="validation", repeat=False)
    bins = by_position.loss_by_position(model, (batch for _, batch in zip(range(_BATCHES.value), rows)))
    tokens = sum(b.tokens for b in bins)
    loss = sum(b.tokens * b.loss for b in bins) / max(tokens, 1)
    where = "weights" if step is None else f"checkpoint of step {step}"
    common.say(f"{where} of {folder}, rows of {seq_len}: loss {loss:.4f} over {tokens:,.0f} held-out tokens\n{by_position.table(bins)}")
    if _JSON.value:
        record = {"source": str(folder), "step": step, "seq_len": seq_len, "rope_scaling": common.rope_scaling(), "tokens": tokens}
        record |= {"loss": loss if math.isfinite(loss) else str(loss), "bins": [vars(b) for b in bins]}
        pathlib.Path(_JSON.value).write_text(json.dumps(record, indent=1) + "\n")


def _config_of(folder):
    """The config in the run's folder, or None."""
    path = folder / "run.json"
    return json.loads(path.read_text())["config"] if path.exists() else None


if __name__ == "__main__":
    common.run(main, "workdir")

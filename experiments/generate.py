"""Continues a prompt from a run's newest checkpoint or from a Hugging Face folder, streaming, with the model's carried state.

    python -m experiments.generate --workdir=runs/quickstart --prompt="def " [--max_new_tokens=200 --temperature=0.8 --top_k=40 --seed=1]
    python -m experiments.generate --workdir=runs/flamingo_9b-small --prompt="a " --image=photo.png      # a model that reads images

--speculate drafts with the model's own modules for further tokens (`model.mtp`): the same text in fewer passes.
"""
import sys
import time

from absl import flags

from experiments import common

common.define_rope_scaling()
_PROMPT = flags.DEFINE_string("prompt", None, "the text to continue; '-' reads it from standard input")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 200, "at most so many tokens", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0: the most likely token; else the divisor of the logits", lower_bound=0.0)
_TOP_K = flags.DEFINE_integer("top_k", None, "draw among the k most likely tokens")
_TOP_P = flags.DEFINE_float("top_p", None, "draw among the fewest tokens whose probabilities sum to p")
_SEED = flags.DEFINE_integer("seed", 0, "of the draws")
_STOP = flags.DEFINE_multi_string("stop", [], "end before this text; may be given several times")
_SPECULATE = flags.DEFINE_bool("speculate", False, "draft with the model's own modules, where it has some (model.mtp)")
_STEP = flags.DEFINE_integer("step", None, "of the checkpoint; default: the newest")
_IMAGE = flags.DEFINE_string("image", None, "an image before the prompt: a file that Pillow reads, or an .npy array of uint8 [H, W, C]")


def main(argv):
    del argv
    common.set_up_jax()
    import jax

    from effmodels.config import ConfigError
    from effmodels.decode import served

    try:
        model, tokenizer, step = common.load_model(common.WORKDIR.value, step=_STEP.value)
        model = served(model)
        if tokenizer is None:
            raise ConfigError(f"{common.WORKDIR.value} has neither tokenizer.json nor tokenizer.model.")
        prompt = sys.stdin.read() if _PROMPT.value == "-" else _PROMPT.value
        tokens, memory = tokenizer.encode(prompt), None
        if _IMAGE.value:
            from effmodels.train.sources import with_image

            tokens, memory = with_image(model, tokenizer, _read(_IMAGE.value), tokens)
        where = f"weights of {common.WORKDIR.value}" if step is None else f"checkpoint of step {step}"
        print(f"{where}, prompt of {len(tokens)} tokens", file=sys.stderr)
        _write(model, tokenizer, prompt, tokens, jax.random.key(_SEED.value), memory)
    except common.user_errors() + (ValueError,) as error:
        sys.exit(f"error: {error}")


def _read(path):
    """The image of a file as uint8 [H, W, C]; ConfigError when it is none."""
    import numpy as np

    from effmodels.config import ConfigError

    try:
        if path.endswith(".npy"):
            return np.load(path)
        from PIL import Image

        return np.asarray(Image.open(path).convert("RGB"))
    except ImportError as error:
        raise ConfigError(f"--image={path}: reading it needs Pillow (pip install pillow); an .npy array of uint8 does not.") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"--image={path} cannot be read as an image: {error}") from error


def _write(model, tokenizer, prompt, tokens, key, memory=None):
    from effmodels.decode import Speculation, speculative, stream
    from effmodels.decode.text import TextStream

    begun, count, text = time.perf_counter(), 0, TextStream(tokenizer, _STOP.value)
    print(prompt, end="", flush=True)
    options = {"temperature": _TEMPERATURE.value, "top_k": _TOP_K.value, "top_p": _TOP_P.value, "vocab_size": tokenizer.vocab_size}
    options |= {"eos_id": tokenizer.eos_id, "key": key, "memory": memory}
    report = Speculation()
    if _SPECULATE.value:
        passes = speculative.stream(model, [list(tokens)], _MAX_NEW_TOKENS.value, report=report, **options)
        new_tokens = (token for tokens_BW, count_B in passes for token in tokens_BW[0, : count_B[0]])
    else:
        new_tokens = (next_B[0] for next_B, _ in stream(model, [list(tokens)], _MAX_NEW_TOKENS.value, **options))
    for token in new_tokens:
        count += 1
        print(text.add(int(token)), end="", flush=True)
        if text.stopped:
            break
    print(text.finish(), flush=True)
    seconds = time.perf_counter() - begun
    print(f"{count} tokens in {seconds:.1f} s ({count / seconds:.1f} tokens/s, the first compile included)", file=sys.stderr)
    if _SPECULATE.value:
        kept = f"{report.accepted} of {report.drafted} drafts kept ({report.acceptance:.0%})"
        print(f"{report.passes} passes after the prompt, {kept}", file=sys.stderr)


if __name__ == "__main__":
    common.run(main, "workdir", "prompt")

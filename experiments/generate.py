"""Continues a prompt from a run's newest checkpoint or from a Hugging Face folder, streaming, with the model's carried state.

    python -m experiments.generate --workdir=runs/quickstart --prompt="def " [--max_new_tokens=200 --temperature=0.8 --top_k=40 --seed=1]
"""
import sys
import time

from absl import flags

from experiments import common

_PROMPT = flags.DEFINE_string("prompt", None, "the text to continue; '-' reads it from standard input")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 200, "at most so many tokens", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0: the most likely token; else the divisor of the logits", lower_bound=0.0)
_TOP_K = flags.DEFINE_integer("top_k", None, "draw among the k most likely tokens")
_TOP_P = flags.DEFINE_float("top_p", None, "draw among the fewest tokens whose probabilities sum to p")
_SEED = flags.DEFINE_integer("seed", 0, "of the draws")
_STOP = flags.DEFINE_multi_string("stop", [], "end before this text; may be given several times")
_STEP = flags.DEFINE_integer("step", None, "of the checkpoint; default: the newest")


def main(argv):
    del argv
    common.set_up_jax()
    import jax

    from effmodels.config import ConfigError

    try:
        model, tokenizer, step = common.load_model(common.WORKDIR.value, step=_STEP.value)
        if tokenizer is None:
            raise ConfigError(f"{common.WORKDIR.value} has neither tokenizer.json nor tokenizer.model.")
        prompt = sys.stdin.read() if _PROMPT.value == "-" else _PROMPT.value
        tokens = tokenizer.encode(prompt)
        where = f"weights of {common.WORKDIR.value}" if step is None else f"checkpoint of step {step}"
        print(f"{where}, prompt of {len(tokens)} tokens", file=sys.stderr)
        _write(model, tokenizer, prompt, tokens, jax.random.key(_SEED.value))
    except common.user_errors() + (ValueError,) as error:
        sys.exit(f"error: {error}")


def _write(model, tokenizer, prompt, tokens, key):
    from effmodels.decode import stream
    from effmodels.decode.text import TextStream

    begun, count, text = time.perf_counter(), 0, TextStream(tokenizer, _STOP.value)
    print(prompt, end="", flush=True)
    options = {"temperature": _TEMPERATURE.value, "top_k": _TOP_K.value, "top_p": _TOP_P.value, "vocab_size": tokenizer.vocab_size}
    for next_B, _ in stream(model, [list(tokens)], _MAX_NEW_TOKENS.value, eos_id=tokenizer.eos_id, key=key, **options):
        count += 1
        print(text.add(int(next_B[0])), end="", flush=True)
        if text.stopped:
            break
    print(text.finish(), flush=True)
    seconds = time.perf_counter() - begun
    print(f"{count} tokens in {seconds:.1f} s ({count / seconds:.1f} tokens/s, the first compile included)", file=sys.stderr)


if __name__ == "__main__":
    common.run(main, "workdir", "prompt")

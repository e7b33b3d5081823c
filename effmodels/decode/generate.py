"""Autoregressive generation: one compiled prefill, one compiled step, the state carried in between. Letters: B batch, T time, V vocab."""
import functools

import jax
import jax.numpy as jnp
import numpy as np

from effmodels.decode import sampling
from effmodels.decode.weights import served
from effmodels.models import state as model_state


def generate(model, prompt_BT, max_new_tokens, *, lengths_B=None, eos_id=None, key=None, max_len=None, memory=None, **options):
    """int32 [B, T + max_new_tokens]: the prompts and what follows them; greedy by default.

    prompt_BT: int32 token ids, right-padded if lengths_B says how many of each row count (the rows then continue after their own prompt and
    are returned left-aligned, zeros behind). eos_id: rows stop there, zeros follow. key: for temperature > 0. options: those of `sample`.
    memory: {name: Memory} of the rows, such as {"source": model.media(patches, index)}, for a model that reads images.
    Raises ValueError for an empty prompt, a token outside the vocabulary, or a state too small for the tokens asked for.
    """
    prompt_BT = np.asarray(prompt_BT, np.int32)
    check_prompt(model, prompt_BT, lengths_B, max_new_tokens, max_len, key, options)
    lengths_B = np.full(*prompt_BT.shape) if lengths_B is None else np.asarray(lengths_B)
    out = np.zeros((prompt_BT.shape[0], prompt_BT.shape[1] + max_new_tokens), np.int32)
    for row, length in enumerate(lengths_B):
        out[row, :length] = prompt_BT[row, :length]
    options |= {"eos_id": eos_id, "key": key, "max_len": max_len, "memory": memory}
    tokens = stream(model, prompt_BT, max_new_tokens, lengths_B=lengths_B, **options)
    for i, (next_B, running_B) in enumerate(tokens):
        rows = np.flatnonzero(running_B)
        out[rows, lengths_B[rows] + i] = next_B[rows]
    return jnp.asarray(out)


def stream(model, prompt_BT, max_new_tokens, *, lengths_B=None, eos_id=None, key=None, max_len=None, memory=None, **options):
    """Yields (tokens_B, running_B) for each new token, as numpy arrays; ends when no row runs any more. Arguments as `generate`."""
    prompt_BT = np.asarray(prompt_BT, np.int32)
    check_prompt(model, prompt_BT, lengths_B, max_new_tokens, max_len, key, options)
    B, T = prompt_BT.shape
    key = jax.random.key(0) if key is None else key
    valid_BT = None if lengths_B is None else jnp.asarray(np.arange(T) < np.asarray(lengths_B)[:, None])
    model = served(model)
    graphdef, *arrays = model_state.split(model)
    prefill, step = _compiled(graphdef, tuple(sorted(options.items())))
    memory = jax.tree.map(lambda a: jnp.array(a, copy=True), memory)  # the state is donated, the caller's arrays are not
    state = model.init_state(B, rounded(T + max_new_tokens if max_len is None else max_len), memory=memory)
    tokens_B, state = prefill(*arrays, prompt_BT, state, valid_BT, jax.random.fold_in(key, 0))
    running_B = np.ones(B, bool)
    for i in range(max_new_tokens):
        now_B = np.asarray(tokens_B)
        if eos_id is not None:
            running_B = running_B & (now_B != eos_id)
        if not running_B.any():
            return
        if i + 1 < max_new_tokens:  # the next step is under way while the caller uses this token
            tokens_B, state = step(*arrays, tokens_B, state, jax.random.fold_in(key, i + 1))
        yield now_B, running_B.copy()


@functools.lru_cache(maxsize=16)
def _compiled(graphdef, options):
    """(prefill, step) of a model structure and sampling options, each compiled once per shape."""
    choose = functools.partial(sampling.sample, **dict(options))

    def prefill(params, buffers, tokens_BT, state, valid_BT, key):
        model = model_state.merge(graphdef, params, buffers)
        logits_BV, state = model.prefill(tokens_BT, state, valid_BT, last_only=True)
        return choose(logits_BV, key), state

    def step(params, buffers, tokens_B, state, key):
        logits_BV, state = model_state.merge(graphdef, params, buffers).step(tokens_B, state)
        return choose(logits_BV, key), state

    return jax.jit(prefill, donate_argnums=3), jax.jit(step, donate_argnums=3)


def rounded(length, multiple=64):
    """State sizes in steps, so that prompts of similar length share a compiled program."""
    return -(-length // multiple) * multiple


def check_prompt(model, prompt_BT, lengths_B, max_new_tokens, max_len, key, options):
    """Raises ValueError, naming the value, for a request that cannot be served."""
    if prompt_BT.ndim != 2 or prompt_BT.shape[1] == 0:
        raise ValueError(f"generate: expected prompts [B, T] with at least one token, got shape {prompt_BT.shape}.")
    B, T = prompt_BT.shape
    if lengths_B is not None and (np.shape(lengths_B) != (B,) or np.min(lengths_B) < 1 or np.max(lengths_B) > T):
        raise ValueError(f"generate: expected lengths_B of {B} numbers between 1 and {T}, got {np.asarray(lengths_B).tolist()}.")
    if max_new_tokens < 1:
        raise ValueError(f"generate: max_new_tokens={max_new_tokens} must be at least 1.")
    vocab = model.config.vocab_size
    if prompt_BT.min() < 0 or prompt_BT.max() >= vocab:
        outside = prompt_BT[(prompt_BT < 0) | (prompt_BT >= vocab)][0]
        raise ValueError(f"generate: prompt token {outside} is outside the model's vocabulary of {vocab}.")
    needed = prompt_BT.shape[1] + max_new_tokens
    if max_len is not None and needed > max_len:
        raise ValueError(f"generate: {prompt_BT.shape[1]} prompt + {max_new_tokens} new tokens = {needed} exceed max_len={max_len}.")
    sampling.check(options.get("temperature", 0.0), options.get("top_k"), options.get("top_p"))
    if options.get("temperature", 0.0) > 0 and key is None:
        raise ValueError("temperature > 0 draws at random: pass key=jax.random.key(seed).")

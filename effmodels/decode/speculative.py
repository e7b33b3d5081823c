"""Self-speculative decoding: the model's own modules (`models.mtp`) draft tokens, one forward pass of the model checks them all.

What comes out is what decoding token by token gives: greedily the same tokens, else the same distribution (arXiv:2211.17192). Module k
predicts from the output of module k - 1, so that `depth` tokens are drafted per pass. Its state holds what is certain only; a model whose
states cannot give tokens back (`TokenMixer.rolls_back`) keeps the one from before the draft and reads what was accepted again.
Letters: B batch, T prompt, W tokens of a pass, K = depth drafts, D model, V vocab. Token s of a row is the first of a pass.
"""
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effmodels.config import ConfigError
from effmodels.decode import sampling
from effmodels.decode.generate import check_prompt, rounded
from effmodels.decode.weights import served
from effmodels.models import state as model_state


@dataclasses.dataclass
class Speculation:
    """What drafting brought so far, in tokens of all rows; passes of the model after the prompt."""

    drafted: int = 0
    accepted: int = 0
    passes: int = 0

    @property
    def acceptance(self):
        """The share of drafted tokens that the model agreed with."""
        return self.accepted / max(self.drafted, 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drafts:
    """Between two passes: states of the model and of its modules, the last certain output of each module, the token to read next, and the
    drafts behind it with the distributions they were drawn from (logits [B, K, V])."""

    main: Any
    modules: Any
    last_BD: Any
    next_B: Any
    drafts_BK: Any
    logits_BKV: Any


def speculate(model, prompt_BT, max_new_tokens, *, lengths_B=None, eos_id=None, **options):
    """(int32 [B, T + max_new_tokens] as `generate` returns them, `Speculation`); arguments as `generate`."""
    prompt_BT, report = np.asarray(prompt_BT, np.int32), Speculation()
    passes = stream(model, prompt_BT, max_new_tokens, lengths_B=lengths_B, eos_id=eos_id, report=report, **options)
    lengths_B = np.full(*prompt_BT.shape) if lengths_B is None else np.asarray(lengths_B)
    out = np.zeros((prompt_BT.shape[0], prompt_BT.shape[1] + max_new_tokens), np.int32)
    at_B = np.array(lengths_B)
    for row, length in enumerate(lengths_B):
        out[row, :length] = prompt_BT[row, :length]
    for tokens_BW, count_B in passes:
        for row, count in enumerate(count_B):
            out[row, at_B[row] : at_B[row] + count] = tokens_BW[row, :count]
        at_B += count_B
    return jnp.asarray(out), report


def stream(model, prompt_BT, max_new_tokens, *, lengths_B=None, eos_id=None, key=None, max_len=None, memory=None, report=None, **options):
    """Yields (tokens_BW, count_B) after every pass, as numpy arrays: each row's next `count` tokens; ends when no row runs any more.

    report: a `Speculation` to count in. Other arguments and errors as of `generate.stream`; ConfigError for a model without modules.
    """
    prompt_BT, depth = np.asarray(prompt_BT, np.int32), len(model.mtp)
    if not depth:
        raise ConfigError("speculate: this model has no modules that predict further tokens (model.mtp); use `generate`.")
    if hasattr(model.resolved.ahead.mixer.config, "memory"):
        raise ConfigError(f"speculate: modules of {model.resolved.ahead.mixer.name!r} attend to a memory and cannot draft; use `generate`.")
    check_prompt(model, prompt_BT, lengths_B, max_new_tokens, None if max_len is None else max_len - depth, key, options)
    (B, T), report = prompt_BT.shape, Speculation() if report is None else report
    key = jax.random.key(0) if key is None else key
    count_B = np.full(B, T) if lengths_B is None else np.asarray(lengths_B)
    model = served(model)
    graphdef, *arrays = model_state.split(model)
    start, advance = _compiled(graphdef, tuple(sorted(options.items())))
    max_len = rounded(T + max_new_tokens + depth) if max_len is None else max_len
    memory = jax.tree.map(lambda a: jnp.array(a, copy=True), memory)  # the state is donated, the caller's arrays are not
    drafts = start(*arrays, prompt_BT, _empty(model, B, max_len, memory), jnp.asarray(count_B), jax.random.fold_in(key, 0))
    left_B = np.full(B, max_new_tokens)
    tokens_BW, count_B = np.asarray(drafts.next_B)[:, None], np.ones(B, int)
    while True:
        count_B = np.minimum(count_B, left_B)
        left_B = left_B - count_B
        if eos_id is not None:
            for row in np.flatnonzero(count_B):
                ends = np.flatnonzero(tokens_BW[row, : count_B[row]] == eos_id)
                if ends.size:
                    count_B[row], left_B[row] = ends[0], 0
        if count_B.any():
            yield tokens_BW, count_B
        if not left_B.any():
            return
        report.passes += 1
        drafts, tokens_BW, count_B = advance(*arrays, drafts, left_B > 0, jax.random.fold_in(key, report.passes))
        tokens_BW, count_B = np.asarray(tokens_BW), np.asarray(count_B)
        report.drafted += depth * int(np.sum(left_B > 0))
        report.accepted += int(np.sum(np.maximum(count_B - 1, 0)))


def accepted(drafts_BK, draft_logits_BKV, logits_BWV, key):
    """(tokens_BW, count_B): drafts that are kept and one more token each; logits_BWV, W = K + 1: of the model, as they are drawn from.

    A draft stays with probability min(1, p / q); the first that does not is drawn again from max(p - q, 0), normalised
    (arXiv:2211.17192, algorithm 1), so that every token is distributed as the model's.
    """
    K, (kept_key, new_key) = drafts_BK.shape[1], jax.random.split(key)
    p_BWV, q_BKV = (jax.nn.softmax(a, axis=-1) for a in (logits_BWV, draft_logits_BKV))
    p_BK, q_BK = (jnp.take_along_axis(a[:, :K], drafts_BK[..., None], axis=-1)[..., 0] for a in (p_BWV, q_BKV))
    keep_BK = jax.random.uniform(kept_key, drafts_BK.shape, p_BK.dtype) * q_BK < p_BK
    kept_B = jnp.sum(jnp.cumprod(keep_BK, axis=1), axis=1)
    left_BWV = p_BWV.at[:, :K].set(jnp.maximum(p_BWV[:, :K] - q_BKV, 0.0))
    new_B = jax.random.categorical(new_key, jnp.log(_at(left_BWV, kept_B)), axis=-1)
    return _joined(drafts_BK, kept_B, new_B)


def _accepted_greedily(drafts_BK, logits_BWV, best):
    best_BW = best(logits_BWV)
    kept_B = jnp.sum(jnp.cumprod(best_BW[:, :-1] == drafts_BK, axis=1), axis=1)
    return best_BW, kept_B + 1


def _joined(drafts_BK, kept_B, new_B):
    tokens_BW = jnp.pad(drafts_BK, ((0, 0), (0, 1))).at[jnp.arange(kept_B.shape[0]), kept_B].set(new_B.astype(jnp.int32))
    return tokens_BW, kept_B + 1


@functools.lru_cache(maxsize=16)
def _compiled(graphdef, options):
    """(start, advance) of a model structure and sampling options, each compiled once per shape."""
    options = dict(options)
    greedy = options.get("temperature", 0.0) == 0.0
    adjust = functools.partial(sampling.adjusted, **options)

    def choose(logits_BV, key):
        logits_BV = adjust(logits_BV)
        chosen_B = jnp.argmax(logits_BV, axis=-1) if greedy else jax.random.categorical(key, logits_BV, axis=-1)
        return chosen_B.astype(jnp.int32), logits_BV

    def start(params, buffers, tokens_BT, empty, length_B, key):
        model = model_state.merge(graphdef, params, buffers)
        valid_BT = jnp.arange(tokens_BT.shape[1]) < length_B[:, None]
        hidden_BTD, main = model.prefill_hidden(tokens_BT, empty.main, valid_BT)
        next_B, _ = choose(model.logits(_at(hidden_BTD, length_B - 1)[:, None])[:, 0], key)
        follow_BT = jnp.roll(tokens_BT, -1, axis=1).at[jnp.arange(length_B.shape[0]), length_B - 1].set(next_B)
        state = dataclasses.replace(empty, main=main, next_B=next_B)
        return _draft(model, state, hidden_BTD, follow_BT, length_B, jnp.zeros_like(length_B), choose, key)

    def advance(params, buffers, state, running_B, key):
        model = model_state.merge(graphdef, params, buffers)
        tokens_BW = jnp.concatenate([state.next_B[:, None], state.drafts_BK], axis=1)
        hidden_BWD, after = model.prefill_hidden(tokens_BW, state.main, jnp.broadcast_to(running_B[:, None], tokens_BW.shape))
        logits_BWV = adjust(model.logits(hidden_BWD))
        if greedy:
            new_BW, count_B = _accepted_greedily(state.drafts_BK, logits_BWV, lambda a: jnp.argmax(a, axis=-1).astype(jnp.int32))
        else:
            new_BW, count_B = accepted(state.drafts_BK, state.logits_BKV, logits_BWV, jax.random.fold_in(key, 0))
        count_B = jnp.where(running_B, count_B, 0)
        before_B = state.main.length_B
        next_B = jnp.where(running_B, _at(new_BW, jnp.maximum(count_B - 1, 0)), state.next_B)
        state = dataclasses.replace(state, main=_kept(model, tokens_BW, state.main, after, count_B, running_B), next_B=next_B)
        state = _draft(model, state, hidden_BWD, new_BW, count_B, before_B, choose, jax.random.fold_in(key, 1))
        return state, new_BW, count_B

    return jax.jit(start, donate_argnums=3), jax.jit(advance, donate_argnums=2)


def _kept(model, tokens_BW, old, after, count_B, running_B):
    """The model's state after the first count_B tokens of a pass; `after` has read all of them."""
    if all(kind.mixer.cls.rolls_back(kind.mixer.config) for kind in model.resolved.layers):
        return dataclasses.replace(after, length_B=old.length_B + count_B)
    W = tokens_BW.shape[1]
    again = lambda: model.prefill_hidden(tokens_BW, old, jnp.arange(W) < count_B[:, None])[1]  # noqa: E731
    return jax.lax.cond(jnp.all((count_B == W) | ~running_B), lambda: after, again)


def _draft(model, state, hidden_BWD, follow_BW, count_B, before_B, choose, key):
    """The Drafts behind the first count_B outputs of a pass (of tokens s = before_B and on), each followed by the token in follow_BW.

    Module k reads as many places as there are new certain tokens, from s - k + 1 on; then k - 1 more that end in drafts, into a state that
    is dropped.
    """
    place_W, new_BW = jnp.arange(hidden_BWD.shape[1]), jnp.arange(hidden_BWD.shape[1]) < count_B[:, None]
    last_B = jnp.maximum(count_B - 1, 0)
    certain_BWD, guessed_BKD, states, lasts, drafts, logits = hidden_BWD, None, [], [], [], []
    embedded_BWD = model.embedded(follow_BW)
    for k, module in enumerate(model.mtp):
        late = k if module.sequential else 0

        def read(x, embedded, place_BW, wanted_BW, old, module=module):
            valid_BW = wanted_BW & (place_BW >= 0)
            return module.prefill(x, embedded, model.decode_ctx(place_BW, valid_BW), old, valid_BW)

        y_BWD, new = read(certain_BWD, embedded_BWD, before_B[:, None] + place_W - late, new_BW, state.modules[k])
        last_BD = out_BD = jnp.where(count_B[:, None] > 0, _at(y_BWD, last_B), state.last_BD[k])
        after_BKD = last_BD[:, None]
        if late:
            place_BK = (before_B + count_B)[:, None] - late + jnp.arange(late)
            wanted_BK = jnp.broadcast_to(count_B[:, None] > 0, place_BK.shape)
            z_BKD, _ = read(guessed_BKD, model.embedded(jnp.stack(drafts, axis=1)), place_BK, wanted_BK, new)
            out_BD, after_BKD = z_BKD[:, -1], jnp.concatenate([after_BKD, z_BKD], axis=1)
        draft_B, logits_BV = choose(model.logits(out_BD[:, None])[:, 0], jax.random.fold_in(key, k))
        if module.sequential:
            certain_BWD = jnp.concatenate([state.last_BD[k][:, None], y_BWD[:, :-1]], axis=1)
        guessed_BKD = after_BKD
        states.append(new), lasts.append(last_BD), drafts.append(draft_B), logits.append(logits_BV)
    return dataclasses.replace(
        state, modules=tuple(states), last_BD=tuple(lasts), drafts_BK=jnp.stack(drafts, 1), logits_BKV=jnp.stack(logits, 1)
    )


def _empty(model, B, max_len, memory):
    c, K = model.config, len(model.mtp)
    modules = tuple(m.layer.mixer.init_state(B, max_len, c.compute_dtype) for m in model.mtp)
    lasts = tuple(jnp.zeros((B, c.d_model), c.compute_dtype) for _ in model.mtp)
    return Drafts(
        model.init_state(B, max_len, memory=memory), modules, lasts, jnp.zeros(B, jnp.int32), jnp.zeros((B, K), jnp.int32),
        jnp.zeros((B, K, c.vocab_size), jnp.float32),
    )  # fmt: skip


def _at(a_BW, index_B):
    return a_BW[jnp.arange(a_BW.shape[0]), index_B]

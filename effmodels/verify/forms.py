"""The forms of one model: whole rows, the kernels' slow twins, prefill in chunks, single steps; all must give the same logits."""

import jax
import numpy as np

from effmodels.models import state as model_state
from effmodels.verify import ties
from effmodels.verify.report import Outcome, row

LOGITS = 1e-4
MOST_TOKENS = 96
CHUNKS, ROWS, ATTEMPTS = 3, 4, 3


def check(case):
    """`Outcome`: chunkwise = parallel = prefill in chunks + steps = steps alone."""
    for attempt in range(ATTEMPTS):
        tokens_BT = _tokens(case, attempt)
        outcome = _compare_forms(case, tokens_BT, np.ones(ROWS, bool))
        if outcome.passed or not case.has_experts:
            break
        untied_B = ties.least_gaps(case, _as_batch(tokens_BT)) > ties.GAP
        if untied_B.any():  # else another draw
            return outcome if untied_B.all() else _compare_forms(case, tokens_BT, untied_B)
    return outcome


def _compare_forms(case, tokens_BT, rows_B):
    outcome, T = Outcome("forms"), tokens_BT.shape[1]
    note = "worst token" if rows_B.all() else f"worst token; {np.sum(~rows_B)} rows with a tie of expert scores left out"
    want = _whole(case, case.one, "whole", tokens_BT)
    allowed_T = LOGITS + _moved(case, tokens_BT, want, rows_B)
    slow = case.compiled("slow twins", lambda: case.setup(case.devices[:1], mesh={}, implementation="reference"))
    chunk = max(1, T // (CHUNKS + 1))
    forms = {
        "kernels = their slow twins": lambda: _whole(case, slow, "whole by slow twins", tokens_BT),
        f"{CHUNKS} chunks of {chunk}, then steps": lambda: _decoded(case, tokens_BT, chunk, CHUNKS),
        "steps alone (recurrent)": lambda: _decoded(case, tokens_BT, chunk, 0),
    }
    for what, run in forms.items():
        error_T = _error(run(), want, rows_B)
        t = int(np.argmax(error_T / allowed_T))
        outcome.rows.append(row("forms", f"logits: {what}", error_T[t], allowed_T[t], note))
        if np.any(error_T > allowed_T):
            first = int(np.argmax(error_T > allowed_T))
            where = f", where chunk {first // chunk} begins" if first and first % chunk == 0 and first <= CHUNKS * chunk else ""
            outcome.explanations.append(f"{what}: the logits differ from token {first} of {T} on{where}; before it they agree")
    return outcome


def _error(got, want, rows_B):
    """Relative error of every token's logits [T] over these rows; infinite for a NaN."""
    scale = np.sqrt(np.mean(np.square(want, dtype=np.float64)))
    error_T = np.sqrt(np.mean(np.square(got[rows_B].astype(np.float64) - want[rows_B]), axis=(0, 2))) / scale
    return np.where(np.isfinite(error_T), error_T, np.inf)


def _moved(case, tokens_BT, want, rows_B):
    """What rounding may do to the logits of every token [T]: as `Case.allowed` for gradients."""
    errors = [_error(_whole(case, case.one, "whole", tokens_BT, params), want, rows_B) for params in case.perturbed()]
    return np.minimum(case.bounds.slack * np.max(errors, axis=0), case.bounds.most)


def _tokens(case, attempt):
    """A few rows of one document each: long enough to leave every window behind, where that is not too long."""
    windows = [w for k in case.one.model.resolved.layers if (w := getattr(k.mixer.config, "window", None)) is not None]
    T = min(case.user.seq_len, max([MOST_TOKENS, *(2 * w + 3 for w in windows if 2 * w + 3 <= 4 * MOST_TOKENS)]))
    rng = np.random.default_rng([case.seed, 2, attempt])
    return rng.integers(0, case.user.model.vocab_size, (ROWS, T)).astype(np.int32)


def _as_batch(tokens_BT):
    T = tokens_BT.shape[1]
    positions_BT = np.broadcast_to(np.arange(T, dtype=np.int32), tokens_BT.shape)
    return {"tokens": tokens_BT, "segment_ids": np.ones_like(tokens_BT), "positions": positions_BT}


def _whole(case, setup, name, tokens_BT, params=None):
    def build():
        graphdef = model_state.split(setup.model)[0]
        return case.jit(lambda params, buffers, tokens: model_state.merge(graphdef, params, buffers)(tokens))

    drawn, buffers = case.placed(setup)
    return np.asarray(case.compiled(name, build)(drawn if params is None else params, buffers, tokens_BT))


def _decoded(case, tokens_BT, chunk, chunks):
    """float32 logits [B, T, V] of `chunks` prefills of `chunk` tokens and single steps for the rest."""
    prefill, step = case.compiled(f"decode {chunk}", lambda: _decode_programs(case))
    (B, T), params, buffers = tokens_BT.shape, case.params, case.buffers
    state = jax.tree.map(jax.numpy.asarray, _decode_state(case, B, T))
    out = []
    for i in range(chunks):
        logits_BCV, state = prefill(params, buffers, tokens_BT[:, i * chunk : (i + 1) * chunk], state)
        out.append(np.asarray(logits_BCV))
    for t in range(chunks * chunk, T):
        logits_BV, state = step(params, buffers, tokens_BT[:, t], state)
        out.append(np.asarray(logits_BV)[:, None])
    return np.concatenate(out, axis=1)


def _decode_programs(case):
    graphdef = model_state.split(case.one.model)[0]

    def model(params, buffers):
        return model_state.merge(graphdef, params, buffers)

    prefill = case.jit(lambda p, b, tokens_BT, state: model(p, b).prefill(tokens_BT, state))
    step = case.jit(lambda p, b, tokens_B, state: model(p, b).step(tokens_B, state))
    return prefill, step


def _decode_state(case, B, T):
    return model_state.merge(model_state.split(case.one.model)[0], case.params, case.buffers).init_state(B, T)

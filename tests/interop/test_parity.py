"""Logits of every family against the independent implementation that made references/, in every way a model can be run."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effmodels.interop import load_pretrained, save_pretrained
from effmodels.models import state as model_state
from tests.interop import folders

BOUND = 1e-5
# One of each kind by default: rope scaling, layouts of fused matrices, experts with what is around them, a recurrent state.
QUICK = ("llama_yarn", "gpt_neox", "retnet")
CASES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in folders.ALL]


def error(got, want):
    """Largest difference over the root mean square of what is wanted."""
    return float(np.max(np.abs(np.asarray(got) - want)) / np.sqrt(np.mean(want**2)))


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    ref = folders.reference(request.param)
    path = folders.folder(tmp_path_factory.mktemp("hub"), request.param)
    with jax.default_matmul_precision("highest"):
        yield load_pretrained(path, dtype="float32")[0], ref["tokens"], folders.logits(ref)


def compiled(model, call):
    """jit of call(model, *arguments)."""
    graphdef, params, buffers = model_state.split(model)
    step = jax.jit(lambda p, b, *args: call(model_state.merge(graphdef, p, b), *args))
    return lambda *args: step(params, buffers, *args)


def test_full_forward(case):
    model, tokens, want = case
    for row, logits in zip(tokens, want):
        assert error(model(jnp.asarray([row]))[0], logits) <= BOUND


def test_left_padded_chunks_and_steps(case):
    """Both rows in one batch, the shorter one padded on the left: chunks that split inside it, then one token at a time."""
    model, tokens, want = case
    longest = max(map(len, tokens))
    padded = np.array([[0] * (longest - len(row)) + row for row in tokens])
    valid = np.arange(longest) >= longest - np.array([[len(row)] for row in tokens])
    state, got = model.init_state(2, longest), []
    prefill = compiled(model, lambda m, t, s, v: m.prefill(t, s, v))
    for begin, end in ((0, 7), (7, 14)):
        logits, state = prefill(padded[:, begin:end], state, valid[:, begin:end])
        got.append(np.asarray(logits))
    step = compiled(model, lambda m, t, s: m.step(t, s))
    for t in range(14, longest):
        logits, state = step(padded[:, t], state)
        got.append(np.asarray(logits)[:, None])
    got = np.concatenate(got, axis=1)
    for i, logits in enumerate(want):
        assert error(got[i, longest - len(logits) :], logits) <= BOUND


def test_left_padded_at_once(case):
    model, tokens, want = case
    longest = max(map(len, tokens))
    padded = np.array([[0] * (longest - len(row)) + row for row in tokens])
    valid = np.arange(longest) >= longest - np.array([[len(row)] for row in tokens])
    logits, _ = compiled(model, lambda m, t, s, v: m.prefill(t, s, v))(padded, model.init_state(2, longest), valid)
    for i, row in enumerate(want):
        assert error(logits[i, longest - len(row) :], row) <= BOUND


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_is_the_same_file(tmp_path, name, dtype):
    """Names, shapes, dtypes and bits."""
    source = folders.folder(tmp_path / "a", name, dtype=dtype)
    model, _ = load_pretrained(source)
    assert model.config.param_dtype == dtype
    save_pretrained(model, tmp_path / "b")
    kept, ignored = folders.contents(source), model_family(model).ignores
    assert folders.contents(tmp_path / "b") == {n: t for n, t in kept.items() if not ignored(n)}


@pytest.mark.parametrize("name", CASES)
def test_the_config_is_written_from_the_model_alone(tmp_path, name):
    """Without what was remembered of the folder: the same tensors, and a config.json that gives the same model."""
    source = folders.folder(tmp_path / "a", name)
    model, _ = load_pretrained(source)
    kind = model_family(model)
    model.pretrained = None
    save_pretrained(model, tmp_path / "b", model_type=kind.model_type)
    kept = folders.contents(source)
    assert folders.contents(tmp_path / "b") == {n: t for n, t in kept.items() if not kind.ignores(n)}
    again, _ = load_pretrained(tmp_path / "b")
    tokens = jnp.asarray([[3, 1, 4, 1, 5, 9, 2, 6]])
    np.testing.assert_array_equal(again(tokens), model(tokens))


def model_family(model):
    from effmodels.interop import record
    from effmodels.interop.registry import get_family

    return get_family(record.of(model).model_type)

"""Generation from a carried state equals recomputing the prefix; ragged prompts equal single ones; stops, seeds and refusals."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effmodels.decode import generate, stream
from effmodels.decode.generate import _compiled
from effmodels.models import Decoder, ModelConfig
from effmodels.models import state as model_state
from effmodels.parallel import axes, mesh
from tests.contract.cases import fill, jit

V, NEW = 29, 9
CONFIG = ModelConfig(
    vocab_size=V, d_model=16, num_layers=2, pattern=("retention", "local"), channel=("mlp", "moe"),
    mixers={"retention": {"num_heads": 2, "chunk": 4}, "local": {"kind": "attention", "num_heads": 2, "num_kv_heads": 1, "window": 4}},
    channels={"mlp": {"hidden": 16}, "moe": {"num_experts": 3, "top_k": 2, "hidden": 8, "capacity_factor": 0.5}},
    implementation="reference",
)  # fmt: skip
LENGTHS = np.array([7, 1, 4])
PROMPTS = np.random.default_rng(0).integers(1, V, (3, 7)).astype(np.int32) * (np.arange(7) < LENGTHS[:, None])


@pytest.fixture(scope="module")
def model():
    graphdef, *arrays = fill(lambda: Decoder(CONFIG, rngs=nnx.Rngs(0)))
    return model_state.merge(graphdef, *jax.tree.map(jnp.asarray, arrays))


@pytest.fixture(scope="module")
def recomputed(model):
    """Greedy continuation of each prompt by a forward pass over the whole row for every token."""
    whole = jit(lambda tokens: model(tokens))
    rows = np.zeros((3, 7 + NEW), np.int32)
    rows[:, :7] = PROMPTS
    for i in range(NEW):
        logits = np.asarray(whole(rows))
        rows[np.arange(3), LENGTHS + i] = logits[np.arange(3), LENGTHS + i - 1].argmax(-1)
    return rows


def test_greedy_equals_recomputing_the_prefix(model, recomputed):
    got = generate(model, PROMPTS, NEW, lengths_B=LENGTHS)
    assert got.dtype == jnp.int32 and np.array_equal(got, recomputed)
    assert len(np.unique(recomputed[0, 7:])) > 2, "a constant continuation proves little"


def test_rows_do_not_depend_on_their_neighbours(model, recomputed):
    longer = generate(model, np.pad(PROMPTS, ((0, 0), (0, 3)), constant_values=5), NEW, lengths_B=LENGTHS)
    for row, n in zip(np.asarray(longer), LENGTHS):
        assert np.array_equal(row[: n + NEW], recomputed[list(LENGTHS).index(n), : n + NEW]), "what pads a prompt changes it"


def test_a_row_stops_at_eos_and_the_others_go_on(model, recomputed):
    continuations = [recomputed[b, n : n + NEW] for b, n in enumerate(LENGTHS)]
    eos = int(continuations[0][2])
    ends = [int(np.argmax(c == eos)) if eos in c else NEW for c in continuations]
    got = np.asarray(generate(model, PROMPTS, NEW, lengths_B=LENGTHS, eos_id=eos))
    for b, n in enumerate(LENGTHS):
        assert np.array_equal(got[b, n : n + ends[b]], continuations[b][: ends[b]]) and np.all(got[b, n + ends[b] :] == 0)
    same = stream(model, np.repeat(PROMPTS[:1], 3, axis=0), NEW, lengths_B=np.repeat(LENGTHS[:1], 3), eos_id=eos)
    assert len(list(same)) == ends[0], "the stream ends when no row runs"


def test_streamed_tokens_are_those_of_generate(model, recomputed):
    pairs = list(stream(model, PROMPTS, NEW, lengths_B=LENGTHS))
    assert len(pairs) == NEW and all(isinstance(t, np.ndarray) and running.all() for t, running in pairs)
    assert np.array_equal(np.stack([t for t, _ in pairs], 1), [recomputed[b, n : n + NEW] for b, n in enumerate(LENGTHS)])


def test_seeds_repeat_and_differ(model):
    options = {"lengths_B": LENGTHS, "temperature": 1.0, "top_k": 20}
    first, again, other = (np.asarray(generate(model, PROMPTS, NEW, key=jax.random.key(seed), **options)) for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_one_program_serves_every_token_and_similar_lengths(model):
    prefill, step = _compiled(model_state.split(model)[0], ())
    generate(model, PROMPTS, NEW, lengths_B=LENGTHS)
    before = prefill._cache_size(), step._cache_size()
    generate(model, PROMPTS, NEW + 5, lengths_B=LENGTHS)
    assert (prefill._cache_size(), step._cache_size()) == before


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: generate(m, np.zeros((1, 0)), 3), r"expected prompts \[B, T\] with at least one token, got shape \(1, 0\)"),
        (lambda m: generate(m, np.zeros(4), 3), r"expected prompts \[B, T\] with at least one token, got shape \(4,\)"),
        (lambda m: generate(m, [[1, V]], 3), rf"prompt token {V} is outside the model's vocabulary of {V}"),
        (lambda m: generate(m, [[3, -1]], 3), rf"prompt token -1 is outside the model's vocabulary of {V}"),
        (lambda m: generate(m, [[1, 2]], 0), r"max_new_tokens=0 must be at least 1"),
        (lambda m: generate(m, [[1, 2]], 3, max_len=4), r"2 prompt \+ 3 new tokens = 5 exceed max_len=4"),
        (lambda m: generate(m, [[1, 2]], 3, lengths_B=[0]), r"expected lengths_B of 1 numbers between 1 and 2, got \[0\]"),
        (lambda m: generate(m, [[1, 2]], 3, lengths_B=[3]), r"expected lengths_B of 1 numbers between 1 and 2, got \[3\]"),
        (lambda m: generate(m, [[1, 2]], 3, lengths_B=[1, 1]), r"expected lengths_B of 1 numbers"),
        (lambda m: generate(m, [[1, 2]], 3, temperature=1.0), r"temperature > 0 draws at random: pass key=jax.random.key\(seed\)"),
        (lambda m: generate(m, [[1, 2]], 3, temperature=-1.0), r"temperature=-1.0: expected 0 \(most likely token\) or a positive number"),
        (lambda m: generate(m, [[1, 2]], 3, top_k=0), r"top_k=0: expected at least 1, or None"),
        (lambda m: generate(m, [[1, 2]], 3, top_p=1.5), r"top_p=1.5: expected a number in \(0, 1\], or None"),
    ],
)
def test_bad_requests_say_what_to_do(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)


@pytest.mark.slow
def test_generation_under_a_mesh(model, recomputed):
    with axes.use(mesh.make_mesh({"data": 1, "tensor": 2}, jax.devices()[:2]), {"kv_heads": None, "act_kv_heads": None}):
        got = generate(model, PROMPTS, NEW, lengths_B=LENGTHS)
    assert np.array_equal(got, recomputed)

"""Samples follow the distribution that temperature, top-k and top-p leave. Letters: V vocab."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effmodels.decode import sample
from tests.contract.cases import jit

PROBABILITIES = np.array([0.05, 0.4, 0.1, 0.25, 0.15, 0.05])
DRAWS = 20_000


def expected(keep=range(6), temperature=1.0):
    p = np.where(np.isin(np.arange(6), list(keep)), PROBABILITIES ** (1 / temperature), 0.0)
    return p / p.sum()


CASES = [
    ({"temperature": 1.0}, expected()),
    ({"temperature": 0.5}, expected(temperature=0.5)),
    ({"temperature": 2.0, "top_k": 3}, expected((1, 3, 4), 2.0)),
    ({"temperature": 1.0, "top_p": 0.6}, expected((1, 3))),  # 0.4 is not enough, 0.4 + 0.25 is
    ({"temperature": 1.0, "top_p": 0.3}, expected((1,))),
    ({"temperature": 1.0, "top_p": 1.0, "top_k": 99}, expected()),
    ({"temperature": 1.0, "top_k": 3, "top_p": 0.45}, expected((1,))),  # after top-k the first has 0.4 / 0.8
    ({"temperature": 1.0, "top_k": 3, "top_p": 0.55}, expected((1, 3))),
    ({"temperature": 1.0, "vocab_size": 3}, expected((0, 1, 2))),
]


@pytest.fixture(scope="module")
def draws():
    """The draws of every case, one program."""
    logits = jnp.broadcast_to(jnp.log(PROBABILITIES), (DRAWS, 6))
    return jit(lambda z, key: [sample(z, key, **options) for options, _ in CASES])(logits, jax.random.key(0))


@pytest.mark.parametrize("case", range(len(CASES)), ids=[str(options) for options, _ in CASES])
def test_frequencies(draws, case):
    want = CASES[case][1]
    got = np.bincount(draws[case], minlength=6) / DRAWS
    assert np.all(got[want == 0] == 0), "an excluded token was drawn"
    # Five standard deviations of a frequency over 20,000 draws.
    assert np.all(np.abs(got - want) < 5 * np.sqrt(want * (1 - want) / DRAWS) + 1e-9)


def test_greedy_needs_no_key_and_keeps_to_the_vocabulary():
    logits = jnp.log(PROBABILITIES)[None]
    assert sample(logits).tolist() == [1] and sample(logits).dtype == jnp.int32
    assert sample(logits[:, ::-1], vocab_size=3).tolist() == [2]


def test_rows_are_drawn_apart():
    logits = jnp.stack([jnp.full(6, -jnp.inf).at[i].set(0.0) for i in (4, 0, 2)])
    assert sample(logits, jax.random.key(0), temperature=1.0, top_p=0.9).tolist() == [4, 0, 2]

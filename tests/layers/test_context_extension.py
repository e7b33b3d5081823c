"""Rotations for longer rows against the papers' formulas, one pair of dims after the other; and that attention uses them."""
import dataclasses
import math

import numpy as np
import pytest
from flax import nnx

from effmodels.config import ConfigError
from effmodels.layers.context import Ctx
from effmodels.layers.positions import rope, rope_frequencies, rotate
from effmodels.mixers.attention import Attention
from effmodels.mixers.base import Env
from effmodels.models import state as model_state
from tests.contract.cases import draw, fill, jit
from tests.numerics import assert_close

DIMS, THETA, LENGTH = 64, 10_000.0, 2048
TURNS = [LENGTH / (2 * math.pi * THETA ** (2 * i / DIMS)) for i in range(DIMS // 2)]  # in a row of pre-training


def frequencies(**scaling):
    return rope(DIMS, THETA, scaling)[0]


def test_position_interpolation_is_a_division_of_positions(x64):
    x, positions = draw(1, 9, 2, DIMS), np.arange(9)[None] * 7
    got = rotate(x, positions, frequencies(kind="linear", factor=4.0))
    assert_close("rotated", got, rotate(x, positions / 4.0, rope_frequencies(DIMS, THETA)), rel=1e-13)


def test_ntk_slows_the_slowest_dim_by_the_factor_and_the_fastest_not_at_all():
    got, plain = frequencies(kind="ntk", factor=8.0), rope_frequencies(DIMS, THETA)
    assert got[0] == plain[0] == 1.0
    assert_close("slowest", got[-1], plain[-1] / 8.0, rel=1e-13)
    assert_close("all", got, [(THETA * 8.0 ** (DIMS / (DIMS - 2))) ** (-2 * i / DIMS) for i in range(DIMS // 2)], rel=1e-13)
    assert rope(2, THETA, {"kind": "ntk", "factor": 8.0})[0] == [1.0]


def test_a_larger_base_is_a_larger_base():
    """Llama 2 Long: 10 000 becomes 500 000."""
    assert np.array_equal(frequencies(kind="abf", theta=500_000.0), rope_frequencies(DIMS, 500_000.0))


@pytest.mark.parametrize("kind, slow, fast", [("yarn", 1.0, 32.0), ("llama3", 1.0, 4.0)])
def test_what_turns_often_stays_and_what_turns_seldom_is_interpolated(kind, slow, fast):
    """YaRN's equations 11 to 13 and Llama 3.1's rule are the same ramp over turns, with other ends."""
    extra = {"ramp": "turns"} if kind == "yarn" else {}
    got = frequencies(kind=kind, factor=8.0, original_length=LENGTH, **extra)
    want = []
    for i, turns in enumerate(TURNS):
        plain = THETA ** (-2 * i / DIMS)
        share = 0.0 if turns < slow else 1.0 if turns > fast else (turns - slow) / (fast - slow)
        want.append((1 - share) * plain / 8.0 + share * plain)
    assert any(t < slow for t in TURNS) and any(slow < t < fast for t in TURNS) and any(t > fast for t in TURNS)
    assert_close(kind, got, want, rel=1e-13)


@pytest.mark.parametrize("truncate", [True, False])
def test_yarns_public_ramp_runs_over_dims(truncate):
    """It starts at the dim of 32 turns and ends at the dim of one; both ends are rounded outwards."""
    first, last = (next(i for i in range(DIMS) if LENGTH / (2 * math.pi * THETA ** (2 * i / DIMS)) <= beta) for beta in (32.0, 1.0))
    first -= 1  # the last whole dim that turns more than 32 times
    got = frequencies(kind="yarn", factor=8.0, original_length=LENGTH, truncate=truncate)
    plain = rope_frequencies(DIMS, THETA)
    share = (got / plain - 1 / 8) / (1 - 1 / 8)
    assert np.allclose(share[: first + 1], 1, atol=1e-12) and np.allclose(share[last:], 0, atol=1e-12)
    inner = share[first + 1 : last]
    assert np.all(np.diff(inner) < 0) and np.allclose(np.diff(inner), inner[1] - inner[0], atol=1e-12)  # a straight line
    if truncate:
        assert_close("line", share[first : last + 1], 1 - np.arange(last - first + 1) / (last - first), rel=1e-12)


def test_yarn_makes_scores_grow():
    """Section 3.4: 1 / sqrt(t) = 0.1 ln(s) + 1 on queries and keys; 1 where all dims stay."""
    scaling = {"kind": "yarn", "original_length": LENGTH}
    assert_close("factor 16", rope(DIMS, THETA, {**scaling, "factor": 16.0})[1], 0.1 * math.log(16) + 1, rel=1e-15)
    same, magnitude = rope(DIMS, THETA, {**scaling, "factor": 1.0})
    assert np.allclose(same, rope_frequencies(DIMS, THETA), rtol=1e-15) and magnitude == 1.0
    assert rope(DIMS, THETA, {**scaling, "factor": 16.0, "attention_factor": 1.25})[1] == 1.25


def test_attention_turns_and_scales_as_told(x64):
    """Half of each head rotates: only that half grows by the magnitude. Scaled weights are the same as a scaled rotation."""
    T, D, N, H = 11, 12, 2, 8
    scaling = {"kind": "yarn", "factor": 4.0, "original_length": 16, "attention_factor": 1.5}
    config = Attention.Config(num_heads=N, head_dim=H, rotary_fraction=0.5)
    env = Env(d_model=D, param_dtype="float64")
    x = draw(1, T, D)
    graphdef, params, _ = fill(lambda: Attention(config, env, rngs=nnx.Rngs(0)))
    config = dataclasses.replace(config, rope_scaling=scaling)
    scaled = model_state.split(nnx.eval_shape(lambda: Attention(config, env, rngs=nnx.Rngs(0))))[0]
    got = jit(lambda p, x: model_state.merge(scaled, p, {})(x, Ctx()))(params, x)
    turns, _ = rope(H // 2, 10_000.0, scaling)
    q, k, v = (np.einsum("td,dnh->tnh", x[0], params[w]) for w in ("wq", "wk", "wv"))
    complex_of = lambda a: (a[..., : H // 4] + 1j * a[..., H // 4 : H // 2]) * np.exp(1j * np.arange(T)[:, None] * turns)[:, None]  # noqa: E731
    scores = 1.5**2 * np.einsum("tni,sni->nts", complex_of(q), complex_of(k).conj()).real
    scores = (scores + np.einsum("tnh,snh->nts", q[..., H // 2 :], k[..., H // 2 :])) / H**0.5
    weights = np.where(np.tril(np.ones((T, T))), np.exp(scores), 0)
    want = np.einsum("nts,snh,nhd->td", weights / weights.sum(-1, keepdims=True), v, params["wo"])
    assert_close("attention", got[0], want, rel=1e-12)


@pytest.mark.parametrize(
    "scaling, message",
    [
        ({"kind": "yarm", "factor": 2.0}, r"attention.rope_scaling.kind: unknown 'yarm'. Did you mean 'yarn'\?"),
        ({"factor": 2.0}, r"attention.rope_scaling: kind must be given"),
        ({"kind": "yarn", "factor": 2.0}, r"kind='yarn' needs original_length"),
        ({"kind": "abf"}, r"kind='abf' needs theta"),
        ({"kind": "linear", "factor": 0.5}, r"factor: expected a number of at least 1, got 0.5"),
        ({"kind": "linear", "factr": 2.0}, r"unknown field 'factr'. Did you mean 'factor'\?"),
        ({"kind": "yarn", "original_length": 8, "ramp": "steps"}, r"ramp: expected 'dims' or 'turns', got 'steps'"),
        ({"kind": "llama3", "original_length": 8, "low_factor": 4.0}, r"expected beta_slow < beta_fast and low_factor < high_factor"),
    ],
)
def test_bad_scalings_say_what_to_do(scaling, message):
    with pytest.raises(ConfigError, match=message):
        Attention.check(Attention.Config(num_heads=2, rope_scaling=scaling), Env(d_model=16))

"""The checkpoint interval: its published values, that it is a minimum, and what the goodput formula means."""
import math

import numpy as np
import pytest

from effmodels.plan import failures

HOUR = 3600.0
# (delta, exact, Daly, Young) at M = one hour.
KNOWN = [(30.0, 444.98, 444.97, 464.8), (300.0, 1276.9, 1276.5, 1469.7), (600.0, 1699.2, 1697.7, 2078.5)]


@pytest.mark.parametrize("save, exact, daly, young", KNOWN)
def test_intervals_are_the_known_ones(save, exact, daly, young):
    assert failures.best_interval(save, HOUR) == pytest.approx(exact, abs=0.06)
    assert failures.daly_interval(save, HOUR) == pytest.approx(daly, abs=0.06)
    assert failures.young_interval(save, HOUR) == pytest.approx(young, abs=0.06)


@pytest.mark.parametrize("save", [1e-3, 1.0, 30.0, HOUR, 5 * HOUR, 40 * HOUR])
def test_the_interval_is_the_minimum_and_solves_the_equation(save):
    best = failures.best_interval(save, HOUR)
    u, ratio = best / HOUR, save / HOUR
    assert (1 - u) * math.exp(u) == pytest.approx(math.exp(-ratio), rel=1e-9)
    cost = failures.slowdown(best, save, HOUR)
    assert all(failures.slowdown(best * factor, save, HOUR) > cost for factor in (0.97, 1.03))


def test_goodput_equals_a_simulation():
    """Work in stretches of tau + delta; a failure throws the stretch away and costs a restart, during which another may come."""
    rng, save, restart, mtbf = np.random.default_rng(0), 60.0, 120.0, 1800.0
    interval = failures.best_interval(save, mtbf)
    stretches, time = 20_000, 0.0
    for _ in range(stretches):
        needed = interval + save
        while (until := rng.exponential(mtbf)) < needed:
            time += until
            needed = interval + save + restart  # the restart is repeated when it fails too
        time += needed
    assert failures.goodput(interval, save, mtbf, restart) == pytest.approx(stretches * interval / time, rel=0.02)


def test_llama_3_failed_every_three_hours_and_copies_in_memory_raise_goodput():
    run = failures.failures(16_384, 60.0, step_seconds=5.0, steps=100_000)
    assert run.mtbf_seconds / HOUR == pytest.approx(3.09, abs=0.005)
    assert 0.80 < run.goodput < run.copy_goodput < 1 and run.copy_goodput > 0.95
    assert run.days == pytest.approx(5 * 100_000 / 86_400 / run.goodput) and run.chip_hours == pytest.approx(run.days * 24 * 16_384)
    assert run.copy_chip_hours < run.chip_hours and run.interval_steps == round(run.interval / 5)


def test_the_source_of_the_rate_is_named():
    assert failures.failures(64, 60.0).source == "assumed: as H100s in arXiv:2407.21783"
    assert failures.failures(64, 60.0, mtbf_chip_hours=1e5).source == "as given"


def test_more_chips_mean_less_goodput():
    shares = [failures.failures(n, 60.0).goodput for n in (1, 64, 1024, 4096)]
    assert shares == sorted(shares, reverse=True) and shares[0] > 0.99


@pytest.mark.parametrize("save, mtbf", [(0.0, HOUR), (10.0, 0.0), (-1.0, HOUR)])
def test_times_must_be_positive(save, mtbf):
    with pytest.raises(ValueError, match="positive seconds"):
        failures.best_interval(save, mtbf)
    with pytest.raises(ValueError, match="at least one chip"):
        failures.failures(0, 10.0)

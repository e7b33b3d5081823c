"""Learning-rate values at every boundary, and exact token counts against a plain loop."""
import math

import jax
import numpy as np
import pytest

from effmodels.train.schedules import BatchRamp, LengthStages, make_schedule


def values(steps, at, **optim):
    schedule = make_schedule({"lr": 1.0, **optim}, steps)
    return [float(schedule(s)) for s in at]


def test_warmup_then_cosine():
    got = values(100, [0, 4, 9, 10, 55, 100, 1000], schedule="cosine", warmup_steps=10, final_lr_ratio=0.2)
    np.testing.assert_allclose(got, [0.1, 0.5, 1.0, 1.0, 0.6, 0.2, 0.2], rtol=1e-6)


def test_linear_and_constant():
    np.testing.assert_allclose(values(100, [0, 50, 75, 100], schedule="linear"), [1, 0.5, 0.25, 0], atol=1e-7)
    np.testing.assert_allclose(values(100, [0, 1, 2, 99], schedule="constant", warmup_steps=2), [0.5, 1, 1, 1], rtol=1e-6)


def test_wsd_tails():
    # 100 steps, the last 10 % decays: flat up to step 90.
    for shape, half in (("exponential", math.sqrt(0.04)), ("linear", 0.52), ("sqrt", 1 - 0.96 * math.sqrt(0.5))):
        got = values(100, [5, 89, 90, 95, 100], schedule="wsd", warmup_steps=5, final_lr_ratio=0.04, decay_shape=shape)
        np.testing.assert_allclose(got, [1, 1, 1, half, 0.04], rtol=1e-5)
    got = values(100, [80, 85, 90, 100], schedule="wsd", decay_steps=20, decay_half_life=5, final_lr_ratio=0)
    np.testing.assert_allclose(got, [1, 1 / 2, 1 / 4, 1 / 16], rtol=1e-5)


def test_a_schedule_can_be_traced():
    schedule = make_schedule({"lr": 3e-4, "warmup_steps": 3}, 20)
    steps = np.arange(25)
    got = jax.jit(jax.vmap(schedule))(steps)
    np.testing.assert_allclose(got, [schedule(int(s)) for s in steps], rtol=1e-6)
    assert got.dtype == np.float32


@pytest.mark.parametrize("optim, message", [
    ({"schedule": "cosin"}, "Did you mean 'cosine'"),
    ({"schedule": "wsd", "decay_shape": "linaer"}, "Did you mean 'linear'"),
    ({"warmup_steps": 11}, "between 0 and steps=10"),
    ({"schedule": "wsd", "warmup_steps": 5, "decay_steps": 6}, "more than steps=10"),
    ({"schedule": "wsd", "final_lr_ratio": 0.0}, "never reaches"),
    ({"final_lr_ratio": 2}, "between 0 and 1"),
])
def test_bad_schedules(optim, message):
    with pytest.raises(ValueError, match=message):
        make_schedule(optim, 10)


@pytest.mark.parametrize("ramp, unit, stages", [
    ((), "steps", ()),
    (((0, 4), (5, 8), (9, 16)), "steps", ()),
    (((0, 4), (7, 16)), "steps", ((0, 8), (7, 32), (11, 64))),
    (((0, 4), (100, 8), (1000, 16)), "tokens", ((0, 8), (6, 64))),
    (((0, 4), (10, 8), (11, 16)), "tokens", ()),
])
def test_totals_equal_a_loop(ramp, unit, stages):
    r = BatchRamp(16, micro_batch_size=4, seq_len=64, ramp=ramp, length_stages=stages, unit=unit)
    sequences = tokens = in_stage = 0
    stage = 0
    for step in range(40):
        length = [n for s, n in (stages or ((0, 64),)) if s <= step][-1]
        now = [i for i, (s, _) in enumerate(stages or ((0, 64),)) if s <= step][-1]
        in_stage = in_stage if now == stage else 0
        stage = now
        batch = [b for s, b in (ramp or ((0, 16),)) if s <= (step if unit == "steps" else tokens)][-1]
        got = r.consumed(step)
        assert (got.sequences, got.tokens, got.stage, got.stage_sequences) == (sequences, tokens, stage, in_stage)
        assert (r.batch_size_at(step), r.micro_batches_at(step), r.seq_len_at(step)) == (batch, batch // 4, length)
        sequences, tokens, in_stage = sequences + batch, tokens + batch * length, in_stage + batch


def test_changes_lists_every_shape():
    r = BatchRamp(16, micro_batch_size=4, seq_len=64, ramp=((0, 8), (5, 16)), length_stages=((0, 32), (9, 64)))
    assert r.changes(100) == [(0, 8, 32), (5, 16, 32), (9, 16, 64)]
    assert r.changes(9) == [(0, 8, 32), (5, 16, 32)]
    assert LengthStages(64, ((0, 32), (9, 64))).stage_at(8).seq_len == 32


@pytest.mark.parametrize("build, message", [
    (lambda: BatchRamp(16, micro_batch_size=3), "nearest: 15 or 18"),
    (lambda: BatchRamp(16, ramp=((0, 8), (5, 32)), micro_batch_size=8), "ends at batch 32, but batch_size=16"),
    (lambda: BatchRamp(16, ramp=((1, 8), (5, 16)), micro_batch_size=8), "must begin at 0"),
    (lambda: BatchRamp(16, ramp=((0, 8), (5, 8), (5, 16)), micro_batch_size=8), "rising starts"),
    (lambda: BatchRamp(16, unit="epochs"), "must be 'steps' or 'tokens'"),
    (lambda: LengthStages(64, ((0, 32),)), "ends at length 32, but seq_len=64"),
])
def test_bad_ramps(build, message):
    with pytest.raises(ValueError, match=message):
        build()

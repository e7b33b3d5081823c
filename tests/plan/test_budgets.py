"""Tokens, days and dollars against the published figures of GPT-4's training (SemiAnalysis, July 2023), and what saving takes."""
import pytest

from effmodels.plan import budgets

A100, H100 = 312e12, 989e12
ACTIVE, TOKENS = 277e9, 13e12  # 2 experts of 111B of 16, and 55B of attention


def test_flops_days_and_dollars_of_gpt4():
    """2.15e25 FLOP; 90 to 100 days on about 25,000 A100 at 32 to 36 % MFU; about $63 million at $1 an hour."""
    slow, fast = (budgets.budget(TOKENS, 6 * ACTIVE, 25_000, A100, mfu=mfu, dollars_per_chip_hour=1.0) for mfu in (0.32, 0.36))
    assert slow.flops == pytest.approx(2.15e25, rel=0.01)
    assert 88 < fast.days < 90 < slow.days < 101
    assert slow.dollars == pytest.approx(63e6, rel=0.05)
    assert slow.chip_hours == pytest.approx(slow.dollars)


def test_the_same_on_h100():
    """8,192 H100, 55 days, $21.5 million: about $2 an hour, at an MFU that this length means."""
    run = budgets.budget(TOKENS, 6 * ACTIVE, 8192, H100, seconds=55 * 86_400, dollars_per_chip_hour=2.0)
    assert run.dollars == pytest.approx(21.5e6, rel=0.01)
    assert run.mfu == pytest.approx(2.16e25 / (8192 * H100 * 55 * 86_400), rel=0.01)


def test_mfu_and_seconds_are_each_other():
    one = budgets.budget(1e12, 6e9, 64, 275e12, mfu=0.4)
    assert budgets.budget(1e12, 6e9, 64, 275e12, seconds=one.seconds).mfu == pytest.approx(0.4)
    with pytest.raises(ValueError, match="either mfu or seconds"):
        budgets.budget(1e12, 6e9, 64, 275e12)


def test_saving_in_the_background_takes_memory_and_waiting_takes_time():
    behind, waiting = (budgets.saving(64e9, 16, asynchronous=a, rate=1e9) for a in (True, False))
    assert waiting.blocked_seconds == pytest.approx(4.0) and waiting.host_bytes == 0
    assert behind.host_bytes == 4_000_000_000 and behind.blocked_seconds < 1 < waiting.blocked_seconds < behind.seconds


def test_the_input_rate_is_that_of_the_token_files():
    assert budgets.input_rate(4_000_000, 2.0, 50_000) == 4e6
    assert budgets.input_rate(4_000_000, 2.0, 100_000) == 8e6

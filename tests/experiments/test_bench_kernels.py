"""The kernel benchmark: work counted by hand, contestants compute the same function, reports and refusals."""
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from effmodels.plan import chips
from experiments.kernels import cases, contestants, report, timed
from tests.numerics import assert_close

SMALL = {
    "flash_attention": (("B", 1), ("T", 64), ("N", 2), ("H", 16), ("causal", 1), ("window", 9)),
    "retention": (("B", 1), ("T", 64), ("N", 2), ("H", 16), ("P", 8)),
    "grouped_matmul": (("M", 64), ("D", 8), ("F", 16), ("E", 4), ("ragged", 1)),
    "linear_cross_entropy": (("T", 64), ("D", 8), ("V", 32)),
}


@pytest.mark.parametrize("op, flops", [
    ("flash_attention", 2 * 2 * (sum(min(t + 1, 10) for t in range(64))) * (16 + 16)),
    ("grouped_matmul", 2 * 64 * 8 * 16),
    ("linear_cross_entropy", 2 * 64 * 8 * 32),
    ("retention", 2 * 64 * 2 * (256 / 2 * (16 + 8) + 2 * 16 * 8)),
])
def test_work_is_counted_as_by_hand(op, flops):
    assert cases.Case(op, "forward", SMALL[op]).flops() == pytest.approx(flops)


def test_bytes_are_operands_and_result_once():
    case = cases.Case("linear_cross_entropy", "forward", SMALL["linear_cross_entropy"])
    assert case.bytes() == 64 * 8 * 2 + 8 * 32 * 2 + 64 * 4 + 64 * 4


@pytest.mark.parametrize("op", SMALL)
def test_contestants_on_a_cpu_compute_the_same(op):
    case = cases.Case(op, "backward", SMALL[op], "float32")
    names = [n for n in contestants.CONTESTANTS[op] if n not in (*contestants.TPU_ONLY, *contestants.GPU_ONLY)]
    assert len(names) >= 2
    results = {n: jax.jit(contestants.build(n, case)[0])(*timed.inputs(case)) for n in names}
    for name in names[1:]:
        for got, want in zip(*(jax.tree.leaves(results[n]) for n in (name, names[0]))):
            assert_close(name, got, want, rel=2e-5, floor=1e-4)


def test_a_report_relates_every_contestant_to_ours(tmp_path):
    case = cases.Case("grouped_matmul", "forward", SMALL["grouped_matmul"])
    peak = chips.Peak(1e12, 1e12)
    rows = report.add_ratios([
        report.row(case, "xla", peak, {"milliseconds": 2.0}),
        report.row(case, "jax ragged_dot", peak, {"milliseconds": 5.0}),
        report.row(case, "jax megablox", peak, error="needs a TPU"),
    ])
    assert [r.get("ratio") for r in rows] == [1.0, 2.5, None]
    assert rows[0]["roofline_share"] == pytest.approx(max(case.flops(), case.bytes()) / 1e12 * 1e3 / 2.0, abs=1e-3)
    assert "needs a TPU" in "\n".join(report.lines(rows))
    report.write(tmp_path / "a" / "b.json", {"what": "a test"}, rows)
    assert json.loads((tmp_path / "a" / "b.json").read_text())["rows"][1]["ratio"] == 2.5
    report.plot(tmp_path / "b.png", {"what": "a test"}, rows)
    assert (tmp_path / "b.png").stat().st_size > 1000


def test_time_as_a_power_of_length():
    assert timed.slope([1024, 2048, 4096], [1.0, 2.0, 4.0]) == pytest.approx(1.0)
    assert timed.slope([1024, 2048, 4096], [1.0, 4.0, 16.0]) == pytest.approx(2.0)


def test_uneven_groups_have_an_empty_one_and_leave_rows_over():
    sizes = cases.group_sizes(M=8192, E=8, ragged=1)
    assert sizes.min() == 0 and sizes.sum() < 8192 and np.unique(sizes).size > 3
    assert (cases.group_sizes(M=8192, E=8) == 1024).all()


@pytest.mark.subprocess
@pytest.mark.parametrize("arguments, message", [
    (["kernels", "--ops=flash"], "error: --ops: flash unknown; expected some of flash_attention, retention"),
    (["kernels", "--directions=sideways"], "error: --directions: sideways unknown; expected some of forward, backward"),
    (["train"], "error: bench train needs --config, for example --config=configs/reference_8m.py"),
    (["kernel"], "error: expected one benchmark, 'train' or 'kernels', got ['kernel']"),
])
def test_mistakes_end_in_one_sentence(arguments, message):
    result = subprocess.run([sys.executable, "-m", "experiments.bench", *arguments], capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.strip().splitlines()[-1].startswith(message)

"""Rates by a hand-driven clock, the console line, JSONL over a resume, TensorBoard read back where it is installed."""
import doctest
import json
import sys

import numpy as np
import pytest

from effmodels.train import metrics
from effmodels.train.metrics import Metrics, Throughput, format_line, peak_flops


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_rates_count_finished_steps_and_no_pauses():
    clock = Clock()
    rate = Throughput(clock)
    assert rate.report() == {}
    clock.now += 4
    rate.add(tokens=1000)
    first = rate.report(flops_per_token=6, peak=1e3, devices=2, steps_left=9, tokens_per_step=1000)
    assert first == {"tokens_per_s": 250, "step_s": 4, "flops_per_s": 1500, "mfu": 0.75, "eta_s": 36}
    clock.now += 1
    rate.add(tokens=1000)
    rate.pause()
    clock.now += 50
    rate.resume()
    clock.now += 1
    rate.add(tokens=1000)
    rate.pause()
    clock.now += 50
    # Two steps in two seconds; the ETA forgets the slow first report, and the steps left have twice the tokens.
    assert rate.report(steps_left=7, tokens_per_step=2000) == {"tokens_per_s": 1000, "step_s": 1, "eta_s": 14}
    rate.resume()
    assert rate.report() == {}


@pytest.mark.parametrize("kind, peak", [
    ("TPU v4", 275e12), ("TPU v5 lite", 197e12), ("TPU v5e", 197e12), ("TPU v5p", 459e12), ("TPU v5", 459e12), ("TPU v6 lite", 918e12),
    ("TPU v6e", 918e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H200", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("cpu", None),
])
def test_peaks(kind, peak):
    assert peak_flops(kind) == peak


def test_the_line():
    record = {"loss": 2.5, "bits_per_byte": 1.25, "lr": 3e-4, "grad_norm": 1.0, "tokens_per_s": 98765.4, "flops_per_s": 1.234e10,
              "moe_max_violation": [0.1, 0.75], "moe_drop_fraction": [0.0, 0.02], "eta_s": 7500, "unknown": "x"}
    assert format_line(7, record, 1000) == ("step    7/1000 | loss 2.5000 | 1.250 bits/byte | lr 3.00e-04 | grad 1.00 | 98,765 tok/s | "
                                            "12.3 GFLOP/s | MoE MaxVio 0.75, dropped 0.02 | ETA 2h05m")
    assert format_line(7, {"loss": float("nan")}) == "step 7 | loss nan"
    assert doctest.testmod(metrics).failed == 0
    assert [metrics.duration(s) for s in (8, 75, 90000)] == ["8s", "1m15s", "1d01h"]


def test_records_after_the_resumed_step_are_dropped(tmp_path):
    lines = []
    m = Metrics(tmp_path, tensorboard=False, total_steps=9, log=lines.append)
    for step in (2, 4, 6):
        m.write(step, {"loss": np.float32(step), "load": np.arange(2), "bad": float("inf"), "seen": 10**12})
    m.write(6, {"eval_loss": 1.0}, console=False)
    assert len(lines) == 3
    m.close()
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 7, "lo')  # killed in mid-write
    assert [r["step"] for r in metrics.read(tmp_path)] == [2, 4, 6, 6]
    m = Metrics(tmp_path, tensorboard=False, resume_step=4, log=lines.append)
    m.write(5, {"loss": 5.0})
    got = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in got] == [2, 4, 5]
    assert got[0] == {"step": 2, "loss": 2.0, "load": [0, 1], "bad": "inf", "seen": 10**12}


def test_tensorboard_is_optional_and_said_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)
    lines = []
    Metrics(tmp_path, log=lines.append).close()
    assert lines == ["TensorBoard files are not written: pip install tensorboard (metrics.jsonl has everything)"]
    with pytest.raises(ImportError, match="pip install tensorboard"):
        Metrics(tmp_path, tensorboard=True)
    with pytest.raises(ValueError, match="must be 'auto', True or False"):
        Metrics(tmp_path, tensorboard="yes")


def test_tensorboard_scalars_read_back(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    m = Metrics(tmp_path, tensorboard=True, log=lambda _: None)
    for step in (1, 2, 3, 4):
        m.write(step, {"loss": 1.0 / step, "load": [0.25, 0.75], "name": "x"})
    m.close()
    Metrics(tmp_path, tensorboard=True, resume_step=2, log=lambda _: None).close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, round(e.value, 4)) for e in events.Scalars("loss")][:2] == [(1, 1.0), (2, 0.5)]
    assert events.Scalars("load/01")[0].value == 0.75

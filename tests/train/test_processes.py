"""Real processes, joined by jax.distributed over gloo: the same losses as one process, a clean stop that all agree on, resumption by
another number of processes, and one sentence when somebody does not come."""
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from effmodels import simulated
from effmodels.config import ConfigError
from effmodels.parallel import distributed

pytestmark = pytest.mark.subprocess
TINY = (
    "--config=configs/quickstart.py:test", "--config.steps=3", "--config.checkpoint.every_steps=3", "--config.eval.every_steps=3",
    "--config.model.compute_dtype=float32", "--config.eval.sample_tokens=0",
)  # fmt: skip


def launch(workdir, processes, devices, *flags):
    """The processes of one run, each with `devices` simulated devices; stdout and stderr of process i go to <workdir>.i.log."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    environment = os.environ | simulated.environment(devices)
    started = []
    for i in range(processes):
        join = [f"--config.distributed.coordinator=localhost:{port}", f"--config.distributed.num_processes={processes}",
                f"--config.distributed.process_id={i}"]  # fmt: skip
        command = [sys.executable, "-m", "experiments.train", f"--workdir={workdir}", *flags, *(join if processes > 1 else [])]
        with open(f"{workdir}.{i}.log", "w") as log:
            started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    return started


def run(workdir, processes, devices, *flags, timeout=420):
    """Losses by step of a finished run; fails with the log of the process that failed."""
    started = launch(workdir, processes, devices, *flags)
    try:
        codes = [p.wait(timeout) for p in started]
    finally:
        for p in started:
            p.kill()
    for i, code in enumerate(codes):
        assert code == 0, open(f"{workdir}.{i}.log").read()[-3000:]
    return losses(workdir)


def losses(workdir):
    records = [json.loads(line) for line in open(f"{workdir}/metrics.jsonl")]
    return {r["step"]: r["loss"] for r in records if "loss" in r}


@pytest.mark.slow(always=True)
def test_two_processes_train_to_the_losses_of_one(tmp_path):
    """Rows over both processes, and a split sequence whose halves they hold together: the mesh decides who reads what."""
    one = run(tmp_path / "one", 1, 4, *TINY, "--config.mesh.data=4")
    two = run(tmp_path / "two", 2, 2, *TINY, "--config.mesh.data=4")
    assert one.keys() == two.keys() and len(one) == 3
    assert max(abs(one[s] - two[s]) / one[s] for s in one) < 1e-6
    assert "memory budget" in open(tmp_path / "two.0.log").read()
    assert "step 1" not in open(tmp_path / "two.1.log").read(), "only process 0 reports"


@pytest.mark.slow
def test_a_tensor_axis_across_processes_reads_every_row_once(tmp_path):
    one = run(tmp_path / "one", 1, 4, *TINY, "--config.mesh.data=2", "--config.mesh.tensor=2")
    two = run(tmp_path / "two", 4, 1, *TINY, "--config.mesh.data=2", "--config.mesh.tensor=2")
    assert max(abs(one[s] - two[s]) / one[s] for s in one) < 1e-6


def assert_equal_losses(one, other):
    assert one.keys() == other.keys() and max(abs(one[s] - other[s]) / one[s] for s in one) < 1e-6, (one, other)


@pytest.mark.slow
def test_four_processes_train_the_small_moe_to_the_loss_of_one_and_another_number_resumes(tmp_path, monkeypatch):
    """In float64: in float32 the order of sums over processes sends a token with two equal experts to the other one (5e-6 of the loss)."""
    monkeypatch.setenv("JAX_ENABLE_X64", "1")
    flags = ("--config=configs/moe_1b.py:small", "--config.steps=6", "--config.optim.warmup_steps=2", "--config.checkpoint.every_steps=3",
             "--config.log.every_steps=1", "--config.eval.every_steps=6", "--config.eval.sample_tokens=0",
             "--config.model.param_dtype=float64", "--config.model.compute_dtype=float64")  # fmt: skip
    one = run(tmp_path / "one", 1, 4, *flags, timeout=900)
    four = run(tmp_path / "four", 4, 1, *flags, timeout=900)
    assert len(one) == 6
    assert_equal_losses(one, four)
    checkpoints = sorted(int(p.name) for p in (tmp_path / "four" / "checkpoints").iterdir())
    assert checkpoints == [3, 6]
    for step in checkpoints[1:]:  # back to step 3, and on with two processes
        subprocess.run(["rm", "-r", str(tmp_path / "four" / "checkpoints" / str(step))], check=True)
    again = run(tmp_path / "four", 2, 2, *flags, timeout=900)
    assert "resumed step 3" in open(tmp_path / "four.0.log").read()
    assert_equal_losses(one, again)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_one_step(tmp_path):
    workdir = tmp_path / "run"
    forever = [f"--config.{field}=100000" for field in ("steps", "eval.every_steps", "checkpoint.every_steps")]
    started = launch(workdir, 2, 1, *TINY, *forever)
    try:
        deadline = time.time() + 300
        while not ((workdir / "metrics.jsonl").exists() and losses(workdir)):
            assert time.time() < deadline and all(p.poll() is None for p in started), open(f"{workdir}.0.log").read()[-2000:]
            time.sleep(0.5)
        started[1].send_signal(signal.SIGTERM)
        assert [p.wait(180) for p in started] == [0, 0], open(f"{workdir}.0.log").read()[-2000:]
    finally:
        for p in started:
            p.kill()
    text = open(f"{workdir}.0.log").read()
    assert "all 2 processes save and stop after step" in text and "the same command resumes" in text
    assert len(list((workdir / "checkpoints").iterdir())) == 1


def test_a_process_that_does_not_come_is_one_sentence_with_the_address(tmp_path):
    started = subprocess.run(
        [sys.executable, "-m", "experiments.train", f"--workdir={tmp_path}", *TINY, "--config.distributed.coordinator=localhost:1",
         "--config.distributed.num_processes=2", "--config.distributed.process_id=1", "--config.distributed.timeout=3"],
        capture_output=True, text=True, timeout=120, env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert started.returncode == 1
    lines = [line for line in started.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "process 1 of 2 waited 3 s at localhost:1" in lines[0] and "Traceback" not in started.stderr


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"mode": "maybe"}, "distributed.mode: expected one of auto, on, off"),
        ({"coordinator": "a:1"}, "needs distributed.num_processes and distributed.process_id"),
        ({"num_processes": 2, "process_id": 0}, "without a coordinator; give distributed.coordinator=host:port"),
        ({"coordinator": "a", "num_processes": 2, "process_id": 0}, "expected host:port, got 'a'"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, r"process_id=2 must be in 0 \.\. 1"),
        ({"timeout": 0}, "timeout: expected at least one second"),
        ({"cordinator": "a:1"}, "Did you mean 'coordinator'"),
    ],
)
def test_a_wrong_block_is_refused_before_anything_starts(fields, message):
    with pytest.raises(ConfigError, match=message):
        distributed.start(fields)


def test_a_tpu_joins_its_pod_and_one_without_a_pod_stays_alone(monkeypatch):
    asked = []

    def initialize(*args, **kwargs):
        asked.append(args)
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(distributed, "tpu_is_here", lambda: True)
    monkeypatch.setattr(distributed.jax.distributed, "initialize", initialize)
    assert distributed.start({}) is False and asked == [(None, None, None)]
    with pytest.raises(ConfigError, match=r"distributed.mode='on': jax finds no cluster here .* give distributed.coordinator"):
        distributed.start({"mode": "on"})
    assert distributed.start({"mode": "off"}) is False and len(asked) == 2
    monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda *args, **kwargs: None)
    assert distributed.start({}) is True


def test_a_pod_whose_processes_have_not_joined_is_refused(monkeypatch):
    distributed.check_joined()
    monkeypatch.setattr(distributed.jax, "process_count", lambda: 4)
    with pytest.raises(ConfigError, match="belong to 4 processes that have not joined; set distributed.mode=on"):
        distributed.check_joined()


@pytest.mark.parametrize(
    "variables, several",
    [({}, False), ({"SLURM_STEP_NUM_TASKS": "1"}, False), ({"SLURM_STEP_NUM_TASKS": "4"}, True), ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
     ({"TPU_WORKER_HOSTNAMES": "localhost"}, False), ({"TPU_WORKER_HOSTNAMES": "a,b"}, True), ({"JAX_COORDINATOR_ADDRESS": "a:1"}, True)],
)  # fmt: skip
def test_what_the_surroundings_say(variables, several, monkeypatch):
    for name in (*distributed._COUNTS, "TPU_WORKER_HOSTNAMES", "JAX_COORDINATOR_ADDRESS", "MEGASCALE_COORDINATOR_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert distributed.several_processes() is several

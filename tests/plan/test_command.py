"""The command: its answer, its files, its exit status, its mistakes in one sentence."""
import json
import subprocess
import sys

import pytest

from effmodels.plan import records

pytestmark = pytest.mark.subprocess


def run(*flags, config="configs/quickstart.py:test"):
    command = [sys.executable, "-m", "experiments.plan", f"--config={config}", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=280)


def test_a_fast_plan_with_its_files_and_a_status(tmp_path):
    flags = ["--topology=v4:2x2x1", "--fast", "--mesh=fsdp=2,tensor=2", f"--json={tmp_path}/p.json", f"--html={tmp_path}/p.html"]
    done = run(*flags, "--require_fit", "--min_mfu=0.99")
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith("configs/quickstart.py:test, one training step (256 tokens) on v4:2x2x1: 4 chips")
    assert "FITS" in done.stdout and "below --min_mfu=99.0%" in done.stdout
    plan = records.from_json(json.loads((tmp_path / "p.json").read_text()))
    assert plan.mesh["fsdp"] == plan.mesh["tensor"] == 2 and plan.fits and plan.method == "fast"
    assert "v4:2x2x1" in (tmp_path / "p.html").read_text()
    again = run("--topology=v4:2x2x1", "--fast", "--notables", "--require_fit", f"--compare={tmp_path}/p.json")
    assert again.returncode == 0, again.stderr
    assert len(again.stdout.splitlines()) < 60


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--topology=v4:3x3x1"], "error: topology 'v4:3x3x1': a host of v4 has 2x2x1 chips, which does not divide 3x3x1; the"),
        (["--topology=v4:2x2x1", "--mesh=fsdp:4"], "error: --mesh=fsdp:4: expected sizes as in data=8,fsdp=16."),
    ],
)
def test_mistakes(flags, message):
    done = run(*flags, "--fast")
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].startswith(message)

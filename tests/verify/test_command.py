"""The command: its exit status, its table, its JSON; simulated devices whatever the shell says."""
import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(*flags):
    command = [sys.executable, "-m", "experiments.verify", "--config=configs/quickstart.py:test", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)


@pytest.mark.subprocess
def test_a_mistake_is_one_sentence():
    done = run("--config.mesh.tensor=3")
    assert done.returncode == 1 and "error: mesh:" in done.stderr and "but 8 are here" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.subprocess
@pytest.mark.slow
def test_table_json_and_status(tmp_path):
    done = run("--devices=4", "--checks=update,resume", f"--json={tmp_path / 'found.json'}", "--config.mesh.fsdp=2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 x cpu, mesh data=2, fsdp=2" in done.stdout and "2 of 2 checks passed" in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["passed"] and [o["check"] for o in found["outcomes"]] == ["update", "resume"] and found["setting"]["mesh"]["fsdp"] == 2

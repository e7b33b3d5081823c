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
    made = records.from_json(json.loads((tmp_path / "p.json").read_text()))
    assert made.mesh["fsdp"] == made.mesh["tensor"] == 2 and made.fits and made.method == "fast"
    assert "v4:2x2x1" in (tmp_path / "p.html").read_text()
    dashes = ["--require-fit", "--min-mfu=0.4", "--no-tables"]
    again = run("--topology=v4:2x2x1", "--fast", *dashes, f"--compare={tmp_path}/p.json")
    assert again.returncode == 1 and "below --min_mfu=40.0%" in again.stdout and "does not fit" not in again.stdout, again
    assert "Time and bytes by layer kind" not in again.stdout
    assert len(again.stdout.splitlines()) < 60


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--topology=v4:3x3x1"], "error: topology 'v4:3x3x1': a host of v4 has 2x2x1 chips, which does not divide 3x3x1; the"),
        (["--topology=v4:2x2x1", "--mesh=fsdp:4"], "error: --mesh=fsdp:4: expected sizes as in data=8,fsdp=16."),
        (["--topology=v4:2x2x1", "--search", "--what=decode"], "error: --search looks for settings of training, not of --what=decode;"),
        (["--topology=v4:2x2x1", "--search", "--memory"], "error: --search compares times, which --memory does not estimate;"),
        (["--topology=v4:2x2x1", "--json=no/such/folder/p.json"], "error: --json=no/such/folder/p.json: this file cannot be written;"),
        (["--topology=v4:2x2x1", "--png=."], "error: --png"),
    ],
)
def test_mistakes_are_told_before_anything_is_planned(flags, message):
    done = run(*flags)
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].startswith(message) and not done.stdout


# A compiler that gives only memory at level O0, and otherwise breaks.
NO_COMPILER = """
import runpy, sys
from effmodels.plan.compiling import program
from effmodels.plan.schedule import dump
from tests.plan import plans

def plan(config, place, *, level=None, **more):
    if level:
        return plans.memory_only()
    raise dump.CompilerError("it broke")

program.plan = plan
sys.argv[0] = "plan"
runpy.run_module("experiments.plan", run_name="__main__")
"""


def run_without_compiler(*flags):
    command = [sys.executable, "-c", NO_COMPILER, "--config=configs/quickstart.py:test", "--notables", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=280)


def test_without_an_estimate_there_is_no_mfu_to_compare():
    done = run_without_compiler("--topology=v4:2x2x1", "--memory", "--min_mfu=0.4")
    assert done.returncode == 1 and done.stdout.endswith("status 1: there is no estimate of the MFU to compare with --min_mfu.\n"), done


def test_a_search_answers_in_closed_form_first_and_goes_on_when_the_compiler_breaks():
    done = run_without_compiler("--topology=v4:2x2x1", "--search", "--search_seconds=6", "--config.model.num_layers=1")
    assert done.returncode == 0 and "closed form, nothing compiled" in done.stdout, done
    assert "those that fit, fastest first:\n  none\n" in done.stdout and "smallest slice on which it fits: v4:1x1x1" in done.stdout
    dropped, left = (done.stdout.count(text) for text in ("dropped, it does not compile: it broke", " (closed form): --config."))
    # As many as six seconds allow, ten at most.
    assert 0 < dropped + left <= 10 and (not left or "by formula only, not confirmed by the compiler:\n" in done.stdout)

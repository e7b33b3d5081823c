"""docs/plans: every entry of plans.toml is a plan that can be typed, and its report is what `experiments.plans` would write."""
import json
import subprocess
import sys
import tomllib

import pytest

from effmodels.plan import records, topology
from tests.configs.catalogue import ROOT

FOLDER = ROOT / "docs" / "plans"
PLANS = tomllib.loads((FOLDER / "plans.toml").read_text())
MADE = [name for name in PLANS if (FOLDER / f"{name}.json").exists()]


@pytest.mark.parametrize("name", PLANS)
def test_an_entry_names_what_exists(name):
    entry = PLANS[name]
    assert (ROOT / entry["config"]).exists() and topology.parse(entry["topology"]).chips > 1
    assert all(flag.startswith(("--mesh=", "--config.")) for flag in entry["flags"]) and 0 < entry["reach"] < 1
    assert f"{name}" in (FOLDER / "README.md").read_text()


@pytest.mark.parametrize("name", MADE)
def test_a_report_belongs_to_its_entry(name):
    plan, entry = records.from_json(json.loads((FOLDER / f"{name}.json").read_text())), PLANS[name]
    text = (FOLDER / f"{name}.txt").read_text()
    assert plan.fits and plan.method == "compiled" and plan.operations
    assert (plan.config, plan.topology) == (entry["config"], entry["topology"])
    assert all(flag in text for flag in entry["flags"]), "plans.toml was changed after the report was made"
    assert f"{plan.mfu:.1%}" in (FOLDER / "README.md").read_text()


def test_the_example_of_the_document_is_a_report():
    report = (FOLDER / "dense_65b-v4-1024.txt").read_text()
    screen = report[report.index("configs/dense_65b.py, one"):report.index("\nTime and bytes by layer kind")].rstrip()
    assert f"```\n{screen}\n```" in (ROOT / "docs" / "plan.md").read_text()


@pytest.mark.slow
@pytest.mark.subprocess
@pytest.mark.parametrize("name", PLANS)
def test_the_closed_form_fits_too(name):
    entry = PLANS[name]
    command = [sys.executable, "-m", "experiments.plan", f"--config={entry['config']}", f"--topology={entry['topology']}", *entry["flags"]]
    done = subprocess.run([*command, "--fast", "--require_fit", "--notables"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]

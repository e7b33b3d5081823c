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
    assert all(flag.startswith(("--mesh=", "--config.", "--what=")) for flag in entry["flags"]) and 0 < entry.get("reach", 0.5) < 1
    assert f"{name}" in (FOLDER / "README.md").read_text()


@pytest.mark.parametrize("name", MADE)
def test_a_report_belongs_to_its_entry(name):
    plan, entry = records.from_json(json.loads((FOLDER / f"{name}.json").read_text())), PLANS[name]
    text = (FOLDER / f"{name}.txt").read_text()
    assert plan.fits and plan.method == "compiled" and plan.operations
    assert (plan.config, plan.topology) == (entry["config"], entry["topology"])
    assert all(flag in text for flag in entry["flags"]), "plans.toml was changed after the report was made"
    assert f"{plan.mfu:.1%}" in (FOLDER / "README.md").read_text()


def made(name):
    if name not in MADE:
        pytest.skip(f"{name} is not planned yet")
    return records.from_json(json.loads((FOLDER / f"{name}.json").read_text()))


def test_retention_takes_as_long_per_token_at_any_length():
    """8,192 to 1,048,576 tokens: as many tokens a chip and a step, the same chips, the same remat; only how many rows they are differs."""
    plans = [made(f"retnet_6p7b-{length}-v4-512") for length in ("8k", "128k", "1m")]
    assert len({(plan.tokens, plan.chips) for plan in plans}) == 1
    seconds = [plan.seconds for plan in plans]
    assert max(seconds) <= 1.1 * min(seconds), seconds


def test_a_longer_context_hides_what_goes_round_the_ring():
    plan = made("gpt4_moe_1p8t-32k-v4-4096")
    ring = [o for o in plan.operations if o.collective == "collective-permute" and "parallel/ring.py" in o.source]
    wire, exposed = (sum(getattr(o, what) * o.calls for o in ring) for what in ("seconds", "exposed"))
    assert sum(o.calls for o in ring) > 120 * 15 and wire > 0.01 * plan.seconds  # it is there
    assert exposed < 0.1 * wire and exposed < 0.01 * plan.seconds, (wire, exposed)


def test_a_pipeline_idles_as_long_as_its_schedule_says():
    plan = made("gpt4_moe_1p8t-v4-3840")
    p, m, rounds = plan.mesh["stage"], 32, 8
    assert plan.bubble == pytest.approx((p - 1) / (m * rounds + p - 1))


def test_the_example_of_the_document_is_a_report():
    report = (FOLDER / "dense_65b-v4-1024.txt").read_text()
    screen = report[report.index("configs/dense_65b.py, one"):report.index("\nTime and bytes by layer kind")].rstrip()
    assert f"```\n{screen}\n```" in (ROOT / "docs" / "plan.md").read_text()


@pytest.mark.slow
@pytest.mark.subprocess
@pytest.mark.parametrize("name", PLANS)
def test_the_closed_form_fits_too(name, tmp_path):
    """And is near the compiled plan where there is one: docs/plan.md states the band, which other chips than v4 have not."""
    entry, file = PLANS[name], tmp_path / "plan.json"
    command = [sys.executable, "-m", "experiments.plan", f"--config={entry['config']}", f"--topology={entry['topology']}", *entry["flags"]]
    more = ["--fast", "--require-fit", "--no-tables", f"--json={file}"]
    done = subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    if name in MADE:
        compiled, formula = (records.from_json(json.loads(f.read_text())) for f in (FOLDER / f"{name}.json", file))
        assert formula.model_flops == compiled.model_flops
        assert formula.memory.total == pytest.approx(compiled.memory.total, rel=0.11)
        if compiled.chip == "v4":
            assert 0.75 < formula.seconds / compiled.seconds < 1.1, (formula.seconds, compiled.seconds)

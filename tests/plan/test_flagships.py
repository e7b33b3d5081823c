"""docs/plans: every entry of plans.toml is a plan that can be typed, and its report is what `experiments.plans` would write."""
import ast
import collections
import functools
import importlib
import json
import subprocess
import sys
import tomllib

import pytest

from effmodels.plan import records, topology
from effmodels.plan.compiling import program
from effmodels.plan.formulas import closed_form
from tests.configs.catalogue import ROOT

FOLDER = ROOT / "docs" / "plans"
PLANS = tomllib.loads((FOLDER / "plans.toml").read_text())


@pytest.mark.parametrize("name", PLANS)
def test_an_entry_names_what_exists(name):
    entry = PLANS[name]
    assert (ROOT / entry["config"]).exists() and topology.parse(entry["topology"]).chips > 1
    assert all(flag.startswith(("--mesh=", "--config.", "--what=")) for flag in entry["flags"]) and 0 < entry.get("reach", 0.5) < 1
    assert f"{name}" in (FOLDER / "README.md").read_text()


@pytest.mark.parametrize("name", PLANS)
def test_a_report_belongs_to_its_entry(name):
    plan, entry = made(name), PLANS[name]
    text = (FOLDER / f"{name}.txt").read_text()
    assert plan.fits and plan.method == "compiled" and plan.operations
    assert (plan.config, plan.topology) == (entry["config"], entry["topology"])
    assert all(flag in text for flag in entry["flags"]), "plans.toml was changed after the report was made"
    assert f"{plan.mfu:.1%}" in (FOLDER / "README.md").read_text()


def made(name):
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


# Bytes of these differ by more than 5 % from the program's: (at least, at most) the closed form over it.
ELSEWHERE = {
    ("moe_1b-v4-4", "fsdp"): (1.12, 1.16),  # unrolled: what the forward pass gathers is gathered once for all micro-batches
    ("moe_1b-v5e-8", "fsdp"): (1.12, 1.16),  # the same
    ("dense_65b-v4-64", "fsdp"): (1.05, 1.08),  # half of what attention's gradients would gather is there from its recomputation
    ("retnet_6p7b-1m-v4-512", "fsdp"): (0.88, 0.92),  # three quarters of what retention gathers again is gathered for its gradients too
    ("gpt4_moe_1p8t-v4-3840", "fsdp+expert"): (0.5, 0.7),  # XLA made matmuls with gathered operands into windowed ones, of permutes
    ("gpt4_moe_1p8t-v4-3840", "tensor"): (0.4, 0.6),  # the same, and whole sums where a part is kept (expert.py's psum)
    ("ring_flash_linear_2-32k-v4-512", "data+fsdp+expert+seq"): (0.55, 0.7),  # gathers over all chips are sums of zeros and a part
    ("ring_flash_linear_2-128k-v4-512", "fsdp+expert+seq"): (0.55, 0.7),
    ("ring_flash_linear_2-decode-v4-512", "expert"): (0.05, 0.15),  # the record counts room for the worst case, of which little travels
}
# Memory of these differs by more than 10 %, likewise.
MEMORY = {
    "moe_1b-v5e-8": (0.84, 0.9),  # unrolled layers for v5e: more is alive at once than one layer's working set
    "ring_flash_linear_2-4k-v4-512": (1.1, 1.14),  # the formula follows gates and inputs apart, the program has joined them
    "ring_flash_linear_2-32k-v4-512": (1.1, 1.14),
    "ring_flash_linear_2-128k-v4-512": (1.1, 1.14),
}
QUICK = ("dense_65b-v4-1024", "gpt4_moe_1p8t-60m-v4-4096")


@functools.cache
def formula(name):
    """The closed form's Plan of an entry."""
    entry, mesh, what = PLANS[name], None, "train"
    path, _, arg = entry["config"].removesuffix(".py").partition(":")
    config = importlib.import_module(path.replace("/", ".")).get_config(*([arg] if arg else []))
    for flag in entry["flags"]:
        key, _, text = flag.removeprefix("--").partition("=")
        if key == "mesh":
            mesh = {axis: int(size) for axis, size in (pair.split("=") for pair in text.split(","))}
        elif key == "what":
            what = text
        else:
            try:
                value = ast.literal_eval(text)
            except (SyntaxError, ValueError):
                value = text
            *parts, last = key.split(".")[1:]
            functools.reduce(lambda fields, part: fields[part], parts, config)[last] = value
    return closed_form.plan(program.as_mapping(config, mesh), topology.parse(entry["topology"]), what=what)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in PLANS])
def test_the_closed_form_sends_what_the_program_sends(name):
    """Bytes per mesh axis within 5 %, of axes that carry a thousandth of all; what is not is listed, so that the list stays true."""
    sent = [collections.Counter(), collections.Counter()]
    for plan, found in zip((formula(name), made(name)), sent):
        for o in plan.operations:
            if o.kind == "collective":
                found["+".join(o.axes)] += o.calls * o.bytes
    for over in {*sent[0], *sent[1]}:
        got, want = (found[over] for found in sent)
        if max(got, want) > 1e-3 * sum(sent[1].values()):
            least, most = ELSEWHERE.get((name, over), (0.95, 1.05))
            assert want and least < got / want < most, (over, got, want)


@pytest.mark.slow
@pytest.mark.subprocess
@pytest.mark.parametrize("name", PLANS)
def test_the_closed_form_fits_too(name, tmp_path):
    """And is near the compiled plan: docs/plan.md states the band, which other chips than v4 have not."""
    entry, file = PLANS[name], tmp_path / "plan.json"
    command = [sys.executable, "-m", "experiments.plan", f"--config={entry['config']}", f"--topology={entry['topology']}", *entry["flags"]]
    more = ["--fast", "--require-fit", "--no-tables", f"--json={file}"]
    done = subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    compiled, closed = (records.from_json(json.loads(f.read_text())) for f in (FOLDER / f"{name}.json", file))
    assert closed.model_flops == compiled.model_flops
    least, most = MEMORY.get(name, (0.9, 1.1))
    assert least < closed.memory.total / compiled.memory.total < most
    if compiled.what == "decode":
        moved = [sum(o.calls * o.bytes for o in p.operations if o.kind != "collective") for p in (closed, compiled)]
        assert moved[0] == pytest.approx(moved[1], rel=0.1)
    elif compiled.chip == "v4":
        least = 0.4 if compiled.mesh["stage"] > 1 else 0.6 if "moe" in {o.layer for o in compiled.operations} else 0.9
        assert least < closed.seconds / compiled.seconds < 1.1, (closed.seconds, compiled.seconds)

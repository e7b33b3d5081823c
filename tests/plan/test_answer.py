"""The one-screen answer: what it says first, its figures, its size, whatever the plan."""
import dataclasses
import re

import ml_collections
import pytest

from configs import common
from effmodels.plan import budgets, failures
from effmodels.plan.report import advice, answer, binds
from tests.plan import plans

LONG = "configs/a_config_whose_name_is_much_longer_than_that_of_any_that_is_shipped_here.py:with_an_argument_too"


def line(text, label):
    """What stands behind a label, its continuation lines joined."""
    found = re.search(rf"^{label} +(.*(?:\n {{12}}.*)*)", text, re.MULTILINE)
    assert found, f"no {label!r} in\n{text}"
    return " ".join(found[1].split())


def extras(plan):
    saving = budgets.saving(plan.checkpoint_bytes, plan.chips // 4)
    step = dict(step_seconds=plan.seconds, steps=plan.steps)
    return dict(saving=saving, failures=failures.failures(plan.chips, saving.blocked_seconds, **step))


@pytest.mark.parametrize("make", plans.ALL)
def test_one_screen(make):
    lines = answer.text(make()).split("\n")
    assert len(lines) <= answer.HEIGHT and max(map(len, lines)) <= answer.WIDTH
    assert re.match("FITS|DOES NOT FIT|NEEDS", lines[lines.index("") + 1])
    assert not any(re.search(r"\bnan\b|\binf\b|None|\{|\(\)", line) for line in lines)


def test_one_screen_of_all_there_is_to_say():
    """A long name, a pipeline, every extra, many notes: still 24 lines, none cut in a sentence, and a hint at the notes left out."""
    notes = tuple(f"Note {i}: " + "many words that a reader may want to know about this plan " * 2 for i in range(5))
    plan = plans.large(
        config=LONG, bubble=0.04, imbalance=0.02, slices=4, notes=notes, mesh=dict.fromkeys(("data", "fsdp", "seq", "stage"), 4)
    )
    lines = answer.text(plan, budget=budgets.of_plan(plan, plan.peak_flops, 1.5), **extras(plan)).split("\n")
    assert len(lines) <= answer.HEIGHT and max(map(len, lines)) <= answer.WIDTH
    assert lines[-1].endswith(".")
    few = answer.text(dataclasses.replace(plans.decode(), notes=notes))
    assert len(few.split("\n")) <= answer.HEIGHT and "more notes in the full report" in few and "Note 0:" in few


def test_the_figures():
    """5.634 s is the sum of the operations by hand; 8.45e17 / (1,024 x 275e12) = 3.001 s; the run is 667,572 of them."""
    plan = plans.large()
    text = answer.text(plan)
    assert "FITS: needs 5.85 GiB of the 30.8 GiB of memory per chip; 24.9 GiB stay free." in text
    assert "1,024 chips, mesh fsdp=128 tensor=8." in " ".join(text.split())
    assert line(text, "Memory").startswith(
        "parameters 0.24, optimizer state 0.48, gradients 0.31, activations kept for the backward pass 2.60,"
    )
    assert line(text, "Step time").startswith("5.63 s estimated; on hardware expect 5.92 to 6.76 s (5 to 20 % more). 3.00 s at best:")
    assert line(text, "MFU") == "53.3 %, model FLOPs utilization: best time / estimated time; on hardware 44.4 to 50.7 %."
    assert line(text, "Speed") == "372,000 tokens/s, 364 per chip; the data path must deliver 1.58 MB/s."
    whole = "1.40 trillion tokens in 667,572 steps: 43.5 days (on hardware 45.7 to 52.2 days), 1.07 million chip-hours."
    assert line(text, "Whole run") == whole
    assert line(text, "Checkpoint") == "729 GiB, 2.89 GiB of memory per host meanwhile."
    assert line(text, "Basis").startswith("compiled for this topology; seconds by the compiler's cost model 81.5 %, wire model 10.6 %,")
    shares = dict((s.what, s) for s in binds.shares(plan))
    assert f"matrix units at peak {100 * shares[binds.AT_PEAK].share:.1f} % (17.7 % recomputed)" in line(text, "What binds")
    assert "waiting for all-reduce over tensor 8.9 %" in line(text, "What binds")


def test_extras():
    plan = plans.large()
    text = answer.text(plan, budget=budgets.of_plan(plan, plan.peak_flops, 1.5), **extras(plan))
    assert line(text, "Whole run").endswith("1.07 million chip-hours, 1.60 million dollars.")
    assert line(text, "Checkpoint").startswith("729 GiB in 3.44 s (the step waits 382 ms), 2.85 GiB of memory per host")
    rate = r"one in [\d.]+ days \(assumed: as H100s in arXiv:2407.21783\)"
    assert re.search(rate + r", best saved every .* steps\): 9\d\.\d % of the time is new work", line(text, "Failures"))


def test_does_not_fit():
    text = answer.text(plans.too_large())
    assert "DOES NOT FIT: needs 34.2 GiB of memory per chip where 30.8 GiB are usable: 3.47 GiB too much." in text
    assert "exceeds available HBM (30.75G)" in line(text, "Compiler")
    assert line(text, "Largest").startswith("optimizer: float32[80, 8192, 344] mu 5.00 GiB; kept for the backward")
    assert line(text, "Step time").startswith("not estimated: the program does not fit. --search")
    assert "MFU" not in text and "Whole run" not in text
    short = plans.large(memory=plans.memory(parameters=3), out_of_memory="RESOURCE_EXHAUSTED", operations=())
    assert answer.verdict(short).startswith("DOES NOT FIT: the compiler ran out of memory (30.8 GiB")


def test_times_of_what_does_not_fit_are_conditional():
    """The closed form has times all the same; the cost of a run that cannot start is not told."""
    plan = plans.large(method="fast", memory=plans.memory(parameters=60))
    text = answer.text(plan, **extras(plan))
    assert line(text, "Step time").startswith("5.63 s estimated, if it fitted;")
    assert "Whole run" not in text and "Failures" not in text and "--config.mesh.fsdp" in line(text, "Try")


def test_memory_only():
    text = answer.text(plans.memory_only())
    assert line(text, "Step time").startswith("not estimated: only memory was asked for")
    assert line(text, "Basis") == "compiled for its memory only."


@pytest.mark.parametrize("gib,doubt", [(27.0, False), (29.0, True), (32.0, True), (35.0, False)])
def test_a_close_call_of_the_closed_form_is_no_verdict(gib, doubt):
    plan = plans.large(method="fast", memory=plans.memory(parameters=gib))
    assert ("compile to be sure" in answer.verdict(plan)) == doubt
    assert "compile to be sure" not in answer.verdict(plans.large(memory=plans.memory(parameters=gib)))


def test_no_calibration_is_said():
    text = answer.text(plans.cpu())
    assert "NEEDS 70.4 MiB per device; this kind of device has no recorded memory size." in text
    assert "never compared with a measured step" in line(text, "Step time") and "on hardware" not in text
    assert "8 devices" in text and "chip" not in text


def test_unpriced_operations_are_counted():
    unknown = plans.op("custom-call.1", "kernel", 3, 0.0, "unpriced")
    text = answer.text(plans.large(operations=(*plans.operations(), unknown)))
    assert line(text, "Basis").endswith("1 operations have no price: they count as their bytes, or as 0 s.")


def test_decode():
    text = answer.text(plans.decode())
    assert "one decoding step (64 tokens)" in text and "decoding state 2.80" in text
    assert "5.25 ms to read all parameters and the decoding state once, at 1.23 TB/s." in text
    assert line(text, "Cost") == "0.216 chip-hours per million tokens."
    assert line(text, "Try").startswith("a larger batch")
    assert "Whole run" not in text and "backward" not in text


@pytest.mark.parametrize(
    "plan,words",
    [
        (plans.large(), "--config.train.remat=dots, or save:kernel,mlp"),
        (plans.large(memory=plans.memory(parameters=10, activations=16)), "tensor"),  # no room to keep more
        (plans.large(bubble=0.3), "--config.parallel.rounds"),
        (plans.too_large(), "--config.train.micro_batch_size"),
        (plans.large(memory=plans.memory(activations=40), executed_flops=8.45e17, operations=()), "--config.train.remat=full"),
        (plans.large(memory=plans.memory(optimizer=40), operations=()), "--config.parallel.zero1=True"),
        (plans.large(what="prefill", operations=(plans.op("add", "memory", 1, 1.0, bytes=1e12),)), "longer prompts"),
        (plans.large(operations=(plans.op("dot", "matmul", 1, 1.0, flops=0.99 * 275e12),)), ""),
    ],
)  # fmt: skip
def test_the_suggestion_is_against_the_largest_loss(plan, words):
    said = advice.suggest(plan, binds.shares(plan) if plan.seconds else [])
    assert words in said if words else said == ""


def test_every_suggested_field_exists():
    config = common.base()
    source = open(advice.__file__).read()
    found = set(re.findall(r"--config\.([\w.]*\w)", source))
    assert len(found) > 5
    for path in found:
        here = config
        for part in path.split("."):
            assert isinstance(here, ml_collections.ConfigDict) and part in here, f"advice names --config.{path}, which does not exist"
            here = here[part]
    for axis in advice.AXES:
        assert axis in config.mesh

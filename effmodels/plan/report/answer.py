"""The answer of a plan for people: one screen that needs no further reading, the tables, and two plans next to each other."""
import collections
import re
import textwrap

from effmodels.plan import budgets, units
from effmodels.plan.records import MEMORY_PARTS
from effmodels.plan.report import advice, binds, rows, spans
from effmodels.plan.report.comparison import compare as compare

WIDTH, HEIGHT = 100, 24
_INDENT = 12
_WHAT = {"train": "one training step", "prefill": "one prefill", "decode": "one decoding step"}
_METHOD = {"compiled": "compiled for this topology", "memory": "compiled for its memory only", "fast": "closed form, nothing compiled"}
_MEMORY_ERROR = {"compiled": 0.0, "memory": 0.1, "fast": 0.1}  # of the total (docs/plan.md)
_BASIS = {
    "schedule": "kernel schedules",
    "libtpu": "libtpu's simulator",
    "cost model": "the compiler's cost model",
    "kernel table": "kernel table",
    "wire model": "wire model",
    "closed form": "formulas",
}


def text(plan, *, budget=None, saving=None, failures=None):
    """The one-screen answer of a `Plan`: at most 24 lines of 100 columns.

    budget: `budgets.Budget` (default: of the plan's own steps); saving: `budgets.Saving`, failures: `failures.Failures` (default: none).
    """
    if budget is None and plan.what == "train" and plan.peak_flops and plan.steps:
        budget = budgets.of_plan(plan, plan.peak_flops)
    parts = {
        "heading": _heading(plan), "space": [""], "memory": _memory(plan), "time": _time(plan),
        "run": _run(plan, budget, saving) if plan.fits else [], "failures": _failures(failures) if plan.fits else [],
        "binds": _binds(plan), "basis": _basis(plan),
    }  # fmt: skip
    for name in ("space", "failures", "basis"):  # what goes first where a long name makes the answer too long
        if sum(map(len, parts.values())) > HEIGHT:
            del parts[name]
    lines = [line for part in parts.values() for line in part]
    return "\n".join(lines + _notes(plan.notes, HEIGHT - len(lines)))


def tables(plan):
    """The tables of a `Plan` as text: time by layer kind, collectives, the costliest operations, the largest buffers."""
    texts = [table.text() for table in rows.tables(plan)]
    return "\n\n".join(texts if plan.operations else [*texts, f"No times: {_no_times(plan)}"])


def verdict(plan):
    """Fits or not, and by how much, in one or two sentences."""
    memory, device = plan.memory, _device(plan)
    needed, usable = units.size(memory.total), units.size(memory.available)
    difference = units.size(abs(memory.available - memory.total))
    error = 0.0 if plan.out_of_memory else _MEMORY_ERROR[plan.method]
    close = abs(memory.available - memory.total) < error * memory.total
    unsure = f" But this figure is good to {100 * error:.0f} % only: compile to be sure." if close else ""
    if not memory.available:
        limit = f"this kind of {device} has no recorded memory size"
        return "DOES NOT FIT: the compiler ran out of memory." if plan.out_of_memory else f"NEEDS {needed} per {device}; {limit}."
    if plan.fits:
        return f"FITS: needs {needed} of the {usable} of memory per {device}; {difference} stay free.{unsure}"
    if memory.total > memory.available:
        return f"DOES NOT FIT: needs {needed} of memory per {device} where {usable} are usable: {difference} too much.{unsure}"
    return f"DOES NOT FIT: the compiler ran out of memory ({usable} are usable per {device})."


def _heading(plan):
    axes = " ".join(f"{axis}={n}" for axis, n in plan.mesh.items() if n != 1) or "no axis split"
    where = f"{plan.slices} slices of {plan.topology}" if plan.slices > 1 else plan.topology
    number = f"{plan.chips:,} {_device(plan)}{'s' if plan.chips != 1 else ''}"
    step = f"{plan.config or 'a config'}, {_WHAT[plan.what]} ({plan.tokens:,} tokens)"
    return textwrap.wrap(f"{step} on {where}: {number}, mesh {axes}.", WIDTH)


def _memory(plan):
    memory = plan.memory
    scale, unit = units.size_unit(max(memory.total, 1))
    values = [(name, getattr(memory, name) / scale) for name in MEMORY_PARTS]
    parts = ", ".join(f"{spans.memory_label(name, plan.what)} {value:.2f}" for name, value in values if value >= 0.005)
    lines = [*textwrap.wrap(verdict(plan), WIDTH), *_entry("Memory", f"{parts} ({unit} per {_device(plan)}).")]
    if plan.offloaded_bytes:
        lines += _entry("", f"Besides, in the host's memory for each {_device(plan)}: {units.size(plan.offloaded_bytes)}.")
    if plan.out_of_memory:
        lines += _entry("Compiler", textwrap.shorten(plan.out_of_memory, 240, placeholder=" ..."))
    if not plan.fits and plan.largest:
        lines += _entry("Largest", "; ".join(f"{what} {units.size(num_bytes)}" for what, num_bytes in plan.largest[:3]) + ".")
    return lines


def _time(plan):
    if not plan.seconds:
        return _entry("Step time", f"not estimated: {_no_times(plan)}")
    error = "how far off is not known: never compared with a measured step"
    if plan.band:
        error = f"on hardware expect {_spread(plan, plan.seconds)} ({_more(plan.band)})"
    lines = _entry("Step time", f"{units.time(plan.seconds)} estimated{'' if plan.fits else ', if it fitted'}; {error}.")
    if plan.bound:
        peak = f"the {_device(plan)}s' peak of {units.count(plan.peak_flops, 'FLOP/s')}"
        lines += _entry("", f"{units.time(plan.bound)} at best: the model's own arithmetic at {peak}.")
    if plan.what == "decode" and plan.bandwidth:
        read = (plan.memory.parameters + plan.memory.activations) / plan.bandwidth
        bandwidth = units.count(plan.bandwidth, "B/s")
        lines += _entry("", f"{units.time(read)} to read all parameters and the decoding state once, at {bandwidth}.")
    if plan.mfu:
        hardware = f"; on hardware {100 * plan.mfu / plan.band[1]:.1f} to {units.percent(plan.mfu / plan.band[0])}" if plan.band else ""
        lines += _entry("MFU", f"{units.percent(plan.mfu)}, model FLOPs utilization: best time / estimated time{hardware}.")
    return lines


def _speed(plan):
    if not plan.seconds:
        return []
    rate = plan.tokens / plan.seconds
    data = f"; the data path must deliver {units.count(plan.input_bytes_per_second, 'B/s')}" if plan.input_bytes_per_second else ""
    lines = _entry("Speed", f"{units.number(rate)} tokens/s, {units.number(rate / plan.chips)} per {_device(plan)}{data}.")
    if plan.what != "train":
        hours = 1e6 * plan.chips / rate / 3600
        lines += _entry("Cost", f"{units.digits(hours)} {_device(plan)}-hours per million tokens.")
    return lines


def _run(plan, budget, saving):
    lines = _speed(plan)
    if budget:
        hardware = f" (on hardware {_spread(plan, budget.seconds)})" if plan.band else ""
        price = f", {units.number(budget.dollars)} dollars" if budget.dollars else ""
        steps = f" in {plan.steps:,} steps" if plan.steps else ""
        cost = f"{units.number(budget.chip_hours)} {_device(plan)}-hours"
        lines += _entry("Whole run", f"{units.number(budget.tokens)} tokens{steps}: {units.time(budget.seconds)}{hardware}, {cost}{price}.")
    if plan.checkpoint_bytes and plan.what == "train":
        took = f" in {units.time(saving.seconds)} (the step waits {units.time(saving.blocked_seconds)})" if saving else ""
        host = saving.host_bytes if saving else plan.host_save_bytes
        needs = f", {units.size(host)} of memory per host meanwhile" if host else ""
        lines += _entry("Checkpoint", f"{units.size(plan.checkpoint_bytes)}{took}{needs}.")
    return lines


def _failures(failures):
    if not failures:
        return []
    every = f" ({failures.interval_steps:,} steps)" if failures.interval_steps else ""
    good = f"{units.percent(failures.goodput)} of the time is new work, {units.percent(failures.copy_goodput)} with copies in memory"
    return _entry(
        "Failures",
        f"one in {units.time(failures.mtbf_seconds)} ({failures.source}), best saved every {units.time(failures.interval)}{every}: {good}.",
    )


def _binds(plan):
    shares = binds.shares(plan) if plan.seconds else []
    shown = [f"{rows.share_name(s)} {units.percent(s.share)}{_recomputed(s, plan.seconds)}" for s in shares if s.share >= 0.01][:6]
    lines = _entry("What binds", f"{', '.join(shown)} of the step.") if shown else []
    suggestion = advice.suggest(plan, shares)
    return lines + (_entry("Try", suggestion) if suggestion else [])


def _recomputed(share, seconds):
    """What of a share only recomputation makes necessary, where that is much."""
    part = share.recomputed / seconds
    return f" ({units.percent(part)} recomputed)" if share.what == binds.AT_PEAK and part >= 0.01 else ""


def _basis(plan):
    seconds = collections.Counter()
    for o in plan.operations:
        seconds[o.basis] += o.total
    shares = [f"{_BASIS[basis]} {units.percent(s / plan.seconds)}" for basis, s in seconds.most_common() if s and basis in _BASIS]
    times = f"; seconds by {', '.join(shares)}" if shares else ""
    unpriced = sum(o.basis == "unpriced" for o in plan.operations)
    missing = f" {unpriced} operations have no price: they count as their bytes, or as 0 s." if unpriced else ""
    return _entry("Basis", f"{_METHOD[plan.method]}{times}.{missing}")


def _notes(notes, room):
    """As many notes as fit, and a hint where some do not."""
    entries, more = [_entry("Note", note) for note in notes], _entry("Note", "there are more notes in the full report (--html, --json).")
    if sum(map(len, entries)) <= room:
        return [line for entry in entries for line in entry]
    lines = []
    while entries and len(lines) + len(entries[0]) + len(more) <= room:
        lines += entries.pop(0)
    return lines + more if room >= len(more) else []


def _entry(label, sentence):
    """The sentence behind its label, wrapped, but not between a figure and its unit."""
    held = re.sub(r"(?<=\d) (?=\S)", "\xa0", sentence)
    lines = textwrap.wrap(f"{label:<{_INDENT}}{held}", WIDTH, subsequent_indent=" " * _INDENT, break_on_hyphens=False)
    return [line.replace("\xa0", " ") for line in lines]


def _device(plan):
    return "device" if plan.chip.startswith("cpu") else "chip"


def _spread(plan, seconds):
    return units.span(*(seconds * factor for factor in plan.band))


def _more(band):
    low, high = (round(100 * (b - 1)) for b in band)
    if low < 0 < high:
        return f"from {-low} % less to {high} % more"
    return f"{low} to {high} % more" if low >= 0 else f"{-high} to {-low} % less"


def _no_times(plan):
    if not plan.fits:
        return "the program does not fit. --search looks for what would (mesh, recomputation, micro-batch)."
    return "only memory was asked for. Without --memory the step is compiled in full; --fast estimates in a second."

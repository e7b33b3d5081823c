"""What the pictures of a plan show: the time of one step in lanes, and the colours. `page` and `picture` draw it.

Operations are laid end to end in the order of execution, each as long as all its calls: a scanned layer is drawn once, as long as
all layers.
"""
import collections
import dataclasses
import itertools
import math

from effmodels.plan.records import PHASES

LANES = ("phase", "chip", "transfers hidden")
# Okabe and Ito's palette, which people who see few colours can tell apart.
COLOURS = {
    "matmul": "#0072b2",
    "kernel": "#009e73",
    "memory": "#e69f00",
    "collective": "#d55e00",
    "hidden": "#8fcdf0",
    **dict(zip(PHASES, ("#dddddd", "#bdbdbd", "#9a9a9a", "#777777"))),
    "other": "#eeeeee",
}
LABELS = {
    "matmul": "matmuls",
    "kernel": "kernels",
    "memory": "element-wise work and copies",
    "collective": "waits for other chips (exposed)",
    "hidden": "transfers behind computation (hidden)",
}
MEMORY_COLOURS = {
    "parameters": "#0072b2",
    "optimizer": "#56b4e9",
    "buffers": "#cc79a7",
    "batch": "#999999",
    "gradients": "#009e73",
    "activations": "#e69f00",
    "temporaries": "#f0e442",
    "program": "#444444",
}


@dataclasses.dataclass(frozen=True)
class Span:
    """A stretch of one lane. kind is a key of COLOURS; name says what it is: an operation, or how many are drawn together."""

    lane: str  # of LANES
    start: float  # seconds
    seconds: float
    kind: str
    name: str


def spans(operations, pieces=300):
    """Spans of all lanes; operations shorter than 1 / pieces of the step are drawn together, by kind, so that sums stay exact.

    There are no phases where nobody knows any.
    """
    total = sum(o.total for o in operations)
    if not total:
        return []
    known = any(o.phase in PHASES for o in operations)
    return [
        *(_phases(operations, total / pieces) if known else []),
        *_chip(operations, total / pieces),
        *_hidden(operations, total / pieces),
    ]


def lanes(found):
    """The lanes that have something to show, from top to bottom."""
    return [lane for lane in LANES if any(s.lane == lane for s in found)]


def memory_label(part, what):
    """What a part of `Memory` is called in a plan of train, prefill or decode."""
    if part == "activations":
        return "activations kept for the backward pass" if what == "train" else "decoding state"
    return "optimizer state" if part == "optimizer" else part


def tick_step(end):
    """A round step that gives an axis from 0 to `end` five to ten ticks."""
    power = 10.0 ** math.floor(math.log10(end))
    return power * next(step for step in (0.1, 0.2, 0.5, 1.0) if end / (power * step) <= 11)


def _chip(operations, least):
    found, clock, small = [], 0.0, collections.defaultdict(list)

    def put(kind, seconds, name):
        nonlocal clock
        found.append(Span("chip", clock, seconds, kind, name))
        clock += seconds

    def put_small():
        for kind, members in small.items():
            put(kind, sum(o.total for o in members), members[0].name if len(members) == 1 else f"{len(members)} short operations")
        small.clear()

    for o in operations:
        if o.total >= least:
            put_small()
            put(o.kind, o.total, _name(o))
        elif o.total:
            small[o.kind].append(o)
            if sum(o.total for members in small.values() for o in members) >= least:
                put_small()
    put_small()
    return found


def _phases(operations, least):
    """One span per run of operations of a phase; a run shorter than `least` counts to the one before it."""
    found, clock = [], 0.0
    for kind, members in itertools.groupby(operations, lambda o: o.phase if o.phase in PHASES else "other"):
        seconds = sum(o.total for o in members)
        if found and (found[-1].kind == kind or seconds < least):
            found[-1] = dataclasses.replace(found[-1], seconds=found[-1].seconds + seconds)
        elif seconds:
            found.append(Span("phase", clock, seconds, kind, kind))
        clock += seconds
    return found


def _hidden(operations, least):
    """Transfers begin where they stand among the operations; several in flight at once share the lane, as they share the links."""
    found, clock, free, members = [], 0.0, 0.0, []
    total = sum(o.total for o in operations)
    for o in operations:
        clock += o.total
        if o.kind != "collective":
            continue
        members.append(o)
        start = max(clock, free)
        seconds = min(sum(m.calls * m.seconds * m.hidden for m in members), total - start)
        if seconds >= least:
            name = _name(o) if len(members) == 1 else f"{len(members)} transfers, the last {_name(o)}"
            found.append(Span("transfers hidden", start, seconds, "hidden", name))
            free, members = start + seconds, []
    return found


def _name(operation):
    what = " over ".join(filter(None, (operation.collective, "+".join(operation.axes)))) or operation.name
    calls = f", {operation.calls:,} calls" if operation.calls != 1 else ""
    return f"{what}{calls}" + (f" ({operation.source})" if operation.source else "")

"""The tables of a plan, as rows of text: layer kinds, collectives, the costliest operations. `answer` and `page` print them."""
import dataclasses
from collections import defaultdict

from effmodels.plan import units
from effmodels.plan.records import PHASES
from effmodels.plan.report import binds

_LONGEST = 48  # characters of a cell in text


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of equally many cells; the first `names` columns are words, the others figures."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    names: int = 1
    note: str = ""

    def text(self):
        """The table in aligned columns, words left and figures right; a long word is cut at its front, where paths differ least."""
        if not self.rows:
            return f"{self.title}: none"
        cells = [
            self.columns,
            *(tuple(cell if len(cell) <= _LONGEST else ".." + cell[2 - _LONGEST :] for cell in row) for row in self.rows),
        ]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]
        head, *body = (
            "  ".join(f"{c:<{w}}" if i < self.names else f"{c:>{w}}" for i, (c, w) in enumerate(zip(row, widths))) for row in cells
        )
        ruled = [head, "  ".join("-" * w for w in widths), *body, *([self.note] if self.note else [])]
        return "\n".join([self.title, *(f"  {line}".rstrip() for line in ruled)])


def tables(plan):
    """The tables of a `Plan` that have something to say: of time where it has operations, of memory where the largest buffers are known."""
    timed = [layers(plan), collectives(plan), costliest(plan)] if plan.operations else []
    return (*timed, *(table for table in (lines(plan), largest(plan)) if table.rows))


def layers(plan):
    """Seconds by layer kind and phase, and the bytes that the operations move; costliest kind first."""
    found = binds.layers(plan)
    phases = [p for p in (*PHASES, "") if any(layer.phases.get(p) for layer in found)]
    rows = []
    for layer in found:
        waiting = layer.kinds.get("collective", 0.0)
        computing = layer.seconds - waiting
        rate = layer.flops / computing / plan.peak_flops if computing and plan.peak_flops else 0.0
        times = [_time(layer.phases.get(phase)) for phase in phases]
        share = units.percent(layer.share)
        rows.append(
            (
                layer.layer or "not known",
                *times,
                _time(layer.seconds),
                share,
                _time(waiting),
                _percent(rate),
                _size(layer.hbm_bytes),
                _size(layer.sent_bytes),
            )
        )
    columns = ("layer", *(phase or "other" for phase in phases), "all", "of step", "waiting", "of peak", "memory traffic", "sent")
    note = (
        "Times of one step on one chip. waiting: for other chips, part of `all`. of peak: FLOP/s while computing, recomputed work included."
    )
    return Table("Time and bytes by layer kind", columns, tuple(rows), note=note)


def collectives(plan):
    """Every collective, alike ones together, those that are waited for longest first."""
    groups = defaultdict(list)
    for o in plan.operations:
        if o.kind == "collective":
            groups[o.collective or o.name, o.axes, o.phase, o.layer, o.bytes, o.basis].append(o)
    rows = []
    for (name, axes, phase, layer, num_bytes, _), members in sorted(groups.items(), key=lambda item: (-_total(item[1]), -_wire(item[1]))):
        calls = sum(o.calls for o in members)
        where = ("+".join(axes) or "-", phase or "-", layer or "-", _source(members), _state(members))
        times = (_time(seconds) for seconds in (_wire(members), _flight(members), _total(members)))
        rows.append((name, *where, _size(num_bytes), f"{calls:,}", _size(calls * num_bytes), *times))
    sizes = ("sent, a call", "calls", "sent", "wire time", "in flight", "exposed")
    note = (
        "Of one step, by one chip. wire time: alone, by the wire model (docs/plan.md); in flight: with others on the same links. "
        "hidden: the chip computes meanwhile; exposed: it waits."
    )
    return Table("Collectives", ("collective", "mesh axis", "phase", "layer", "source", "state", *sizes), tuple(rows), names=6, note=note)


def costliest(plan, number=10):
    """The operations that lengthen the step most."""
    rows = []
    for o in binds.costliest(plan, number):
        each = o.exposed if o.kind == "collective" else o.seconds
        where = " ".join(filter(None, (o.phase, o.layer))) or "-"
        rate = o.flops / o.seconds / plan.peak_flops if o.seconds and plan.peak_flops else 0.0
        share = units.percent(o.total / plan.seconds)
        rows.append((o.name, o.kind, where, o.source or "-", o.basis, f"{o.calls:,}", _time(each), _time(o.total), share, _percent(rate)))
    columns = ("operation", "kind", "where", "source", "basis", "calls", "a call", "all calls", "of step", "of peak")
    return Table("Costliest operations", columns, tuple(rows), names=5, note="Of a collective: only the time that the chip waits.")


def lines(plan, number=10):
    """The lines of source whose operations lengthen the step most: what the instructions of unrolled layers add up to."""
    groups = defaultdict(list)
    for o in plan.operations:
        if o.source:
            groups[o.source, o.kind].append(o)
    rows = []
    for (source, kind), members in sorted(groups.items(), key=lambda item: -_total(item[1]))[:number]:
        found = sorted({o.layer for o in members if o.layer})
        calls, seconds = sum(o.calls for o in members), _total(members)
        rows.append((source, kind, ", ".join(found) or "-", f"{calls:,}", _time(seconds), units.percent(seconds / plan.seconds)))
    return Table("Costliest lines of source", ("source", "kind", "layers", "calls", "all calls", "of step"), tuple(rows), names=3)


def largest(plan):
    """The largest buffers at the fullest moment, as far as the plan names them."""
    found = tuple((what, units.size(num_bytes), units.percent(num_bytes / max(1, plan.memory.total))) for what, num_bytes in plan.largest)
    return Table("Largest buffers of one device", ("buffer", "size", "of all"), found, note="At the fullest moment, by our own accounting.")


def share_name(share):
    """What a `binds.Share` is called where people read it."""
    if share.what == binds.EXPOSED:
        return f"waiting for {share.collective or 'others'} over {'+'.join(share.axes) or 'some chips'}"
    return {binds.HBM: "memory bandwidth", binds.OTHER: "vector work"}.get(share.what, share.what)


def _state(operations):
    if operations[0].basis == "unpriced":
        return "no price"
    flight = _flight(operations)
    hidden = round(100 * sum(o.calls * o.flight * o.hidden for o in operations) / flight) if flight else 0
    return {0: "exposed", 100: "hidden"}.get(hidden, f"{hidden} % hidden")


def _total(operations):
    return sum(o.total for o in operations)


def _wire(operations):
    return sum(o.calls * o.seconds for o in operations)


def _flight(operations):
    return sum(o.calls * o.flight for o in operations)


def _source(operations):
    sources = sorted({o.source for o in operations if o.source})
    return sources[0] + (f" +{len(sources) - 1}" if len(sources) > 1 else "") if sources else "-"


def _time(seconds):
    return units.time(seconds) if seconds else "-"


def _size(num_bytes):
    return units.size(num_bytes) if num_bytes else "-"


def _percent(share):
    return units.percent(share) if share else "-"

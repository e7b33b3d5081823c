"""Two plans next to each other: memory, time, what changed most."""
from effmodels.plan import units
from effmodels.plan.records import MEMORY_PARTS
from effmodels.plan.report import binds, rows, spans

_SHOWN = 0.005  # share of the larger step: a line needs this much time


def compare(a, b):
    """A table of two `Plan`s, `a` the one before; lines that neither has are left out."""
    lines = [("fits", _fits(a), _fits(b), "")]
    lines += [
        _row(f"memory: {spans.memory_label(part, a.what)}", getattr(a.memory, part), getattr(b.memory, part), units.size)
        for part in MEMORY_PARTS
    ]
    lines += [_row("memory: all", a.memory.total, b.memory.total, units.size), _row("step time", a.seconds, b.seconds, units.time)]
    lines += [_row("at best", a.bound, b.bound, units.time), _row("MFU", a.mfu, b.mfu, units.percent)]
    lines += [
        _row("tokens/s", _rate(a), _rate(b), units.number),
        _row("tokens/s per chip", _rate(a) / a.chips, _rate(b) / b.chips, units.number),
    ]
    lines += [_row("chip-seconds per million tokens", _cost(a), _cost(b), units.digits)]
    least = _SHOWN * max(a.seconds, b.seconds)
    for name, parts in (("time", (_shares(a), _shares(b))), ("layer", (_layers(a), _layers(b)))):
        names = sorted({*parts[0], *parts[1]}, key=lambda key: -max(part.get(key, 0) for part in parts))
        values = [(key, parts[0].get(key, 0.0), parts[1].get(key, 0.0)) for key in names]
        lines += [_row(f"{name}: {key}", *pair, units.time) for key, *pair in values if max(pair) >= least]
    columns = ("", _name(a), _name(b), "change")
    return "\n".join([rows.Table("Comparison", columns, tuple(line for line in lines if line)).text(), *_cautions(a, b)])


def _row(name, before, after, shown):
    """None where both are 0: nobody knows, or neither has it."""
    if not before and not after:
        return None
    change = _change(before, after, shown) if before and after else ""
    return (name, shown(before) if before else "-", shown(after) if after else "-", change)


def _change(before, after, shown):
    ratio = after / before
    if abs(ratio - 1) < 5e-4:
        return "same"
    if shown is units.percent:
        return f"{100 * (after - before):+.1f} points"
    return f"x {units.digits(ratio)}" if ratio >= 2 else f"{100 * (ratio - 1):+.1f} %"


def _fits(plan):
    return "no" if not plan.fits else "yes" if plan.memory.available else "not known"


def _cautions(a, b):
    """What makes the figures hard to compare."""
    words = {"what": "kind of step", "method": "method", "versions": "versions", "tokens": "tokens of a step"}
    different = [word for f, word in words.items() if getattr(a, f) != getattr(b, f)]
    return [f"  Take care: the two differ in {', '.join(different)}."] if different else []


def _name(plan):
    where = plan.topology if plan.slices == 1 else f"{plan.slices} x {plan.topology}"
    mesh = " ".join(f"{axis}={n}" for axis, n in plan.mesh.items() if n != 1)
    return f"{plan.config.removeprefix('configs/')} {where} {mesh}"


def _rate(plan):
    return plan.tokens / plan.seconds if plan.seconds else 0.0


def _cost(plan):
    return 1e6 * plan.chips / _rate(plan) if plan.seconds else 0.0


def _shares(plan):
    return {rows.share_name(share): share.seconds for share in binds.shares(plan)} if plan.seconds else {}


def _layers(plan):
    return {layer.layer or "not known": layer.seconds for layer in binds.layers(plan)}

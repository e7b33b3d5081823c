"""What binds a step: where its seconds go, and to whom.

The seconds of an operation are split by two rooflines: what its FLOPs take at the chip's peak, what its bytes take beyond that at the full
bandwidth of HBM, and the rest, which neither explains. Of a collective only the exposed seconds count.
"""
import collections
import dataclasses

from effmodels.plan import chips

# Parts of a step, as `shares` names them.
AT_PEAK, MATMUL, HBM, KERNEL, OTHER = "matrix units at peak", "matmuls below peak", "HBM", "kernels below peak", "other"
EXPOSED, BUBBLE, IMBALANCE = "exposed", "pipeline bubble", "imbalance"


@dataclasses.dataclass(frozen=True)
class Share:
    """A part of the step. axes and collective: of what is exposed; recomputed: the seconds of it that only remat makes necessary."""

    what: str
    seconds: float
    share: float  # of the step
    axes: tuple[str, ...] = ()
    collective: str = ""
    recomputed: float = 0.0


@dataclasses.dataclass(frozen=True)
class Layer:
    """A kind of layer: its seconds by phase and by kind of operation (collectives: exposed), and what it does, all calls together."""

    layer: str
    seconds: float
    share: float
    phases: dict[str, float]
    kinds: dict[str, float]
    flops: float
    hbm_bytes: float
    sent_bytes: float
    wire_seconds: float


def shares(plan) -> list[Share]:
    """The Shares of a Plan, costliest first; with a bubble or imbalance they add up to 1, those being parts of every operation's slot."""
    peak, bandwidth = _rates(plan)
    found, again = collections.Counter(), collections.Counter()
    for o in plan.operations:
        for key, seconds in _split(o, peak, bandwidth).items():
            found[key] += o.calls * seconds
            again[key] += o.calls * seconds * (o.phase == "recomputed")
    busy = 1 - plan.bubble - plan.imbalance
    total = plan.seconds
    rows = [Share(what, s * busy, s * busy / total, axes, kind, again[what, axes, kind]) for (what, axes, kind), s in found.items() if s]
    rows += [Share(what, part * total, part) for what, part in ((BUBBLE, plan.bubble), (IMBALANCE, plan.imbalance)) if part]
    return sorted(rows, key=lambda row: -row.seconds)


def costliest(plan, number=10):
    """The operations that take most of the step."""
    return sorted(plan.operations, key=lambda o: -o.total)[:number]


def layers(plan) -> list[Layer]:
    """A Layer for each kind of layer, costliest first; "" holds what nobody knows."""
    groups = collections.defaultdict(list)
    for o in plan.operations:
        groups[o.layer].append(o)
    return sorted((_layer(name, members, plan.seconds) for name, members in groups.items()), key=lambda row: -row.seconds)


def _rates(plan):
    chip = None if plan.peak_flops and plan.bandwidth else chips.get(plan.chip)
    return plan.peak_flops or chip.flops, plan.bandwidth or chip.bandwidth


def _split(o, peak, bandwidth):
    """{(what, axes, collective): seconds of one call}."""
    if o.kind == "collective":
        return {(EXPOSED, o.axes, o.collective): o.exposed}
    at_peak = min(o.seconds, o.flops / peak)
    moving = min(o.seconds, o.bytes / bandwidth)
    if o.kind == "memory":  # nothing but bytes: what it takes beyond the bandwidth is lost to vector work or short runs
        return {(HBM, (), ""): moving, (OTHER, (), ""): o.seconds - moving}
    memory = max(0.0, moving - at_peak)
    below = KERNEL if o.kind == "kernel" else MATMUL
    return {(AT_PEAK, (), ""): at_peak, (HBM, (), ""): memory, (below, (), ""): o.seconds - at_peak - memory}


def _layer(name, members, total):
    phases, kinds = collections.Counter(), collections.Counter()
    for o in members:
        phases[o.phase] += o.total
        kinds[o.kind] += o.total
    seconds = sum(o.total for o in members)
    local, sent = ([o for o in members if (o.kind == "collective") == wanted] for wanted in (False, True))
    return Layer(
        name, seconds, seconds / total if total else 0.0, dict(phases), dict(kinds),
        flops=sum(o.calls * o.flops for o in local),
        hbm_bytes=sum(o.calls * o.bytes for o in local),
        sent_bytes=sum(o.calls * o.bytes for o in sent),
        wire_seconds=sum(o.calls * o.seconds for o in sent),
    )  # fmt: skip

"""One step of a compiled program as a list of priced Operations, and which collectives hide behind compute.

The HLO text of a TPU program is scheduled: its order is the order of execution on the one sequencer of a core. What is asynchronous - the
collectives and copies split into start and done - runs beside the rest; the program waits at the done for what is left. A loop's body is
played once and counts as often as it runs.

Seconds come from, in this order: the schedule of the compiler's bundles where they were dumped ("schedule", or "libtpu" for its own
simulator), `kernel_time` for kernels ("kernel table"), and XLA's `estimated_cycles` ("cost model") with the corrections of `movement`,
which also prices what XLA says nothing about ("closed form"). `wire` prices collectives ("wire model").
"""
import dataclasses
import re

from effmodels.plan import chips, hlo
from effmodels.plan.compiled import collectives, kernel_time, movement, traffic
from effmodels.plan.compiled.origin import Origins
from effmodels.plan.compiled.wire import Wires
from effmodels.plan.records import Operation
from effmodels.plan.schedule import instrument
from effmodels.plan.schedule.cores import CORES

# Names for values, and what the sequencer does not wait for.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id", "iota", "opt-barrier",
    "add-dependency", "domain",
}  # fmt: skip
_FREE_CALLS = re.compile(r'custom_call_target="(ConcatBitcast|AllocateBuffer|SliceId|Sharding|AssumeGatherIndicesInBound)"')
# Measured over estimated seconds, lowest and highest, of the chips whose published timings were compared: steps of 22B and 52B 1.15 and
# 1.21 (tests/plan/test_calibration_models.py), attention kernels 1.05 to 1.12 (test_calibration.py). Estimates are always low: no launches,
# no contention, nothing that throttles a chip.
BANDS = {"v4": (1.05, 1.25)}


def operations(hlo_text, mesh, chip_name, *, dumped=None, kernel_seconds=None, wrap=None, filled=1.0) -> list[Operation]:
    """Every instruction of one chip that takes time, in the order of execution, with `calls` as often as its loops run.

    mesh: the program's; its devices tell where on the torus they are. chip_name: of `chips.CHIPS`. dumped: the `dump.Dump` of the same
    compilation, whose bundles are then simulated. kernel_seconds: {kernel name, as `kernel_time.name` gives it: seconds of one run}, which
    go before the table. wrap: as of `wire.Wires`. filled: the share of the experts' buffers that holds rows; a
    ragged exchange sends, and a grouped product multiplies, only those.
    """
    chip = chips.get(chip_name)
    costs = instrument.profile(hlo_text, dumped, chip_name, strict=False) if dumped is not None else []
    module, known = hlo.parse(hlo_text), {c.name: c for c in costs}
    player = _Player(module, mesh, chip, Wires(mesh, chip, wrap), Origins(hlo_text, module), known, kernel_seconds or {}, filled)
    return player.play(module.entry, 1)[0]


def band(chip_name) -> tuple[float, ...]:
    """(lowest, highest) of measured over estimated seconds on this chip; () where nothing was compared."""
    return BANDS.get(chip_name, ())


def merged(found, least=1e-4) -> list[Operation]:
    """The operations with those of less than this share of the step put together, where they have kind, layer, phase and calls in common.

    Sums stay; the order does too, but for what lies between two large ones. A step of 3,000 operations has about 500 that matter.
    """
    total, small, kept = sum(o.total for o in found), {}, []
    for o in found:
        if o.calls * max(o.seconds, o.exposed) >= least * total:
            kept += [*small.values(), o]
            small = {}
            continue
        key = o.kind, o.layer, o.phase, o.calls, o.basis, o.axes, o.collective
        sums = {f: getattr(o, f) + getattr(small[key], f) for f in ("seconds", "exposed", "flops", "bytes")} if key in small else None
        small[key] = dataclasses.replace(small[key], name=small[key].name.removesuffix(" ...") + " ...", **sums) if sums else o
    return [*kept, *small.values()]


@dataclasses.dataclass
class _Clock:
    """Seconds since a computation started, what is under way, and what the copies still have to move."""

    now: float = 0.0
    busy: dict = dataclasses.field(default_factory=dict)  # link -> when it is free
    collectives: dict = dataclasses.field(default_factory=dict)  # start -> (index of its operation, when it ends)
    copies: dict = dataclasses.field(default_factory=dict)  # start -> seconds left; they run one after the other
    sent: dict = dataclasses.field(default_factory=dict)  # recv -> rendezvous, rendezvous -> send

    def run(self, seconds, of_hbm):
        """The sequencer is busy; copies go on in the time that HBM is not."""
        self.now += seconds
        self._copy(max(0.0, seconds - of_hbm))

    def _copy(self, seconds):
        for name in self.copies:
            done = min(seconds, self.copies[name])
            self.copies[name] -= done
            seconds -= done

    def occupy(self, time):
        """When a collective that may start now ends: others on the same links go first."""
        begin = max([self.now, *(self.busy.get(link, 0.0) for link in time.links)])
        self.busy |= dict.fromkeys(time.links, begin + time.seconds)
        return begin + time.seconds

    def wait(self, until):
        """Seconds that the sequencer stands still."""
        waited = max(0.0, until - self.now)
        self.run(waited, 0.0)
        return waited

    def finish_copy(self, name):
        """Seconds waited for a copy and those before it."""
        waited = 0.0
        for other in list(self.copies):
            waited += self.copies.pop(other)
            if other == name:
                break
        self.now += waited
        return waited


class _Player:
    def __init__(self, module, mesh, chip, wires, origins, costs, kernel_seconds, filled):
        self.module, self.mesh, self.chip, self.wires, self.origins = module, mesh, chip, wires, origins
        self.costs, self.kernel_seconds, self.traffic = costs, kernel_seconds, traffic.Traffic(module)
        self.cycle, self.filled = movement.cycle(chip), filled

    def play(self, computation, calls):
        """(operations, seconds of one run) of a computation that runs `calls` times."""
        clock, found = _Clock(), []
        for instruction in self.module.computations[computation]:
            self._one(instruction, calls, clock, found)
        return found, clock.now

    def _one(self, i, calls, clock, found):
        kind, phase = collectives.kind_and_phase(i.opcode)
        inner = collectives.inside(self.module, i, self.mesh) if i.opcode in ("fusion", "async-start") else []
        part, names = collectives.chain(self.module, i) if inner else ("", ())
        if i.opcode == "while":
            self._loop(i, calls, clock, found)
        elif i.opcode == "conditional":
            self._append(max((self.play(name, calls) for name in hlo.branches(i)), key=lambda played: played[1]), clock, found)
        elif i.opcode == "call":
            self._append(self.play(hlo.called(i, "to_apply"), calls), clock, found)
        elif transfer := collectives.between_slices(i, self.mesh):
            clock.sent[collectives.rendezvous(i)] = i.name
            self._collectives(i, [transfer], True, calls, clock, found)
        elif i.opcode == "recv":
            clock.sent[i.name] = collectives.rendezvous(i)
        elif i.opcode.endswith("-done"):
            self._done(i, calls, clock, found)
        elif part == "done":
            self._wait(names[0], clock, found)
        elif kind or (inner and part != "carry"):
            starts = "start" in (phase, part) or i.opcode == "async-start"
            self._collectives(i, inner or [collectives.collective(i, kind, self.mesh)], starts, calls, clock, found, names)
        elif i.opcode in ("copy-start", "slice-start", "async-start", "dynamic-slice-start", "dynamic-update-slice-start"):
            clock.copies[i.name] = self._copy_seconds(i)
        elif not (i.opcode in _FREE or i.opcode.endswith(("-start", "-update")) or self._is_free(i)):
            operation = self._local(i, calls)
            clock.run(operation.seconds, operation.bytes / self.chip.bandwidth)
            found.append(operation)

    def _is_free(self, i):
        """Single scalars, and calls that only rename."""
        scalar = re.match(r"\w+\[[1,]*\]", i.type) is not None and not i.estimated_cycles
        return (scalar and i.opcode != "fusion") or (i.opcode == "custom-call" and _FREE_CALLS.search(i.attributes) is not None)

    def _append(self, played, clock, found, times=1):
        inner, seconds = played
        found += inner
        clock.run(seconds * times, 0.0)

    def _loop(self, loop, calls, clock, found):
        try:
            times = hlo.trip_count(self.module, loop)
        except ValueError:  # decided by data: shown, but not priced
            found.append(Operation(loop.name, "memory", calls, 0.0, "unpriced", **self._origin(loop)))
            return
        if times:
            self._append(self.play(hlo.called(loop, "body"), calls * times), clock, found, times)

    def _origin(self, i):
        return dataclasses.asdict(self.origins.of(i))

    # Local work.

    def _local(self, i, calls):
        flops, moved = self.traffic.flops(i), self.traffic.bytes(i)
        kind = "kernel" if i.is_kernel else "matmul" if flops else "memory"
        if i.is_kernel:
            flops, moved = (kernel_time.estimate(i).get(key, default) for key, default in (("flops", 0.0), ("bytes_accessed", moved)))
        seconds, basis = self._seconds(i, flops, moved)
        if i.is_kernel and kernel_time.name(i).startswith("grouped_matmul"):
            seconds, flops = max(seconds * self.filled, moved / self.chip.bandwidth), flops * self.filled
        return Operation(i.name, kind, calls, seconds, basis, flops=flops, bytes=moved, **self._origin(i))

    def _seconds(self, i, flops, moved):
        """(seconds of one run, basis)."""
        cost = self.costs.get(i.name)
        if i.is_kernel and (given := self.kernel_seconds.get(kernel_time.name(i))) is not None:
            return given, "schedule"
        if cost is not None and cost.source in ("bundles", "libtpu") and not cost.undecided:
            return cost.cycles / (1e6 * CORES[self.chip.name].megahertz), "schedule" if cost.source == "bundles" else "libtpu"
        if i.is_kernel:
            return kernel_time.seconds(i, self.chip, moved, [self.traffic.type_of(name) for name in i.operands])
        if flops:
            return max(i.estimated_cycles * self.cycle, flops / self.chip.flops, moved / self.chip.bandwidth), "cost model"
        return movement.seconds(i, self.traffic, self.chip), "cost model" if i.estimated_cycles else "closed form"

    # What runs beside.

    def _collectives(self, i, members, asynchronous, calls, clock, found, names=()):
        for c in members:
            c = dataclasses.replace(c, size=c.size * self.filled) if c.kind == "ragged-all-to-all" else c
            time = self.wires.time(c)
            end = clock.occupy(time)
            if asynchronous:
                clock.collectives[names[0] if names else i.name] = (len(found), end)
            exposed = 0.0 if asynchronous else clock.wait(end)
            found.append(Operation(
                i.name, "collective", calls, time.seconds, "wire model", exposed, bytes=c.sent, axes=c.axes, collective=c.kind,
                **self._origin(i)))  # fmt: skip

    def _done(self, i, calls, clock, found):
        start = i.operands[0] if i.operands else ""
        start = clock.sent.get(clock.sent.get(start, start), start)
        if start in clock.collectives:
            self._wait(start, clock, found)
        elif start in clock.copies and (waited := clock.finish_copy(start)):
            found.append(Operation(start, "memory", calls, waited, "closed form", bytes=waited * self.chip.bandwidth, **self._origin(i)))

    def _wait(self, start, clock, found):
        """Until a collective under way ends; one that a loop's body starts and its next run awaits is not under way here."""
        if start in clock.collectives:
            number, end = clock.collectives.pop(start)
            found[number] = dataclasses.replace(found[number], exposed=clock.wait(end))

    def _copy_seconds(self, i):
        """A copy in the background: to or from HBM at its bandwidth, twice that within HBM, slowly to the host's memory (space 5)."""
        ends = re.findall(r"\w+\[[\d,]*\](?:\{[^{}]*\})?", i.type)[:2]
        if any("S(5)" in end for end in ends):
            return traffic.hbm_bytes(re.sub(r"S\(\d+\)", "", ends[-1])) / chips.HOST_BYTES
        size = traffic.hbm_bytes(re.sub(r"S\(\d+\)", "", ends[-1]))
        return size * sum(map(traffic.on_hbm, ends)) / self.chip.bandwidth


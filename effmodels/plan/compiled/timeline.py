"""One step of a compiled program as a list of priced Operations, and which collectives hide behind compute.

The HLO text of a TPU program is scheduled: its order is the order of execution on the one sequencer of a core. What is asynchronous - the
collectives and copies split into start and done - runs beside the rest; the program waits at the done for what is left. A loop's body is
played once and counts as often as it runs.

Seconds come from, in this order: the schedule of the compiler's bundles where they were dumped ("schedule", or "libtpu" for its own
simulator), `kernel_time` for kernels ("kernel table"), and XLA's `estimated_cycles` ("cost model") with the corrections of `movement`,
which also prices what XLA says nothing about ("closed form"). `wire` prices collectives ("wire model"); `links` shares the wires among
those in flight.
"""
import dataclasses
import re

from effmodels.plan import chips, hlo
from effmodels.plan.compiled import collectives, kernel_time, movement, traffic
from effmodels.plan.compiled.links import Links
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


def operations(hlo_text, mesh, chip_name, *, dumped=None, kernel_seconds=None, wrap=None, filled=(1.0, 1.0)) -> list[Operation]:
    """Every instruction of one chip that takes time, in the order of execution, with `calls` as often as its loops run.

    mesh: the program's; its devices tell where on the torus they are. chip_name: of `chips.CHIPS`. dumped: the `dump.Dump` of the same
    compilation, whose bundles are then simulated. kernel_seconds: {kernel name, as `kernel_time.name` gives it: seconds of one run}, which
    go before the table. wrap: as of `wire.Wires`. filled: as of `Setup.filled`, the
    shares of rows that a grouped product multiplies, and that a ragged exchange sends.
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
    summed = "seconds", "exposed", "shared", "flops", "bytes"
    for o in found:
        if o.calls * max(o.seconds, o.exposed) >= least * total:
            kept += [*small.values(), o]
            small = {}
            continue
        key = o.kind, o.layer, o.phase, o.calls, o.basis, o.axes, o.collective
        sums = {f: getattr(o, f) + getattr(small[key], f) for f in summed} if key in small else None
        small[key] = dataclasses.replace(small[key], name=small[key].name.removesuffix(" ...") + " ...", **sums) if sums else o
    return [*kept, *small.values()]


class _Clock:
    """What is under way while a computation runs: collectives on the links, and what the copies still have to move."""

    def __init__(self):
        self.links = Links()
        self.collectives = {}  # start -> [(index of its operation, its Transfer)]
        self.copies = {}  # start -> seconds left; they run one after the other
        self.sent = {}  # recv -> rendezvous, rendezvous -> send

    @property
    def now(self):
        """Seconds since the computation started."""
        return self.links.now

    def run(self, seconds, of_hbm):
        """The sequencer is busy; copies go on in the time that HBM is not."""
        self.links.advance(self.now + seconds)
        self._copy(max(0.0, seconds - of_hbm))

    def _copy(self, seconds):
        for name in self.copies:
            done = min(seconds, self.copies[name])
            self.copies[name] -= done
            seconds -= done

    def wait(self, transfer):
        """Seconds that the sequencer stands still until a transfer has ended."""
        waited = self.links.finish(transfer)
        self._copy(waited)
        return waited

    def finish_copy(self, name):
        """Seconds waited for a copy and those before it."""
        waited = 0.0
        for other in list(self.copies):
            waited += self.copies.pop(other)
            if other == name:
                break
        self.links.advance(self.now + waited)
        return waited


class _Player:
    def __init__(self, module, mesh, chip, wires, origins, costs, kernel_seconds, filled):
        self.module, self.mesh, self.chip, self.wires, self.origins = module, mesh, chip, wires, origins
        self.costs, self.kernel_seconds, self.traffic = costs, kernel_seconds, traffic.Traffic(module)
        self.cycle, (self.filled, self.sent) = movement.cycle(chip), filled

    def play(self, computation, calls):
        """(operations, seconds of one run) of a computation that runs `calls` times."""
        clock, found = _Clock(), []
        for instruction in self.module.computations[computation]:
            self._one(instruction, calls, clock, found)
        seconds = clock.now
        for flying in clock.collectives.values():  # nobody here waits for them
            for number, transfer in flying:
                clock.links.finish(transfer)
                found[number] = _ended(found[number], transfer)
        return found, seconds

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
            c = dataclasses.replace(c, size=c.size * self.sent) if c.kind == "ragged-all-to-all" else c
            time = self.wires.time(c)
            transfer = clock.links.start(time.seconds, time.links)
            known = {"bytes": c.sent, "axes": c.axes, "collective": c.kind, **self._origin(i)}
            operation = Operation(i.name, "collective", calls, time.seconds, "wire model", **known)
            if asynchronous:
                clock.collectives.setdefault(names[0] if names else i.name, []).append((len(found), transfer))
            else:
                operation = _ended(operation, transfer, clock.wait(transfer))
            found.append(operation)

    def _done(self, i, calls, clock, found):
        start = i.operands[0] if i.operands else ""
        start = clock.sent.get(clock.sent.get(start, start), start)
        if start in clock.collectives:
            self._wait(start, clock, found)
        elif start in clock.copies and (waited := clock.finish_copy(start)):
            found.append(Operation(start, "memory", calls, waited, "closed form", bytes=waited * self.chip.bandwidth, **self._origin(i)))

    def _wait(self, start, clock, found):
        """Until a collective under way ends; one that a loop's body starts and its next run awaits is not under way here."""
        for number, transfer in clock.collectives.pop(start, ()):
            found[number] = _ended(found[number], transfer, clock.wait(transfer))

    def _copy_seconds(self, i):
        """A copy in the background: to or from HBM at its bandwidth, twice that within HBM, slowly to the host's memory (space 5)."""
        ends = re.findall(r"\w+\[[\d,]*\](?:\{[^{}]*\})?", i.type)[:2]
        if any("S(5)" in end for end in ends):
            return traffic.hbm_bytes(re.sub(r"S\(\d+\)", "", ends[-1])) / chips.HOST_BYTES
        size = traffic.hbm_bytes(re.sub(r"S\(\d+\)", "", ends[-1]))
        return size * sum(map(traffic.on_hbm, ends)) / self.chip.bandwidth


def _ended(operation, transfer, exposed=0.0):
    """The operation of a transfer that has ended and that the chip waited for so long."""
    return dataclasses.replace(operation, exposed=exposed, shared=max(0.0, transfer.flight - operation.seconds))

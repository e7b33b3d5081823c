"""What is known of a program's schedule: cycles of each instruction, and how it uses the units of a core."""
import dataclasses


@dataclasses.dataclass(frozen=True)
class Hot:
    """The stretch of bundles, all run equally often, that takes most of the time."""

    first: int
    last: int  # exclusive
    executions: float  # on all cores
    share: float  # of all bundles issued
    matmul_wait: float  # cycles, all cores
    mxu: float | None  # share of the matrix units' time in which they take in rows, 0 to 1; None where they are not modelled
    slots: dict[str, float]  # share of each unit's issue slots, 0 to 1
    used: dict[str, float]  # slots issued, all cores


@dataclasses.dataclass(frozen=True)
class Loop:
    first: int
    last: int
    trips: tuple[int, ...]  # how often each core jumped back


@dataclasses.dataclass(frozen=True)
class OpCost:
    """One instruction of the program. The fields after `estimate` are empty where no bundles were simulated.

    A kernel whose tables differ from run to run (in a scan) has the means of its runs.
    """

    name: str
    opcode: str
    calls: int  # how often it runs
    source: str  # "bundles": simulated; "libtpu": by libtpu's own simulator; "estimate": XLA's cost model; "unpriced": nobody knows
    cycles: float  # one call, the slower core
    estimate: float = 0.0  # by XLA's cost model; 0 where it says nothing, as of kernels
    bundles: int = 0  # length of its code
    core_cycles: tuple[float, ...] = ()
    issued: tuple[float, ...] = ()  # bundles that ran, per core
    dma_wait: float = 0.0  # cycles, the slower core
    matmul_wait: float = 0.0  # cycles, the slower core: waits for a matrix unit that is not free yet
    mxu: float | None = None  # as in Hot, over all cores
    dma_bytes: float = 0  # all cores
    slots: dict[str, float] = dataclasses.field(default_factory=dict)  # share of issue slots used, 0 to 1, over all cores
    used: dict[str, float] = dataclasses.field(default_factory=dict)  # slots issued, all cores; "VSTORE:SPILL": spills
    hot: Hot | None = None
    loops: tuple[Loop, ...] = ()  # those with most trips
    unknown_loads: dict[str, int] = dataclasses.field(default_factory=dict)  # as in simulate.Run, summed over the cores
    unknown_ops: dict[str, int] = dataclasses.field(default_factory=dict)
    undecided: dict[str, int] = dataclasses.field(default_factory=dict)
    unfed: tuple[str, ...] = ()

    @property
    def is_kernel(self):
        return self.opcode == "kernel"

    def valu_per_register(self, scores: float, hot: bool = False) -> float:
        """Vector ALU operations per 1024 float32 scores, for a kernel that computes `scores` of them (hot: only its hottest stretch)."""
        return (self.hot.used if hot else self.used)["VALU"] / (scores / 1024)


@dataclasses.dataclass(frozen=True)
class Report:
    target: str
    generation: str
    calibrated: bool
    megahertz: float
    jax: str
    libtpu: str
    argument_bytes: int
    temp_bytes: int
    ops: tuple[OpCost, ...]  # in order of execution

    @property
    def cycles(self) -> float:
        return sum(op.calls * op.cycles for op in self.ops)

    @property
    def microseconds(self) -> float:
        return self.cycles / self.megahertz

    @property
    def kernels(self) -> tuple[OpCost, ...]:
        return tuple(op for op in self.ops if op.is_kernel)

    @property
    def unpriced(self) -> tuple[str, ...]:
        """Instructions whose time is missing from the sum."""
        return tuple(op.name for op in self.ops if op.source == "unpriced")

    def table(self) -> str:
        """Lines for people: the costliest instructions and the units of each."""
        issued = any(op.source == "bundles" for op in self.ops)
        note = "" if self.calibrated else f" ({'bundles issued, ' if issued else ''}not calibrated on this generation)"
        lines = [f"{self.target} on {self.generation}: {self.cycles:,.0f} cycles = {self.microseconds:,.1f} us{note}"]
        for op in sorted(self.ops, key=lambda op: -op.calls * op.cycles)[:12]:
            lines.append(f"  {op.calls}x {op.name[:40]:40s} {op.cycles:12,.0f} cycles  {op.source}{_units(op)}")
        return "\n".join(lines + ([f"  without a price: {', '.join(self.unpriced)}"] if self.unpriced else []))


def _units(op):
    if not op.hot:
        return ""
    names = [name for name in op.slots if name in ("VALU", "XLU", "EUP", "VLOAD", "VSTORE")]
    busy = "" if op.mxu is None else f"MXU busy {100 * op.mxu:.0f}/{100 * op.hot.mxu:.0f}; "
    shares = " ".join(f"{name} {100 * op.slots[name]:.0f}/{100 * op.hot.slots[name]:.0f}" for name in names)
    return f"; %, all/hot: {busy}slots {shares}; spills {op.used.get('VSTORE:SPILL', 0):,.0f} fills {op.used.get('VLOAD:FILL', 0):,.0f}"

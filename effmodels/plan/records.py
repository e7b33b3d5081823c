"""What a plan is made of: plain records that every part of the planner fills or reads, and that go to JSON and back.

Bytes, FLOPs and seconds are those of one chip and one optimiser step (or one prefill, or one decoded token), unless a field says otherwise.
"""
import dataclasses

BASES = ("schedule", "libtpu", "cost model", "kernel table", "wire model", "closed form", "unpriced")
KINDS = ("matmul", "kernel", "memory", "collective")
PHASES = ("forward", "recomputed", "backward", "update")


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes in one chip's HBM at the fullest moment. available: what the compiler may use of it; 0 where nobody knows."""

    available: int
    parameters: int
    optimizer: int = 0
    buffers: int = 0
    batch: int = 0
    gradients: int = 0  # the accumulator and what the backward pass makes
    activations: int = 0  # kept for the backward pass, or the decoding state
    temporaries: int = 0  # the rest of what the compiler allocates
    program: int = 0

    @property
    def total(self):
        return sum(getattr(self, name) for name in MEMORY_PARTS)

    @property
    def fits(self):
        return not self.available or self.total <= self.available


MEMORY_PARTS = tuple(f.name for f in dataclasses.fields(Memory) if f.name != "available")


@dataclasses.dataclass(frozen=True)
class Operation:
    """One instruction of the compiled program, or one term of the closed form, in the order of execution.

    seconds, exposed and shared are of one call, the latter two of collectives only: exposed is the part in which the chip computes nothing,
    shared what the transfer took longer than it does alone, because others were on the same links.
    """

    name: str
    kind: str  # of KINDS
    calls: int
    seconds: float
    basis: str  # of BASES: where the seconds come from
    exposed: float = 0.0
    shared: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0  # moved to and from HBM; of a collective: sent by one chip
    axes: tuple[str, ...] = ()  # of a collective
    collective: str = ""  # all-gather, ...
    layer: str = ""  # attention, retention, mlp, moe, norm, embed, head, loss, optimizer; "" where nobody knows
    phase: str = ""  # of PHASES
    source: str = ""  # file.py:line

    @property
    def total(self):
        """Seconds that the step gets longer by this operation."""
        return self.calls * (self.exposed if self.kind == "collective" else self.seconds)

    @property
    def flight(self):
        """Seconds from start to end of one call."""
        return self.seconds + self.shared

    @property
    def hidden(self):
        """Share of a transfer's flight in which the chip computes; 0 of one that takes no time."""
        return max(0.0, 1 - self.exposed / self.flight) if self.flight else 0.0


@dataclasses.dataclass(frozen=True)
class Plan:
    """The answer for one config on one topology."""

    config: str  # as typed: configs/moe_1b.py:small
    what: str  # train, prefill, decode
    topology: str  # v4:4x4x4, cpu:8
    slices: int
    chip: str  # name of a chips.Chip
    chips: int  # in all slices
    mesh: dict[str, int]
    method: str  # compiled, memory (optimization level O0), fast (closed form)
    tokens: int  # of one step, all chips
    steps: int  # the run's
    model_flops: float  # of one step, all chips: the model's exact FLOPs, three forward passes, nothing recomputed
    executed_flops: float  # the same with what is recomputed
    memory: Memory
    operations: tuple[Operation, ...]  # empty where only memory was asked for, or where the program does not fit
    bubble: float = 0.0  # share of the slots of a pipeline that are idle
    imbalance: float = 0.0  # share of the time that the chips of a ring wait for the slowest
    host_save_bytes: int = 0  # of host memory while a checkpoint is written, per host
    offloaded_bytes: int = 0  # of host memory, per chip: activations that wait there for the backward pass
    checkpoint_bytes: int = 0  # of one checkpoint
    input_bytes_per_second: float = 0.0  # that the data path must sustain, all hosts
    out_of_memory: str = ""  # the compiler's own words where it gave up
    notes: tuple[str, ...] = ()  # what a reader must know: assumptions, what is not priced
    versions: dict[str, str] = dataclasses.field(default_factory=dict)  # jax, libtpu, effmodels
    compile_seconds: float = 0.0
    largest: tuple[tuple[str, int], ...] = ()  # (what, bytes) of the largest buffers at the fullest moment
    peak_flops: float = 0.0  # FLOP/s of one chip; of a CPU: as measured; 0 where nobody knows
    bandwidth: float = 0.0  # bytes/s of its main memory; 0 where nobody knows
    band: tuple[float, ...] = ()  # measured over estimated seconds where this method was calibrated, (lowest, highest); else ()

    @property
    def fits(self):
        return self.memory.fits and not self.out_of_memory

    @property
    def seconds(self):
        """The estimate of one step; 0 without operations."""
        return sum(o.total for o in self.operations)

    @property
    def bound(self):
        """Seconds that the model's own FLOPs take at the chips' peak: no step is shorter; 0 where the peak is not known."""
        return self.model_flops / (self.chips * self.peak_flops) if self.peak_flops else 0.0

    @property
    def mfu(self):
        """Share of the peak that the model's own FLOPs use (what is recomputed does not count); 0 without an estimate or a peak."""
        return self.bound / self.seconds if self.seconds else 0.0

    @property
    def exposed(self):
        """Seconds of a step in which the chip waits for others."""
        return sum(o.total for o in self.operations if o.kind == "collective")


def to_json(plan):
    """A Plan as plain dicts and lists."""
    return dataclasses.asdict(plan)


def from_json(fields):
    """The Plan of `to_json`'s dict, perhaps read back from a file."""
    operations = tuple(Operation(**{**o, "axes": tuple(o["axes"])}) for o in fields["operations"])
    lists = {name: tuple(fields[name]) for name in ("notes", "band") if name in fields}
    lists["largest"] = tuple((what, size) for what, size in fields.get("largest", ()))
    return Plan(**{**fields, "memory": Memory(**fields["memory"]), "operations": operations, **lists})

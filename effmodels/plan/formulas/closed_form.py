"""A plan without compiling: memory, FLOPs, what travels and how long it takes, by formula, for any mesh of any chip, in about a second.

What a chip holds between steps is exact. What the backward pass needs is read off one row's jaxpr (`footprint`), what travels follows from
the rules (`volumes`). Seconds are FLOPs and bytes over the rates below, which are shares of the chip's peaks.
"""
import collections
import importlib.metadata
import itertools
import math

import jax
import jax.numpy as jnp

from effmodels.parallel import layouts, pipeline
from effmodels.plan import budgets
from effmodels.plan.formulas import abstract, closed_serving, liveness, volumes
from effmodels.plan.formulas.footprint import Footprint
from effmodels.plan.records import Operation, Plan

BASIS = "closed form"
MATMUL = 0.85  # of the peak: XLA's matmuls of the sizes of a layer; alone they reach 0.93 to 0.98 on v4 by the compiler's schedule
HBM = 0.8  # of the memory's bandwidth: fusions that are one pass over large arrays
HEAD = (0.88, 0.61)  # linear_cross_entropy, forward and backward, in useful FLOPs (docs/benchmarks/v4_schedule.json)
# Useful FLOPs by `cost` over time at the peak, forward and backward (the same file); OTHER for a kind that was not measured.
KERNELS = {"attention": (0.54, 0.45), "retention": (0.2, 0.35), "moe": (0.79, 0.76)}
OTHER = (0.3, 0.3)
HIDDEN = ("all-gather", "collective-permute")  # run beside the layers' work where there is enough of it; all others are waited for


def plan(config, topology, mesh=None, what="train", *, name=""):
    """The `Plan` of a config (mapping) on a `topology.Topology`; mesh: axis sizes instead of the config's; name: the config as typed.

    what: train, prefill (of batch_size sequences of seq_len tokens) or decode (one token after seq_len others). Raises ConfigError as
    training does.
    """
    return price(abstract.run(config, topology, mesh), topology, what, name=name)


def price(run, topology, what="train", *, name=""):
    """The `Plan` of an `abstract.Run`."""
    if what not in ("train", "prefill", "decode"):
        raise ValueError(f"what={what!r} is unknown; expected train, prefill or decode.")
    chip, c = topology.chip, run.config
    notes = ["closed form: nothing was compiled; memory within about 10 %, seconds are shares of the peak (no calibration on hardware)"]
    if what != "train":
        memory, operations, flops, more = closed_serving.price(run, topology, what, lambda names: bandwidth(names, run, topology))
        notes += more
        model = executed = flops
        tokens, bubble, imbalance = c.batch_size * (c.seq_len if what == "prefill" else 1), 0.0, 0.0
    else:
        work = Work(run, chip)
        memory, operations = work.footprint.memory(), work.operations(topology)
        model, executed = run.cost.train_flops_per_token * c.seq_len * c.batch_size, work.executed()
        tokens, bubble, imbalance = c.seq_len * c.batch_size, work.bubble, work.imbalance
        notes += work.notes()
    checkpoint = sum(a.size * jnp.dtype(a.dtype).itemsize for a in jax.tree.leaves(run.model.state)) if what == "train" else 0
    saving = budgets.saving(checkpoint, topology.hosts, asynchronous=c.checkpoint.mode != "sync")
    seconds = sum(o.total for o in operations)
    return Plan(
        config=name, what=what, topology=topology.name, slices=topology.slices, chip=chip.name, chips=topology.chips, mesh=dict(run.sizes),
        method="fast", tokens=tokens, steps=c.steps if what == "train" else 1, model_flops=model, executed_flops=executed, memory=memory,
        operations=operations, bubble=bubble, imbalance=imbalance, host_save_bytes=saving.host_bytes, checkpoint_bytes=checkpoint,
        input_bytes_per_second=budgets.input_rate(tokens, seconds, c.model.vocab_size) if what == "train" else 0.0, notes=tuple(notes),
        versions={"jax": importlib.metadata.version("jax")}, peak_flops=chip.flops, bandwidth=chip.bandwidth,
    )  # fmt: skip


class Work:
    """One training step of an `abstract.Run` on a `chips.Chip`."""

    def __init__(self, run, chip):
        self.run, self.chip, self.footprint = run, chip, Footprint(run, chip)
        self.runs, self.periods = self.footprint.runs, self.footprint.periods
        self.compute = self.footprint.compute

    def executed(self):
        """FLOPs of one step, all chips, with what is recomputed."""
        c = self.run.config
        # A kernel over a split sequence sees the keys of all shards, one row of one shard only its own.
        periods = self.periods if self.run.time == c.seq_len else self.footprint.traced(c.model.remat, c.seq_len)
        layers = sum(sum(p.flops) * r.repeats for r, p in zip(self.runs, periods)) * c.batch_size
        return layers + liveness.head_flops(self.run.model.resolved, c.seq_len, self.chip) * c.batch_size

    @property
    def bubble(self):
        """The share of a pipeline's slots without work."""
        run = self.run
        return pipeline.bubble_share(run.stages, run.micro_batches, run.options.rounds) if run.stages > 1 else 0.0

    @property
    def imbalance(self):
        """The share of the time that the mean chip of a ring waits, over the attention layers."""
        run, pieces = self.run, self.run.parts("seq")
        windows = [k.mixer.config.window for r in self.runs for k in r.kinds if hasattr(k.mixer.config, "window")]
        if pieces == 1 or not windows:
            return 0.0
        return 1 - sum(layouts.balance(run.options.layout, run.config.seq_len, pieces, w) for w in windows) / len(windows)

    def operations(self, topology):
        """The `Operation`s of one step in the order of execution, collectives beside the work of their phase."""
        found = []
        for phase in ("forward", "recomputed", "backward", "update"):
            work = [*self._layers(phase), *self._head(phase), *self._elementwise(phase), *self._optimizer(phase)]
            free = sum(o.total for o in work)
            found += [o for o in work if o.seconds]
            for v in volumes.volumes(self.run):
                if v.phase == phase:
                    seconds = v.bytes / bandwidth(v.axes, self.run, topology)
                    covered = min(free, v.calls * seconds) if v.collective in HIDDEN else 0.0
                    free -= covered
                    found.append(Operation(
                        name=f"{v.layer or 'pipeline'} {v.collective}", kind="collective", calls=v.calls, seconds=seconds, basis=BASIS,
                        exposed=seconds - covered / v.calls, bytes=v.bytes, axes=v.axes, collective=v.collective, layer=v.layer,
                        phase=phase,
                    ))  # fmt: skip
        return tuple(found)

    def _layers(self, phase):
        run, c = self.run, self.run.config
        calls = volumes.calls(run)
        idle = 1 / (1 - self.bubble)
        for r, period in zip(self.runs, self.periods):
            number = max(1, r.repeats // run.stages) * calls if r.repeats > 1 else calls
            for part, count in collections.Counter(part for kind in r.kinds for part in (kind.mixer, kind.channel)).items():
                cost = part.cls.cost(part.config, run.model.resolved.env, c.seq_len, self.compute)
                products = 2 * cost.active_params * c.seq_len
                by_kernel = cost.flops if getattr(part.cls, "reports_load", False) else cost.flops - products
                again = 1.0 if volumes.recomputes(run, "kernel") else 0.0
                shares = {"forward": (1, 1), "recomputed": (period.recomputed, again), "backward": (2, 2)}.get(phase, (0, 0))
                rate = KERNELS.get(volumes.label(part), OTHER)[phase == "backward"]
                kinds = (("matmul", cost.flops - by_kernel, shares[0], MATMUL), ("kernel", by_kernel, shares[1], rate))
                for what, flops, share, efficiency in kinds:
                    each = share * flops * r.repeats * c.batch_size / run.chips / number
                    seconds = each / (self.chip.flops * efficiency) * (idle if r.repeats > 1 else 1)
                    yield Operation(
                        name=f"{part.name} {what}", kind=what, calls=number * count, seconds=seconds, basis=BASIS, flops=each,
                        layer=volumes.label(part), phase=phase,
                    )  # fmt: skip

    def _head(self, phase):
        c, m = self.run.config, self.run.micro_batches
        share = {"forward": 2, "backward": 4}.get(phase, 0)
        each = share * c.model.vocab_size * c.model.d_model * c.seq_len * c.batch_size / self.run.chips / m
        seconds = each / (self.chip.flops * HEAD[phase == "backward"])
        yield Operation(name="head and loss", kind="kernel", calls=m, seconds=seconds, basis=BASIS, flops=each, layer="head", phase=phase)

    def _elementwise(self, phase):
        """Fusions between matmuls: about one and a half arrays read per array written; the forward pass makes a third of the backward's."""
        share = {"forward": 1 / 3, "recomputed": 1 / 3 if self.run.config.model.remat != "none" else 0, "backward": 2 / 3}.get(phase, 0)
        for r, period in zip(self.runs, self.periods):
            number = max(1, r.repeats // self.run.stages) * volumes.calls(self.run) if r.repeats > 1 else self.run.micro_batches
            moved = share * 2.5 * sum(self.footprint.nbytes(a) for a in period.working if a.elementwise and not a.weight)
            seconds = moved / (self.chip.bandwidth * HBM)
            yield Operation(name="elementwise", kind="memory", calls=number, seconds=seconds, basis=BASIS, bytes=moved, phase=phase)

    def _optimizer(self, phase):
        """Reads the state and the gradients, writes the state."""
        moved = 2 * (self.run.bytes("params") + self.run.bytes("opt_state")) + 2 * self.run.bytes("params") if phase == "update" else 0
        seconds = moved / (self.chip.bandwidth * HBM)
        yield Operation(name="optimizer", kind="memory", calls=1, seconds=seconds, basis=BASIS, bytes=moved, layer="optimizer", phase=phase)

    def notes(self):
        """What a reader must know of this plan."""
        run, found = self.run, []
        if run.over("seq") and run.options.attention == "ulysses":
            found.append("ulysses: what travels is taken as that of gathered keys, which is more")
        unknown = sorted({volumes.label(k.mixer) for r in self.runs for k in r.kinds} - set(KERNELS))
        if unknown:
            found.append(f"no kernel of {', '.join(unknown)} was measured: {OTHER[0]:.0%} of the peak is assumed")
        if self.chip.platform != "tpu":
            found.append("memory and rates were compared with programs for TPU v4 only")
        return found


def bandwidth(names, run, topology):
    """Bytes/s that one chip sends over these mesh axes: on the links of its torus (`links`), or on the network between slices."""
    chip = topology.chip
    if topology.slices > 1 and set(names) & {"data", "stage"}:
        return chip.dcn / chip.per_host
    if chip.platform != "tpu":
        return chip.ici
    return chip.ici * links(run.size(names), topology)


def links(number, topology):
    """Links on which each of `number` devices of a slice sends to the others: two in a ring, one in a line, as `wire` counts them.

    Assumption: they fill as many whole dims of the torus as they can, and lie side by side in a part of another.
    """
    dims, inside = [(n, 1 + wraps) for n, wraps in zip(topology.shape, topology.wrap) if n > 1], topology.chip.devices_per_chip
    if number <= inside:  # devices of one chip: as fast as all its links
        return 2 * topology.chip.torus_dims
    number //= inside
    boxes = [box for count in range(len(dims) + 1) for box in itertools.combinations(dims, count)]
    fits = [box for box in boxes if number % math.prod(n for n, _ in box) == 0]
    whole = max(fits, key=lambda box: (math.prod(n for n, _ in box), len(box)))
    rest = number > math.prod(n for n, _ in whole) and len(whole) < len(dims)
    return max(1, sum(ways for _, ways in whole) + rest)

"""A plan without compiling: memory, FLOPs, what travels and how long it takes, by formula, for any mesh of any chip, in about a second.

What a chip holds between steps is exact. What the backward pass needs is read off one row's jaxpr (`footprint`), what travels follows from
the rules (`volumes`). Seconds are FLOPs and bytes over the rates below, which are shares of the chip's peaks.
"""
import collections
import importlib.metadata
import math

import jax
import jax.numpy as jnp

from effmodels.models import mtp
from effmodels.models.blocks import Run
from effmodels.parallel import layouts, pipeline
from effmodels.plan import budgets
from effmodels.plan.chips import HOST_BYTES
from effmodels.plan.formulas import abstract, closed_serving, liveness, torus, volumes
from effmodels.plan.formulas.footprint import Footprint
from effmodels.plan.records import Operation, Plan

BASIS = "closed form"
PARTS = ("mixer", "channel")
AHEAD = "mtp.{}.layer"
# Of the peak, forward and backward, as matmuls and what is fused with them came out in the programs of docs/plans; alone they reach 0.93.
MATMUL = (0.91, 0.83)
OPERANDS = 0.5  # of the time to move a matmul's operands and result is not hidden behind its arithmetic
HBM = 0.8  # of the memory's bandwidth: fusions that are one pass over large arrays
HEAD = (0.88, 0.61)  # linear_cross_entropy, forward and backward, in useful FLOPs (docs/benchmarks/v4_schedule.json)
# Useful FLOPs by `cost` over time at the peak, forward and backward (the same file); OTHER for a kind that was not measured.
KERNELS = {"attention": (0.54, 0.45), "retention": (0.52, 0.46), "moe": (0.79, 0.76)}
OTHER = (0.3, 0.3)
HIDDEN = ("all-gather", "collective-permute")  # run beside the layers' work where there is enough of it; all others are waited for
BEFORE = 4  # passes over the residual stream before a layer's first matmul, behind which its weight is gathered


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
    offloaded = 0
    if what != "train":
        memory, operations, flops, more = closed_serving.price(run, what)
        notes += more
        model = executed = flops
        tokens, bubble, imbalance = c.batch_size * (c.seq_len if what == "prefill" else 1), 0.0, 0.0
    else:
        work = Work(run, chip)
        memory, operations, offloaded = work.footprint.memory(), work.operations(), work.footprint.offloaded()
        model, executed = run.cost.train_flops_per_token * c.seq_len * c.batch_size, work.executed()
        tokens, bubble, imbalance = c.seq_len * c.batch_size, work.bubble, work.imbalance
        notes += work.notes()
    checkpoint = sum(a.size * jnp.dtype(a.dtype).itemsize for a in jax.tree.leaves(run.model.state)) if what == "train" else 0
    saving = budgets.saving(checkpoint, topology.hosts, asynchronous=c.checkpoint.mode != "sync")
    seconds = sum(o.total for o in operations)
    return Plan(
        config=name, what=what, topology=topology.name, slices=topology.slices, chip=chip.name, chips=topology.chips, mesh=dict(run.sizes),
        method="fast", tokens=tokens, steps=c.steps if what == "train" else 1, model_flops=model, executed_flops=executed, memory=memory,
        operations=operations, bubble=bubble, imbalance=imbalance, host_save_bytes=saving.host_bytes, offloaded_bytes=offloaded,
        checkpoint_bytes=checkpoint,
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
        layers += (3 + (c.model.remat != "none")) * (self._image_flops() + self._join_flops())
        ahead, number = self.footprint.ahead(c.model.remat, c.seq_len)
        head = liveness.head_flops(self.run.model.resolved, c.seq_len, self.chip)
        return layers + (number * sum(ahead.flops) + (1 + number) * head) * c.batch_size

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

    def operations(self):
        """The `Operation`s of one step in the order of execution, collectives beside the work of their phase."""
        found = []
        for phase in ("forward", "recomputed", "backward", "update"):
            work = [*self._beside(phase), *self._layers(phase), *self._head(phase), *self._between(phase), *self._optimizer(phase)]
            free = sum(o.total for o in work)
            work += self._offloaded(phase, free)
            found += [o for o in work if o.seconds]
            for v in volumes.volumes(self.run):
                if v.phase == phase:
                    seconds = v.bytes / torus.bandwidth(v.axes, self.run, v.collective)
                    covered = min(free, v.calls * self._hideable(v, seconds))
                    free -= covered
                    found.append(Operation(
                        name=f"{v.layer or 'pipeline'} {v.collective}", kind="collective", calls=v.calls, seconds=seconds, basis=BASIS,
                        exposed=seconds - covered / v.calls, bytes=v.bytes, axes=v.axes, collective=v.collective, layer=v.layer,
                        phase=phase,
                    ))  # fmt: skip
        return tuple(found)

    def _offloaded(self, phase, free):
        """The wait for what goes to the host's memory in the forward pass and comes back for the backward pass, beside `free` seconds."""
        offloaded = self.footprint.offloaded() if phase in ("forward", "backward") else 0
        if not offloaded:
            return []
        times = self.run.micro_batches if self.run.stages == 1 else 1
        waited = max(0.0, times * offloaded / HOST_BYTES - free) / times
        return [Operation(name="host's memory", kind="memory", calls=times, seconds=waited, basis=BASIS, bytes=offloaded, phase=phase)]

    def _hideable(self, v, seconds):
        """Of the seconds of a Volume, those that can pass while its layer works, where there is enough work.

        Sums are waited for. So is the first weight that a mixer gathers, but for the norm before it: a program gathers what a layer needs
        while that layer runs, not earlier.
        """
        if v.collective not in HIDDEN or v.collective == "all-gather" and not volumes.asynchronous(self.run):
            return 0.0
        mixers = {volumes.label(part) for part, _ in volumes.parts(self.run, "mixer")}
        if v.collective == "all-gather" and v.layer in mixers and v.phase != "update":
            before = BEFORE * self.footprint.stream() / (self.chip.bandwidth * HBM)
            return seconds - max(0.0, seconds / v.pieces - before)
        return seconds

    def _operands(self, prefix):
        """Bytes that the matmuls with the weights under this path read and write in one call, on one chip."""
        run, total = self.run, 0
        for path, array in run.model.state.params.items():
            info = run.model.infos[path]
            if path.startswith(prefix) and info.is_matrix and "expert" not in info.dim_names:
                sizes = [(d, n) for d, n in zip(info.dim_names, array.shape) if d != "layers"]
                into = math.prod(n for d, n in sizes if d in info.in_dims)
                out = math.prod(n for d, n in sizes if d not in info.in_dims)
                total += run.rows * run.time * (into + out) + into * out
        return total * self.compute / run.size(run.over("act_heads", "act_mlp"))

    def _groups(self):
        """(Run, Period, how often a chip runs it in a step, where its parameters are) of all layers, those of `model.mtp` last."""
        run = self.run
        for index, (r, period) in enumerate(zip(self.runs, self.periods)):
            number = volumes.in_a_call(run, r.repeats) * volumes.calls(run) if r.repeats > 1 else run.micro_batches
            yield r, period, number, f"segments.{index}.blocks.{{}}"
        period, number = self.footprint.ahead(run.config.model.remat, run.time)
        if number:
            yield Run(run.config.model.num_layers, (run.model.resolved.ahead,), number), period, number * run.micro_batches, AHEAD

    def _layers(self, phase):
        run, c = self.run, self.run.config
        for r, period, number, where in self._groups():
            idle = 1 / (1 - self.bubble) if r.repeats > 1 and where != AHEAD else 1
            places = {getattr(kind, name): f"{where.format(i)}.{name}." for i, kind in enumerate(r.kinds) for name in PARTS}
            for part, count in collections.Counter(getattr(kind, name) for kind in r.kinds for name in PARTS).items():
                moved = OPERANDS * self._operands(places[part])
                cost = part.cls.cost(part.config, run.model.resolved.env, c.seq_len, self.compute)
                products = 2 * cost.active_params * c.seq_len
                by_kernel = cost.flops if getattr(part.cls, "reports_load", False) else cost.flops - products
                again = 1.0 if volumes.recomputes(run, "kernel") else 0.0
                shares = {"forward": (1, 1), "recomputed": (period.recomputed, again), "backward": (2, 2)}.get(phase, (0, 0))
                rate = KERNELS.get(volumes.label(part), OTHER)[phase == "backward"]
                at_peak = MATMUL[phase == "backward"]
                kinds = (("matmul", cost.flops - by_kernel, shares[0], at_peak, moved), ("kernel", by_kernel, shares[1], rate, 0.0))
                for what, flops, share, efficiency, bytes_ in kinds:
                    each = share * flops * r.repeats * c.batch_size / run.chips / number
                    seconds = each / (self.chip.flops * efficiency) + share * bytes_ / self.chip.bandwidth
                    seconds *= idle
                    yield Operation(
                        name=f"{part.name} {what}", kind=what, calls=number * count, seconds=seconds, basis=BASIS, flops=each,
                        layer=volumes.label(part), phase=phase,
                    )  # fmt: skip

    def _image_flops(self):
        """FLOPs of the images of a step, forward: encoder, resampler, fusion."""
        c, media = self.run.config, self.run.model.resolved.media
        work = None if media is None else media.work(c.model.d_model)
        return 0.0 if work is None else (work.flops + work.flops_per_token * c.seq_len) * c.batch_size

    def _join_flops(self):
        """FLOPs of a step, forward, that join hidden states with embeddings of further tokens (`model.mtp`)."""
        c, ahead = self.run.config, mtp.check(self.run.config.model.mtp)
        return ahead.depth * (ahead.form == "sequential") * 2 * 2 * c.model.d_model**2 * c.seq_len * c.batch_size

    def _beside(self, phase):
        """Matmuls outside the layers."""
        m, again = self.run.micro_batches, self.run.config.model.remat != "none"
        share = {"forward": 1, "recomputed": again, "backward": 2}.get(phase, 0)
        for name, flops in (("images", self._image_flops()), ("mtp", self._join_flops())):
            each = share * flops / self.run.chips / m
            seconds = each / (self.chip.flops * MATMUL[phase == "backward"])
            yield Operation(name=name, kind="matmul", calls=m, seconds=seconds, basis=BASIS, flops=each, layer=name, phase=phase)

    def _head(self, phase):
        c, m = self.run.config, self.run.micro_batches * (1 + mtp.check(self.run.config.model.mtp).depth)
        share = {"forward": 2, "backward": 4}.get(phase, 0)
        each = share * c.model.vocab_size * c.model.d_model * c.seq_len * c.batch_size / self.run.chips / self.run.micro_batches
        seconds = each / (self.chip.flops * HEAD[phase == "backward"])
        yield Operation(name="head and loss", kind="kernel", calls=m, seconds=seconds, basis=BASIS, flops=each, layer="head", phase=phase)

    def _between(self, phase):
        """What lies between the matmuls; the forward pass makes a third of the arrays of the backward pass, its recomputation included."""
        run = self.run
        again = run.config.model.remat != "none"
        share = {"forward": 1 / 3, "recomputed": again / 3, "backward": 2 / 3}.get(phase, 0)
        found = []
        for _, period, number, _ in self._groups():
            moved = sum(a.passes * self.footprint.nbytes(a) for a in period.working if not a.weight)
            found.append(("elementwise", "", number, share * moved))
        if phase in ("forward", "backward") or again and phase == "recomputed":
            for part, times in volumes.parts(run, "channel"):
                if part.cls.reports_load and volumes.travels(run):
                    # There and back: rows of experts are gathered, what arrives is gathered too and changes its layout.
                    way, row = volumes.way(run, part.config), run.size(run.over("expert")) * run.config.model.d_model * self.compute
                    moved = 2 * row * (liveness.FUSION * way.rows + (liveness.FUSION + 2) * way.arriving)
                    found.append(("exchange", volumes.label(part), times, moved))
        for name, layer, calls, moved in found:
            seconds = moved / (self.chip.bandwidth * HBM)
            yield Operation(
                name=name, kind="memory", calls=calls, seconds=seconds, basis=BASIS, bytes=moved, layer=layer, phase=phase
            )  # fmt: skip

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
        if run.model.resolved.media is not None:
            found.append("images: activations of their encoder are not in the memory of this closed form; compiling counts them")
        if self.chip.platform != "tpu":
            found.append("memory and rates were compared with programs for TPU v4 only")
        return found

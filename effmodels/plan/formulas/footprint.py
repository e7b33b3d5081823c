"""Memory of one training step by formula: what a chip holds, and what is alive at the fullest moment of the backward pass.

That moment is in the backward pass of a period of layers, or of the head: all that waits for it, one period's working set (`liveness`), the
gradients, and the weights in the compute dtype, which the compiler casts once before the layers run.
"""
import functools
import math

import jax.numpy as jnp

from effmodels.config import named_remat
from effmodels.models import mtp
from effmodels.models.blocks import segments
from effmodels.parallel import axes, expert, scatter
from effmodels.plan.formulas import liveness, volumes
from effmodels.plan.records import Memory

# Bytes beside HBM that the compiler fills with temporaries first: CMEM of TPU v4.
BESIDE_HBM = {"v4": 2**27}
CHUNK = 4096  # columns of the vocabulary that the head's loss holds at once
PROGRAM = 30e6  # bytes of a TPU's instructions for each layer that the program spells out: 23 to 50 MB
BATCH_BYTES = 20  # per token: tokens, targets, weights, documents, positions


class Footprint:
    """The layers of an `abstract.Run` as a `chips.Chip` holds them."""

    def __init__(self, run, chip):
        self.run, self.chip, self.config = run, chip, run.config.model
        self.runs = segments(run.model.resolved.layers, self.config.scan_layers)
        self.compute = jnp.dtype(self.config.compute_dtype).itemsize

    @functools.cached_property
    def periods(self):
        """The `liveness.Period` of every run of layers."""
        return self.traced(self.config.remat, self.run.time)

    def traced(self, remat, time):
        """The periods under another policy, or for rows of another length."""
        return [liveness.period(self.run.model.resolved, r.kinds, remat, time, self.chip) for r in self.runs]

    def ahead(self, remat, time):
        """(`liveness.Period` of a module that predicts further tokens, how many there are)."""
        number = mtp.check(self.config.mtp).depth
        kinds = (self.run.model.resolved.ahead,) if number else ()
        return liveness.period(self.run.model.resolved, kinds, remat, time, self.chip), number

    def memory(self):
        """The `Memory` of one chip."""
        run = self.run
        ahead, modules = self.ahead("none", run.time)  # a module is made again whole
        working = max(p.working_bytes(self.nbytes, r.repeats > 1) for r, p in zip(self.runs, self._at_work()))
        if modules:
            working = max(working, ahead.working_bytes(self.nbytes, False) + ahead.kept_bytes(self.nbytes))
        working += self._ring() + max((self._side_by_side(part) for part, _ in volumes.parts(run, "channel")), default=0)
        casts = sum(self._local(p) * self.compute for p, a in run.model.state.params.items() if a.dtype.itemsize != self.compute)
        # The gathered table is there before the layers run, and the head's gradient waits behind their backward pass for its sum.
        table = self._table() * self.compute
        gathered, waiting = (table if over else 0 for over in (self._gathered(), run.over("batch", "seq")))
        temporaries = max(working + waiting, self._head()) + gathered + casts - BESIDE_HBM.get(self.chip.name, 0)
        gradients = self._gradients()
        if run.micro_batches > 1 and run.stages == 1:
            gradients += run.bytes("params", jnp.dtype(run.config.train.accumulate_dtype).itemsize)
        copied, of_copied = map(sum, zip(*(self._rows(i, r) for i, r in enumerate(self.runs))))
        gradients += of_copied
        kept = sum(self._kept(i, r) for i, r in enumerate(self.runs)) + copied
        slots = math.ceil(run.micro_batches / run.stages) if run.stages > 1 else 1
        kept += modules * slots * 2 * self.stream()  # what enters a module: hidden states and embeddings
        program = PROGRAM * (sum(len(p.rows) for p in self.periods) + modules)
        return Memory(
            available=self.chip.hbm, parameters=run.bytes("params"), optimizer=run.bytes("opt_state"), buffers=run.bytes("buffers"),
            batch=run.micro_batches * run.rows * run.time * BATCH_BYTES, gradients=gradients, activations=int(kept),
            temporaries=int(max(0, temporaries)), program=int(program if self.chip.platform == "tpu" else 0),
        )  # fmt: skip

    def offloaded(self):
        """Bytes that wait in the host's memory for the backward pass, for one chip."""
        run, total = self.run, 0
        for r, period in zip(self.runs, self.periods):
            if run.stages == 1:
                times = r.repeats
            elif r.repeats == 1:
                times = math.ceil(run.micro_batches / run.stages)
            else:
                times = volumes.calls(run) * volumes.in_a_call(run, r.repeats)
            total += times * period.offloaded_bytes(self._waiting)
        return int(total)

    def nbytes(self, array):
        """Bytes of a `liveness.Array` on one chip."""
        return liveness.nbytes(array, self.run) * self._experts(array)

    def _waiting(self, array):
        """`nbytes` of what waits for the backward pass: of rows kept by the name "dispatch" what arrived, a token once for each shard."""
        names = named_remat(self.config.remat)
        return liveness.nbytes(array, self.run) * self._experts(array, arrived=names is not None and "dispatch" in (*names[0], *names[1]))

    def stream(self):
        """Bytes of the residual stream of one micro-batch."""
        return self.run.rows * self.run.time * self.config.d_model * self.compute

    def _kept(self, index, r):
        """Bytes that wait for the backward pass of a run of layers."""
        run, period = self.run, self.periods[index]
        kept = period.kept_bytes(self._waiting)
        if run.stages == 1:
            return kept * r.repeats
        slots = math.ceil(run.micro_batches / run.stages)
        if r.repeats == 1:  # outside of the pipeline the stages share out the micro-batches
            return kept * slots
        # Every tick keeps what entered the stage and what the policy names. What several layers of a tick keep is made again, all at once.
        repeats, ticks = volumes.in_a_call(run, r.repeats), volumes.calls(run)
        enters = self.stream() * run.size(run.over("seq")) / run.size(run.over("res_seq"))
        queues = slots * (self.stream() + 2 * enters) + self._mask() * slots
        if self.config.remat == "none":
            return ticks * repeats * kept + queues
        again = repeats * self._unnamed[index].kept_bytes(self.nbytes) if repeats > 1 else 0
        return ticks * (enters + repeats * (kept - self.stream())) + again + queues

    @functools.cached_property
    def _unnamed(self):
        return self.traced("none", self.run.time)

    def _at_work(self):
        """The periods as their backward pass runs: a stage of several layers has made again whatever they keep."""
        several = self.run.stages > 1 and any(volumes.in_a_call(self.run, r.repeats) > 1 for r in self.runs)
        return self._unnamed if several and self.config.remat != "none" else self.periods

    def _mask(self):
        """Bytes that say which tokens' rows of the table a chip has, where the vocabulary is split; in a pipeline they wait too."""
        split = self.run.size(a for a in self.run.over("vocab") if a not in self.run.over("batch", "seq"))
        return self.stream() / self.compute if split > 1 and self.config.vocab_size % split == 0 else 0

    def _rows(self, index, r):
        """(kept, gradients): bytes of the weights of equal layers in a row, which are stacked for their loop (`scan_neighbours`).

        The copies of all repeats wait for the backward pass; of the gradients there are those of one repeat.
        """
        kept = gradients = place = 0
        for _, number in self.periods[index].rows:
            for p in range(place, place + number if number > 1 else place):
                for path in self.run.model.state.params:
                    if path.startswith(f"segments.{index}.blocks.{p}."):
                        kept += self._local(path) * self.compute
                        gradients += self._local(path) * self.run.model.state.params[path].dtype.itemsize / r.repeats
            place += number
        return int(kept), int(gradients)

    def _side_by_side(self, part):
        """Bytes of the joined matrices of one layer's experts, where all rows of a chip reach them though those of one sequence do not."""
        run, names = self.run, ("num_experts", "top_k")
        if not part.cls.reports_load or not all(hasattr(part.config, n) for n in names):
            return 0
        if scatter.parsed(run.options.gradient_rings, run.sizes):  # joined before they are gathered
            return 0
        inputs = [
            a for p, a in run.model.state.params.items()
            if "expert" in run.model.infos[p].batch_dims and "embed" in run.model.infos[p].in_dims and a.ndim > 2
        ]  # fmt: skip
        experts, columns, rows = part.config.num_experts, inputs[0].shape[-1] if inputs else 0, run.time * part.config.top_k
        own = experts // (run.size(run.over("expert")) if volumes.travels(run) else 1)
        way = volumes.way(run, part.config)
        here = run.size(run.over("expert")) * way.rows if way else run.rows * rows
        columns_here = columns // run.size(run.over("act_mlp"))
        gated = len(inputs) > 1 and len({a.shape for a in inputs}) < len(inputs)
        if not gated or expert.side_by_side(rows, experts, columns) or not expert.side_by_side(here, own, columns_here):
            return 0
        return 2 * own * self.config.d_model * columns_here * self.compute

    def _experts(self, array, arrived=False):
        """Of arrays of experts that are split: the share of a weight, or the rows of the exchange's buffers over those without it."""
        run, over = self.run, self.run.over("expert")
        if not volumes.travels(run) or not array.shape:
            return 1.0
        for part in {part for part, _ in volumes.parts(run, "channel") if part.cls.reports_load}:
            if array.weight:
                if array.shape[0] == part.config.num_experts:
                    return 1 / run.size(over)
            elif array.shape[0] == run.time * part.config.top_k:
                way = volumes.way(run, part.config)
                rows = way.arriving if arrived and array.shape[1:] == (self.config.d_model,) else way.rows
                return run.size(over) * rows / (run.rows * array.shape[0])
        return 1.0

    def _gradients(self):
        """Bytes of all gradients of one backward pass; where every replica updates a part (ZeRO-1), a chip keeps no more of them."""
        run, total = self.run, 0
        for path, array in run.model.state.params.items():
            sharding = run.shardings.params[path]
            sharding = axes.also_split(sharding, array.shape) if run.options.zero1 else sharding
            total += math.prod(sharding.shard_shape(array.shape)) * array.dtype.itemsize
        return total

    def _local(self, path):
        return math.prod(self.run.shardings.params[path].shard_shape(self.run.model.state.params[path].shape))

    def _ring(self):
        """Keys and values on their way round a split sequence, and their float32 gradients, twice: those on their way and those added."""
        keys = [volumes.keys(self.run, part) for part, _ in volumes.parts(self.run, "mixer")] if self.run.over("seq") else []
        return max(keys, default=0) * (1 + 2 * 4 / self.compute)

    def _table(self):
        """Values of the embedding that one chip holds while it is gathered."""
        run, vocab = self.run, self.config.vocab_size
        pieces = run.size(a for a in run.over("vocab") if a not in run.over("batch", "seq"))
        return vocab * self.config.d_model // (pieces if vocab % pieces == 0 else 1)

    def _gathered(self):
        """Whether the embedding is another array where it is used: gathered, or in another dtype."""
        whole = self.run.model.state.params["embed"]
        return self._local("embed") < self._table() or whole.dtype.itemsize != self.compute

    def _head(self):
        """The gradient of the table before it is scattered, a chunk of the logits, and the gradient of the hidden states."""
        width = self.config.d_model
        chunk = self.run.rows * self.run.time * (4 * width + self.compute * min(self._table() // width, CHUNK))
        return self._table() * 4 + chunk

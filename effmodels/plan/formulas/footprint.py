"""Memory of one training step by formula: what a chip holds, and what is alive at the fullest moment of the backward pass.

That moment is in the backward pass of a period of layers, or of the head: all that waits for it, one period's working set (`liveness`), the
gradients, and the weights in the compute dtype, which the compiler casts once before the layers run.
"""
import functools
import math

import jax.numpy as jnp

from effmodels.models.blocks import segments
from effmodels.plan.formulas import liveness, volumes
from effmodels.plan.records import Memory

# Bytes beside HBM that the compiler fills with temporaries first: CMEM of TPU v4.
BESIDE_HBM = {"v4": 2**27}
CHUNK = 4096  # columns of the vocabulary that the head's loss holds at once
PROGRAM = 30e6  # bytes of a TPU's instructions: 23 to 32 MB for programs of four to eight layers
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

    def memory(self):
        """The `Memory` of one chip."""
        run = self.run
        working = max(p.working_bytes(self.nbytes) for p in self.periods) + self._ring()
        casts = sum(self._local(p) * self.compute for p, a in run.model.state.params.items() if a.dtype.itemsize != self.compute)
        if run.micro_batches > 1:  # the lookup's table is gathered once for all of them
            casts += self._table() * self.compute
        temporaries = max(working, self._head()) + casts - BESIDE_HBM.get(self.chip.name, 0)
        gradients = run.bytes("params")
        if run.micro_batches > 1 and run.stages == 1:
            gradients += run.bytes("params", jnp.dtype(run.config.train.accumulate_dtype).itemsize)
        kept = sum(self._kept(i, r) for i, r in enumerate(self.runs))
        return Memory(
            available=self.chip.hbm, parameters=run.bytes("params"), optimizer=run.bytes("opt_state"), buffers=run.bytes("buffers"),
            batch=run.micro_batches * run.rows * run.time * BATCH_BYTES, gradients=gradients, activations=int(kept),
            temporaries=int(max(0, temporaries)), program=int(PROGRAM if self.chip.platform == "tpu" else 0),
        )  # fmt: skip

    def nbytes(self, array):
        """Bytes of a `liveness.Array` on one chip."""
        return liveness.nbytes(array, self.run) * self._experts(array)

    def stream(self):
        """Bytes of the residual stream of one micro-batch."""
        return self.run.rows * self.run.time * self.config.d_model * self.compute

    def _kept(self, index, r):
        """Bytes that wait for the backward pass of a run of layers."""
        run, period = self.run, self.periods[index]
        kept = period.kept_bytes(self.nbytes)
        if run.stages == 1:
            return kept * r.repeats
        slots = math.ceil(run.micro_batches / run.stages)
        if r.repeats == 1:  # outside of the pipeline the stages share out the micro-batches
            return kept * slots
        # Every tick keeps what entered the stage and what the policy names; what its layers keep is made again, all of the stage at once.
        repeats, ticks = r.repeats // (run.stages * run.options.rounds), volumes.calls(run)
        enters = self.stream() * run.size(run.over("seq")) / run.size(run.over("res_seq"))
        queues = 3 * slots * enters
        if self.config.remat == "none":
            return ticks * repeats * kept + queues
        again = self.traced("none", run.time)[index].kept_bytes(self.nbytes)
        return ticks * (enters + repeats * (kept - self.stream())) + repeats * again + queues

    def _experts(self, array):
        """Of arrays of experts that are split: the share of a weight, or the rows of the exchange's buffers over those without it."""
        run, over = self.run, self.run.over("expert")
        if not volumes.travels(run) or not array.shape:
            return 1.0
        for part in {part for part, _ in volumes.parts(run, "channel") if part.cls.reports_load}:
            if array.weight:
                if array.shape[0] == part.config.num_experts:
                    return 1 / run.size(over)
            elif array.shape[0] == run.time * part.config.top_k:
                return run.size(over) * volumes.pair_rows(run, part.config)[1] / (run.rows * array.shape[0])
        return 1.0

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

    def _head(self):
        """The gathered table, its gradient before it is scattered, a chunk of the logits, and the gradient of the hidden states."""
        width = self.config.d_model
        chunk = self.run.rows * self.run.time * (4 * width + self.compute * min(self._table() // width, CHUNK))
        return self._table() * (self.compute + 4) + chunk

"""What a run will need, said before anything is allocated: memory by purpose, FLOPs and time of a step."""
import dataclasses
import math
import time

import jax
import jax.numpy as jnp

from effmodels.models import cost

BYTES_PER_GB = 1e9
# Share of the measured matmul peak (CPU) or of the chip's bf16 peak that a step is assumed to reach in the first estimate.
ASSUMED_SHARE = 0.5
UNKNOWN_PEAK = 1e11  # FLOP/s of a device whose peak nobody recorded


@dataclasses.dataclass(frozen=True)
class MemoryBudget:
    """Bytes on one device (on a CPU: of the process)."""

    parameters: int
    optimizer: int
    accumulator: int
    gradient: int
    activations: int
    save_copy: int

    @property
    def total(self):
        """All of it at once: an upper bound, since the save copy and the activations do not live together."""
        return self.parameters + self.optimizer + self.accumulator + max(self.gradient + self.activations, self.save_copy)

    def text(self):
        """One line a person can read."""
        parts = [f"{f.name.replace('_', ' ')} {getattr(self, f.name) / BYTES_PER_GB:.2f}" for f in dataclasses.fields(self)]
        return f"memory budget per device, GB: {', '.join(parts)}; at most {self.total / BYTES_PER_GB:.2f} at once"


def memory_budget(state, shardings, accumulate_dtype, accumulates, compiled, copies_on_save):
    """`MemoryBudget` from abstract state and the compiled gradient program; `compiled` reports its temporaries."""
    params = tree_bytes(state.params, shardings.params)
    optimizer = tree_bytes(state.opt_state, shardings.opt_state)
    itemsize = jnp.dtype(accumulate_dtype).itemsize
    accumulator = sum(_local_size(s, h) * itemsize for s, h in zip(jax.tree.leaves(state.params), jax.tree.leaves(shardings.params)))
    temporaries = temp_bytes(compiled)
    # The compiler's temporaries hold the gradient; what is left are activations.
    return MemoryBudget(
        params, optimizer, accumulator if accumulates else 0, min(params, temporaries), max(0, temporaries - params),
        params + optimizer if copies_on_save else 0,
    )  # fmt: skip


def tree_bytes(tree, shardings):
    """Bytes of one device's part of abstract arrays."""
    return sum(_local_size(s, h) * jnp.dtype(s.dtype).itemsize for s, h in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings)))


def temp_bytes(compiled):
    """Bytes that a compiled program needs besides its arguments and results; 0 where the backend does not say."""
    analysis = compiled.memory_analysis()
    return int(getattr(analysis, "temp_size_in_bytes", 0) or 0)


def step_flops(model_config, seq_len, sequences, remat):
    """FLOPs of one optimiser step: (model FLOPs, executed FLOPs with the recomputation of full remat)."""
    flops = cost(model_config, seq_len).train_flops_per_token * seq_len * sequences
    return flops, flops * (4 / 3 if remat == "full" else 1)


def flops_per_second(peak, devices):
    """The rate that the first estimate assumes of all devices: a share of their peak, measured by a matmul where no peak is known."""
    if peak is not None:
        return ASSUMED_SHARE * peak * devices
    if jax.process_count() > 1:  # what is measured differs from process to process, and what follows from it must not
        return ASSUMED_SHARE * UNKNOWN_PEAK * devices
    return ASSUMED_SHARE * measured_matmul_rate()


def measured_matmul_rate(size=1024, repeats=3):
    """FLOP/s of a float32 matmul, best of a few runs (about 0.1 s on a CPU)."""
    x = jnp.ones((size, size), jnp.float32)
    f = jax.jit(lambda a: a @ a)
    f(x).block_until_ready()
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        f(x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def duration(seconds):
    """Seconds as '45 s', '12 min' or '3.4 h'."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _local_size(array, sharding):
    return math.prod(sharding.shard_shape(array.shape))

"""Wall-clock times on the hardware at hand: medians of repeated calls, all contestants of a case in one process."""
import statistics
import time

import jax
import numpy as np

from experiments.kernels import cases, contestants

SECONDS = 1.0  # measured per contestant, at least REPEATS calls
REPEATS = 5


def measure(case, contestant):
    """{"milliseconds", "compile_seconds", "temporary_bytes"} of one contestant; raises what it raises."""
    f, shapes = contestants.build(contestant, case)
    start = time.perf_counter()
    program = jax.jit(f).lower(*shapes).compile()
    compile_seconds = time.perf_counter() - start
    arguments = inputs(case)
    jax.block_until_ready(program(*arguments))
    times = []
    while len(times) < REPEATS or sum(times) < SECONDS and len(times) < 100:
        start = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        times.append(time.perf_counter() - start)
    return {
        "milliseconds": 1e3 * statistics.median(times),
        "compile_seconds": round(compile_seconds, 2),
        "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
    }


def inputs(case):
    """Arrays for a case: normal draws, decays of RetNet, group sizes and labels that are legal."""
    draw = np.random.default_rng(0)
    arrays = [draw.standard_normal(x.shape, np.float32).astype(x.dtype) for x in case.arguments()]
    shape = dict(case.shape)
    if case.op == "retention":
        arrays[3] = np.log1p(-(2.0 ** -np.linspace(5, 12, shape["N"]))).astype(np.float32)
    if case.op == "grouped_matmul":
        arrays[2] = cases.group_sizes(**shape)
    if case.op == "linear_cross_entropy":
        arrays[1] *= np.asarray(shape["D"] ** -0.5, arrays[1].dtype)
        arrays[2] = draw.integers(0, shape["V"], shape["T"]).astype(np.int32)
    return jax.device_put(arrays)


def slope(lengths, milliseconds):
    """The exponent of time as a power of length."""
    return float(np.polyfit(np.log(lengths), np.log(milliseconds), 1)[0])

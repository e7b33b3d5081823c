"""Benchmarks, with hardware and versions beside every figure.

    python -m experiments.bench train --config=configs/reference_8m.py [--steps=30 --json=out.json]
    python -m experiments.bench kernels [--generation=v4 --ops=retention --directions=forward --json=out.json --plot=out.png]

train: tokens per CPU-second and per second of the real train step, its share of the matmul peak measured in the same run, and the time from
launch to the first finished step.
kernels: each op beside its rivals, with ratios and shares of the roofline; timed on the hardware at hand, or with --generation (v4, v5e,
v5p, v6e) by the schedule that the TPU compiler makes, without a TPU.
"""
import functools
import importlib.util
import json
import os
import statistics
import sys
import time

from absl import flags

from experiments import common

_STEPS = flags.DEFINE_integer("steps", 30, "measured steps", lower_bound=3)
_JSON = flags.DEFINE_string("json", "", "also write the result here")
_OPS = flags.DEFINE_list("ops", ["flash_attention", "retention", "grouped_matmul", "linear_cross_entropy"], "kernels: which ops")
_DIRECTIONS = flags.DEFINE_list("directions", ["forward", "backward"], "kernels: forward; backward (forward and every gradient)")
_GENERATION = flags.DEFINE_enum("generation", None, ["v4", "v5e", "v5p", "v6e"], "kernels: compile for this TPU instead of running here")
_PLOT = flags.DEFINE_string("plot", "", "kernels: also draw the result here (needs matplotlib)")


def main(argv):
    if argv[1:] not in (["train"], ["kernels"]):
        sys.exit(f"error: expected one benchmark, 'train' or 'kernels', got {argv[1:]}")
    if argv[1] == "kernels":
        return bench_kernels()
    if common.CONFIG.value is None:
        sys.exit("error: bench train needs --config, for example --config=configs/reference_8m.py")
    common.set_up_jax()
    try:
        result = bench_train(common.CONFIG.value, _STEPS.value)
    except common.user_errors() as error:
        sys.exit(f"error: {error}")
    for name, value in result.items():
        common.say(f"{name:32s} {value}")
    if _JSON.value:
        with open(_JSON.value, "w") as f:
            json.dump(result, f, indent=1)


def bench_kernels():
    """Prints each case as it is done; writes JSON and a plot if asked."""
    for given, known in ((_OPS, _OPS.default), (_DIRECTIONS, _DIRECTIONS.default)):
        if unknown := [name for name in given.value if name not in known]:
            sys.exit(f"error: --{given.name}: {', '.join(unknown)} unknown; expected some of {', '.join(known)}")
    if _PLOT.value and importlib.util.find_spec("matplotlib") is None:
        sys.exit("error: --plot needs matplotlib: pip install -e '.[notebook]'")
    if _GENERATION.value and importlib.util.find_spec("libtpu") is None:
        sys.exit("error: --generation needs the TPU compiler: pip install -e '.[plan]'")
    common.set_up_jax()
    from experiments.kernels import report, run

    measure = functools.partial(run.by_schedule, _GENERATION.value) if _GENERATION.value else run.on_this_machine
    header, rows = measure(_OPS.value, _DIRECTIONS.value, common.say)
    common.say("\n" + "\n".join(f"{name}: {value}" for name, value in header.items()))
    if _JSON.value:
        report.write(_JSON.value, header, rows)
    if _PLOT.value:
        report.plot(_PLOT.value, header, rows)


def bench_train(config, steps):
    """The result as a dict; medians over the measured steps."""
    import jax

    from effmodels import data
    from effmodels.train import budget
    from effmodels.train.loop import versions
    from effmodels.train.setup import Setup

    setup = Setup(config, common.say)
    setup.start()
    c = setup.config
    tokens, count = c.batch_size * c.seq_len, c.batch_size // setup.micro_batch
    iterator = data.batches(setup.data(c.seq_len), batch_size=setup.micro_batch, seed=c.seed)
    state, program = setup.init_state(), setup.programs(c.seq_len).train_step
    walls, cpus, first = [], [], None
    with setup.context():
        for i in range(steps + 3):
            wall, cpu = time.perf_counter(), time.process_time()
            state, metrics = program(state, setup.put([next(iterator) for _ in range(count)]))
            jax.block_until_ready(metrics["loss"])
            if first is None:
                first = time.time() - _process_start()
            if i >= 3:
                walls.append(time.perf_counter() - wall)
                cpus.append(time.process_time() - cpu)
    cpu_rate = tokens / statistics.median(cpus)
    wall, cpu = time.perf_counter(), time.process_time()
    peak = budget.measured_matmul_rate(size=2048, repeats=5)
    cores = (time.process_time() - cpu) / (time.perf_counter() - wall)
    flops = setup.cost.train_flops_per_token
    return {
        "hardware": f"{os.cpu_count()} cores, {jax.devices()[0].device_kind}",
        **versions(),
        "parameters": setup.cost.params,
        "tokens_per_step": tokens,
        "tokens_per_cpu_second": round(cpu_rate, 1),
        "tokens_per_second": round(tokens / statistics.median(walls), 1),
        "best_tokens_per_cpu_second": round(tokens / min(cpus), 1),
        "mflop_per_token": round(flops / 1e6, 2),
        "matmul_peak_gflops_per_core": round(peak / cores / 1e9, 1),
        "share_of_matmul_peak": round(cpu_rate * flops / (peak / cores), 3),
        "seconds_to_first_step": round(first, 2),
        "loss_after": round(float(metrics["loss"]), 4),
    }


def _process_start():
    """When this process started, in seconds since the epoch (Linux)."""
    with open("/proc/self/stat") as f:
        ticks = int(f.read().rsplit(")", 1)[1].split()[19])
    with open("/proc/uptime") as f:
        uptime = float(f.read().split()[0])
    return time.time() - (uptime - ticks / os.sysconf("SC_CLK_TCK"))


if __name__ == "__main__":
    common.run(main)

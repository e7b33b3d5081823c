"""Benchmarks, with hardware and versions beside every figure.

    python -m experiments.bench train --config=configs/reference_8m.py [--steps=30 --json=out.json]

train: tokens per CPU-second and per second of the real train step, its share of the matmul peak measured in the same run, and the time from
launch to the first finished step.
"""
import json
import os
import statistics
import sys
import time

from absl import flags

from experiments import common

_STEPS = flags.DEFINE_integer("steps", 30, "measured steps", lower_bound=3)
_JSON = flags.DEFINE_string("json", "", "also write the result here")


def main(argv):
    if argv[1:] != ["train"]:
        sys.exit(f"error: expected one benchmark, 'train', got {argv[1:]}")
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
    common.run(main, "config")

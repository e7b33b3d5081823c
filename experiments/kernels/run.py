"""Runs the cases: timed here, or by the compiler's schedule for a TPU generation that is not here."""
import importlib.metadata as metadata
import os
import platform

import jax

from effmodels.plan import chips
from experiments.kernels import cases, contestants, report, timed

# Shapes for a CPU: float32, up to the lengths that the materialised forms still stand.
_CPU = {
    "flash_attention": [dict(B=1, T=t, N=4, H=64, causal=1) for t in (1024, 2048, 4096)],
    "retention": [dict(B=1, T=t, N=4, H=64) for t in (1024, 2048, 4096, 8192, 16384, 32768)],
    "grouped_matmul": [dict(M=4096, D=256, F=512, E=8), dict(M=4096, D=256, F=512, E=8, ragged=1)],
    "linear_cross_entropy": [dict(T=2048, D=256, V=8192)],
}

# Shapes for a simulated schedule, which takes seconds per thousand grid steps: fewer heads, since time is linear in them.
_SIMULATED = {
    "flash_attention": [
        dict(B=1, T=4096, N=16, H=128, causal=1), dict(B=1, T=16384, N=2, H=128, causal=1), dict(B=1, T=8192, N=4, H=128, causal=0),
        dict(B=1, T=4096, N=8, H=256, causal=1), dict(B=1, T=4096, N=16, H=64, causal=1),
        dict(B=1, T=16384, N=8, K=2, H=128, causal=1, window=4096),
    ],
}  # fmt: skip
# Not by schedule: how often its loops run is found on the device.
_NOT_SIMULATED = (("flash_attention", "xla"),)


def on_this_machine(ops, directions, say):
    """(header, rows): every contestant that this platform has, timed."""
    backend, kind = jax.default_backend(), jax.devices()[0].device_kind
    chosen = []
    for op in ops:
        if backend == "cpu":
            chosen += [cases.Case(op, d, tuple(s.items()), "float32") for s in _CPU[op] for d in directions]
        else:
            chosen += [c for d in directions for c in cases.cases(op, d)]
    peak = _cpu_peak() if backend == "cpu" else chips.PEAKS.get(kind)
    absent = {"cpu": (*contestants.TPU_ONLY, *contestants.GPU_ONLY), "gpu": contestants.TPU_ONLY, "tpu": contestants.GPU_ONLY}[backend]
    rows = _measure(chosen, lambda op, name: name in absent, timed.measure, peak, say)
    header = {
        "what": f"timed on {kind}, median of repeated calls",
        "hardware": f"{os.cpu_count()} cores of {_cpu()}; {kind}",
        "versions": versions(),
        "peak_tflops": None if peak is None else peak.flops / 1e12,
    }
    if backend == "cpu":
        header["time_as_a_power_of_length"] = _slopes(rows)
    return header, rows


def by_schedule(generation, ops, directions, say):
    """(header, rows): every TPU contestant compiled for one chip of a generation, its time from the compiler's final bundles."""
    from experiments.kernels import static

    chosen = []
    for op in ops:
        shapes = _SIMULATED.get(op)
        listed = [cases.Case(op, d, tuple(s.items())) for s in shapes for d in directions] if shapes else None
        chosen += listed or [c for d in directions for c in cases.cases(op, d)]
    peak = chips.PEAKS[chips.KINDS[generation]]

    def skip(op, name):
        return name in contestants.GPU_ONLY or (op, name) in _NOT_SIMULATED

    rows = _measure(chosen, skip, lambda case, name: static.measure(case, name, generation), peak, say)
    header = {
        "what": f"static schedule of the TPU {generation} compiler, not timed on a TPU",
        "hardware": f"none: compiled for one {generation} chip",
        "versions": versions(),
        "peak_tflops": peak.flops / 1e12,
    }
    return header, rows


def _measure(chosen, skip, measure, peak, say):
    """Rows of every case and contestant, printed case by case; skip(op, contestant) leaves one out."""
    rows = []
    for number, case in enumerate(chosen):
        here = []
        for name in contestants.CONTESTANTS[case.op]:
            if skip(case.op, name):
                continue
            try:
                here.append(report.row(case, name, peak, measure(case, name)))
            except Exception as error:  # a rival that cannot run is a result
                here.append(report.row(case, name, peak, error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"))
        for line in report.lines(report.add_ratios(here)):
            say(line)
        say(f"  [{number + 1}/{len(chosen)}]")
        rows += here
    return rows


def _cpu_peak():
    from effmodels.train import budget

    # The bandwidth of a CPU's memory is not measured: its roofline here is that of its matmuls.
    return chips.Peak(budget.measured_matmul_rate(size=2048, repeats=5), float("inf"))


def _slopes(rows):
    """{op, direction and contestant: exponent of length} where a row of lengths was timed."""
    series = {}
    for r in rows:
        if "T" in r["shape"] and "milliseconds" in r:
            series.setdefault(f"{r['op']} {r['direction']} {r['contestant']}", []).append((r["shape"]["T"], r["milliseconds"]))
    return {name: round(timed.slope(*zip(*points)), 3) for name, points in series.items() if len(points) > 2}


def _cpu():
    """The processor's name (Linux), else its architecture."""
    try:
        with open("/proc/cpuinfo") as f:
            return next(line.partition(":")[2].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def versions():
    found = {"python": platform.python_version(), "jax": jax.__version__}
    for package in ("libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "tokamax", "flywheel-tpu"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found

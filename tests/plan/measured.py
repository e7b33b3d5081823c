"""Runs steps of a config on one CPU device and writes what they took: `python -m tests.plan.measured request.json result.json`.

request: {"config": mapping, "before": mapping of a small run that goes first, "steps": n}. result: {"bytes": growth of the process from
before the state exists to its fullest moment, "seconds": the quickest step}.
"""
import ctypes
import gc
import json
import pathlib
import re
import sys
import time

import jax
import numpy as np

from effmodels.train.setup import DEVICE_KEYS, Setup


def main(request_file, result_file):
    request = json.loads(pathlib.Path(request_file).read_text())
    for config in (request["before"], request["config"]):  # the first run touches the libraries' own pages
        result = _run(config, request["steps"])
    pathlib.Path(result_file).write_text(json.dumps(result))


def _run(config, steps):
    setup = Setup(config, log=lambda text: None, devices=jax.devices()[:1])
    c = setup.config
    step = setup.trace("train_step", c.seq_len).lower().compile(compiler_options=setup.compiler_options)
    key = jax.random.key(c.seed, impl="threefry2x32")
    init = jax.jit(setup._init, out_shardings=setup.shardings).lower(key).compile()
    rng = np.random.default_rng(0)
    one = rng.integers(1, c.model.vocab_size, (setup.micro_batch, c.seq_len), np.int32)
    whole = np.ones_like(one)
    rows = dict.fromkeys(DEVICE_KEYS, whole) | {"tokens": one, "targets": one, "weights": whole.astype(np.float32)}
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = _status("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again here
    state, seconds = init(key), []
    for _ in range(steps):
        batch = setup.put([rows] * (c.batch_size // setup.micro_batch))
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(step(state, batch))
        seconds.append(time.perf_counter() - start)
    assert np.isfinite(metrics["loss"])
    return {"bytes": _status("VmHWM") - before, "seconds": min(seconds)}


def _status(name):
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text()).group(1))


if __name__ == "__main__":
    main(*sys.argv[1:])

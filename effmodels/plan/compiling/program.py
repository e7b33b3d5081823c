"""A config on a topology, compiled in a process of its own, as a Plan.

    plan = program.plan(config, "v4:2x2x1", mesh={"fsdp": 4})

One process for each compilation: what the compiler is told (how hard to optimise, how many devices to simulate) is read when a process
starts. What it says is kept (`cache`), so that the second plan takes a second.
"""
import dataclasses
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import types

import numpy as np

from effmodels.config import ConfigError, nearest
from effmodels.parallel import mesh as meshes
from effmodels.parallel import pipeline
from effmodels.plan import budgets, chips, topology
from effmodels.plan.compiled import memory, timeline
from effmodels.plan.compiling import cache
from effmodels.plan.formulas import closed_form
from effmodels.plan.records import Plan
from effmodels.plan.schedule import dump
from effmodels.train.run_config import RunConfig, jsonable

WHAT = ("train", "prefill", "decode")
METHODS = {None: "compiled", "O0": "memory"}
TELL_EVERY = 5.0  # seconds
TIMEOUT = 7200.0  # seconds


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler said, as JSON (`step._compile`), and where the HLO text of each program that it made is."""

    record: dict
    key: str  # in the cache
    files: tuple[tuple[str, bytes], ...]  # (program, its text compressed)
    seconds: float  # of the process; 0 from the cache

    def texts(self) -> dict[str, str]:
        """{program: its HLO text}."""
        return {name: gzip.decompress(data).decode() for name, data in self.files}

    @property
    def out_of_memory(self):
        """The compiler's message where a program does not fit, else ""."""
        return next((p["out_of_memory"] for p in self.record["programs"] if "out_of_memory" in p), "")


def plan(config, place, *, slices=1, mesh=None, what="train", level=None, name="", log=lambda text: None) -> Plan:
    """The Plan of a run's config (ConfigDict or mapping) on a topology, by its name or as a `topology.Topology`.

    mesh: sizes that replace the config's. what: train, prefill or decode. level: None, or "O0", which is quicker and good for memory only.
    A GPU is not compiled for: its plan is the closed form, and says so. Raises ConfigError for what does not fit together, CompilerError
    for what does not compile; a program that is too large is a Plan that does not fit.
    """
    place = topology.parse(place, slices) if isinstance(place, str) else place
    config = as_mapping(config, mesh)
    if place.platform == "gpu":
        found = closed_form.plan(config, place, what=what)
        return dataclasses.replace(found, config=name, notes=(*found.notes, "not compiled: no compiler for GPUs is used here"))
    compiled = compile_step(config, place, what=what, level=level, log=log)
    kept = cache.kept_plan(compiled.key) if place.platform == "tpu" else None  # a CPU's speed is that of now
    if kept is None:
        log(f"  reading the program ({sum(map(len, compiled.texts().values())) / 1e6:.0f} MB of text)")
        kept = assemble(compiled, config, place, what=what, level=level)
        cache.keep_plan(compiled.key, kept)
    return dataclasses.replace(kept, config=name)


def compile_step(config, place, *, what="train", level=None, log=lambda text: None) -> Compiled:
    """The `Compiled` step of a config (a mapping) on a Topology, from the cache where it is there; errors as `plan`."""
    if what not in WHAT:
        raise ConfigError(f"what: unknown {what!r}.{nearest(what, WHAT)}")
    if level not in METHODS:
        raise ConfigError(f"level: expected None or O0, got {level!r}.")
    RunConfig.from_mapping(config, place.platform).mesh_sizes(place.chips)  # mistakes are told before a process starts
    request = {"config": config, "topology": place.name, "slices": place.slices, "what": what}
    name = cache.key(request | {"level": level, "config": {k: v for k, v in config.items() if k not in ("expect", "log")}})
    found = cache.find(name)
    if found:
        return _read(found, name, 0.0)
    with cache.writing(name) as folder:
        start = time.perf_counter()
        _run_child(request | {"folder": str(folder)}, folder, place, level, log)
        return _read(folder, name, time.perf_counter() - start)


def assemble(compiled, config, place, *, what="train", level=None, name="") -> Plan:
    """The Plan of what was compiled."""
    record, programs, texts = compiled.record, compiled.record["programs"], compiled.texts()
    run = RunConfig.from_mapping(config, place.platform)
    needed = memory.given_up(compiled.out_of_memory) if compiled.out_of_memory else None
    if compiled.out_of_memory:
        needed = needed or (None, place.chip.hbm)
        failed = next(p["name"] for p in programs if "out_of_memory" in p)
        whole, largest = memory.without_program(record, needed[0], needed[1] or place.chip.hbm, texts.get(failed))
    else:
        whole, largest = memory.memory(record, [(p, texts[p["name"]]) for p in programs], place.chip.hbm)
    timed = level is None and not compiled.out_of_memory
    operations = _operations(record, texts, place) if timed else ()
    seconds = sum(o.total for o in operations)
    saving = budgets.saving(record["checkpoint_bytes"], place.hosts, asynchronous=run.checkpoint.mode != "sync")
    training = what == "train"
    return Plan(
        config=name,
        what=what,
        topology=place.name,
        slices=place.slices,
        chip=place.chip.name,
        chips=place.chips,
        mesh=record["mesh"],
        method=METHODS[level],
        tokens=record["tokens"],
        steps=run.steps if training else 1,
        model_flops=record["model_flops"],
        executed_flops=sum(p["flops"] * p["calls"] for p in programs) - _of_empty_rows(operations, record["filled"][0], place.chips),
        memory=whole,
        operations=operations,
        bubble=_bubble(record) if training else 0.0,
        imbalance=1.0 - record["balance"] if training else 0.0,
        host_save_bytes=saving.host_bytes,
        offloaded_bytes=max((p["memory"].get("host_temp", 0) for p in programs if "memory" in p), default=0),
        checkpoint_bytes=saving.bytes,
        input_bytes_per_second=budgets.input_rate(record["tokens"], seconds, run.model.vocab_size) if training else 0.0,
        out_of_memory=_over(compiled.out_of_memory, needed) if compiled.out_of_memory else "",
        notes=tuple(_notes(record, place, level)),
        versions=record["versions"],
        compile_seconds=sum(p.get("compile_seconds", 0.0) for p in programs),
        peak_flops=place.chip.flops,
        bandwidth=place.chip.bandwidth,
        band=timeline.band(place.chip.name),
        largest=largest,
    )


def _bubble(record):
    """Share of a pipeline's slots without work."""
    stages = record["stages"]
    return pipeline.bubble_share(stages, record["micro_batches"], record["rounds"]) if stages > 1 else 0.0


def _operations(record, texts, place):
    """Those of every program, as often as a step runs it."""
    if place.platform == "cpu":
        sizes = record["mesh"]
        made = types.SimpleNamespace(devices=np.arange(place.chips).reshape(tuple(sizes.values())), axis_names=tuple(sizes))
    else:
        made = meshes.make_mesh(record["mesh"], place.devices())
    known, found = {"wrap": place.wrap, "filled": record["filled"]}, []
    for p in record["programs"]:
        for o in timeline.merged(timeline.operations(texts[p["name"]], made, place.chip.name, **known)):
            # Simulated devices share this machine, and `timeline` prices each as if it had it alone.
            share = place.chips if place.platform == "cpu" else 1
            times = {field: getattr(o, field) * share for field in ("seconds", "exposed", "shared")}
            found.append(dataclasses.replace(o, calls=o.calls * p["calls"], **times))
    return tuple(found)


def _of_empty_rows(operations, filled, chips):
    """FLOPs that the traced program counts for rows of the experts' buffers that hold nothing; the operations leave them out."""
    return chips * (1 / filled - 1) * sum(o.calls * o.flops for o in operations if o.kind == "kernel" and o.layer == "moe")


def _over(message, needed):
    """The compiler's message, and what it means: how much too large the program is."""
    message = " ".join(message.split())
    if needed[0] is None:
        return message
    return f"{(needed[0] - needed[1]) / chips.GIB:.2f} GiB over the {needed[1] / chips.GIB:.2f} GiB of a chip: {message}"


def _notes(record, place, level):
    yield from record["notes"]
    if level == "O0":
        yield "compiled without optimisation: memory is 3 to 10 % low, times are left out"
    if any(p["unknown_loops"] for p in record["programs"]):
        yield "executed FLOPs count once a loop whose length depends on the data"
    if place.chip.devices_per_chip > 1:
        yield f"one {place.chip.name} chip is {place.chip.devices_per_chip} devices; every figure is of a device"
    if place.platform == "cpu":
        yield "CPU: speed and memory are those of this machine, measured now"


def as_mapping(config, mesh=None):
    """A config (ConfigDict or mapping) as plain JSON, with the sizes of the mesh replaced where some are given."""
    given = jsonable(config.to_dict() if hasattr(config, "to_dict") else config)
    if mesh:
        given["mesh"] = dict(mesh)
    return given


def _read(folder, key, seconds):
    record = json.loads((folder / "result.json").read_text())
    files = tuple((path.name.removesuffix(".hlo.gz"), path.read_bytes()) for path in sorted(folder.glob("*.hlo.gz")))
    return Compiled(record, key, files, seconds)


# The child.


def _run_child(request, folder, place, level, log):
    """Runs `step` and leaves result.json and the HLO texts in the folder."""
    request_file, result_file, errors = folder / "request.json", folder / "result.json", folder / "stderr.txt"
    request_file.write_text(json.dumps(request))
    command = [sys.executable, "-m", "effmodels.plan.compiling.step", str(request_file), str(result_file)]
    with errors.open("w") as stderr:
        child = subprocess.Popen(command, env=_environment(place, level, folder), stdout=subprocess.PIPE, stderr=stderr, text=True)
        try:
            _follow(child, log)
        finally:
            child.kill()
            child.wait()
    if child.returncode or not result_file.exists():
        last = "\n".join(errors.read_text(errors="replace").strip().splitlines()[-15:])
        raise dump.CompilerError(f"the compiler's process ended with code {child.returncode}:\n{last}")
    answer = json.loads(result_file.read_text())
    if "error" in answer:
        kinds = {"ConfigError": ConfigError, "ModuleNotFoundError": ModuleNotFoundError}
        raise kinds[answer["error"]](answer["message"])
    for p in answer["programs"]:
        if "out_of_memory" in p:
            _keep_last_text(folder, p["name"])
        elif place.platform == "tpu":
            p["memory"]["hbm"] = _reported(folder / "dump", p["name"]) or p["memory"]["peak"]
    result_file.write_text(json.dumps(answer | {"versions": cache.versions()}))
    shutil.rmtree(folder / "dump", ignore_errors=True)
    for path in (request_file, errors):
        path.unlink()


def _reported(dumps, name):
    """Bytes of HBM that the compiler's own report says a program needs, arguments included; 0 where it wrote none."""
    for path in dumps.glob(f"*jit_{name}.*after_optimizations-memory-usage-report.txt"):
        found = re.search(r"Memory Space: (?:default|hbm) \(color=0\)\s+Total bytes: (\d+)", path.read_text())
        if found:
            return int(found.group(1))
    return 0


def _keep_last_text(folder, name):
    """The program that did not fit, as far as the compiler came, among its dumps."""
    for ending in ("oom_intermediate_module", "after_optimizations"):
        for path in (folder / "dump").glob(f"*jit_{name}.*{ending}.txt"):
            with gzip.open(folder / f"{name}.hlo.gz", "wt", compresslevel=3) as f:
                f.write(path.read_text())
            return


def _follow(child, log):
    """Tells what the child does: at once when a phase begins, then every few seconds."""
    state = {"phase": "starting", "since": time.perf_counter()}

    def read():
        for line in child.stdout:
            if line.startswith("phase: "):
                state.update(phase=line.removeprefix("phase: ").strip(), since=time.perf_counter())

    threading.Thread(target=read, daemon=True).start()
    begun = told = time.perf_counter()
    while child.poll() is None:
        time.sleep(0.05)
        now = time.perf_counter()
        if now - begun > TIMEOUT:
            raise dump.CompilerError(f"the compiler took longer than {TIMEOUT / 3600:.0f} hours.")
        if now - told >= TELL_EVERY:
            told = now
            log(f"  {state['phase']}: {now - state['since']:.0f} s ({now - begun:.0f} s in all)")


def _environment(place, level, folder):
    path = os.pathsep.join(p or os.getcwd() for p in sys.path)
    here = {k: v for k, v in os.environ.items() if k not in ("JAX_COMPILATION_CACHE_DIR", "JAX_OPTIMIZATION_LEVEL")}
    here |= place.environment() | {"PYTHONPATH": path, "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    if place.platform == "tpu":  # where the program does not fit, its text is only in the dumps
        only = "jit_(train_step|micro_step|apply_step|prefill|decode)"
        flags = f"--xla_dump_to={folder / 'dump'} --xla_dump_hlo_as_text --xla_dump_hlo_module_re={only}"
        here["XLA_FLAGS"] = f"{here.get('XLA_FLAGS', '')} {flags}".strip()
    return here | ({"JAX_OPTIMIZATION_LEVEL": level} if level else {})

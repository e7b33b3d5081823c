"""A config compiled in a process of its own becomes a Plan; the second time nothing is compiled; mistakes are sentences."""
import dataclasses
import json
import os
import subprocess
import sys
import threading

import jax
import pytest

from configs import moe_1b, quickstart
from effmodels.config import ConfigError, ModelConfig
from effmodels.models import cost
from effmodels.plan import chips, records, topology
from effmodels.plan.compiling import program
from effmodels.plan.schedule import dump
from effmodels.train.run_config import jsonable
from effmodels.train.setup import Setup

GIB = 2**30


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("plans")


@pytest.fixture(autouse=True)
def kept_here(folder, monkeypatch):
    monkeypatch.setenv("EFFMODELS_PLAN_CACHE", str(folder))


def tiny():
    c = quickstart.get_config("test")
    c.train.micro_batch_size, c.train.accumulation = 2, "scan"
    return c


@pytest.fixture(scope="module")
def told():
    return []


@pytest.fixture(scope="module")
def plan(folder, told):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EFFMODELS_PLAN_CACHE", str(folder))
        patch.setattr(program, "TELL_EVERY", 0.2)
        return program.plan(tiny(), "cpu:1", name="configs/quickstart.py:test", log=told.append)


def no_process(*args, **kwargs):
    raise AssertionError("a process was started")


def test_the_plan_says_what_the_config_says(plan, told):
    c = tiny()
    model = cost(ModelConfig.from_mapping(c.model.to_dict()), c.seq_len)
    assert (plan.config, plan.what, plan.topology, plan.method) == ("configs/quickstart.py:test", "train", "cpu:1", "compiled")
    assert plan.tokens == c.batch_size * c.seq_len and plan.steps == c.steps and set(plan.mesh.values()) == {1}
    assert plan.model_flops == pytest.approx(model.train_flops_per_token * plan.tokens)
    assert plan.memory.parameters == model.param_bytes and plan.memory.optimizer == pytest.approx(2 * model.param_bytes, rel=1e-3)
    assert plan.memory.batch == 5 * 4 * plan.tokens and plan.memory.activations > 0 and plan.fits
    assert plan.checkpoint_bytes == pytest.approx(3 * model.param_bytes, rel=1e-3) and plan.versions["jax"] == jax.__version__
    assert plan.operations and plan.seconds > 0 and len(plan.largest) == 5
    assert any("compiling train_step" in line or "tracing train_step" in line for line in told)


def test_executed_flops_are_those_of_the_jaxpr(plan):
    """A CPU's forms of attention and experts compute what masks hide: more than the model's own, and less than three times that."""
    assert plan.model_flops < plan.executed_flops < 3 * plan.model_flops


def test_the_second_plan_starts_no_process(plan, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", no_process)
    again = program.plan(tiny(), "cpu:1", name="again")
    assert again.config == "again" and again.memory.parameters == plan.memory.parameters
    assert dataclasses.replace(again.memory, available=0) == dataclasses.replace(plan.memory, available=0)
    with pytest.raises(AssertionError, match="a process was started"):
        c = tiny()
        c.optim.lr = 1.0
        program.plan(c, "cpu:1")


def test_a_plan_goes_to_json_and_back(plan):
    assert records.from_json(json.loads(json.dumps(records.to_json(plan)))) == plan


@pytest.mark.parametrize(
    "mesh, what, level, message",
    [
        ({"fsdp": 3}, "train", None, r"needs a multiple of 3 devices, but 4 are here; .* Nearest: fsdp=4, data=1"),
        ({"data": 8}, "train", None, r"needs 8 devices, but 4 are here; .* Nearest: data=4"),
        ({"fdsp": 4}, "train", None, r"unknown axis 'fdsp'. Did you mean 'fsdp'\?"),
        (None, "training", None, r"what: unknown 'training'. Did you mean 'train'\?"),
        (None, "train", "O1", r"level: expected None or O0, got 'O1'"),
    ],
)
def test_mistakes_are_told_before_anything_is_compiled(monkeypatch, mesh, what, level, message):
    monkeypatch.setattr(subprocess, "Popen", no_process)
    with pytest.raises(ConfigError, match=message):
        program.plan(tiny(), "v4:2x2x1", mesh=mesh, what=what, level=level)


def test_a_gpu_is_planned_in_closed_form_and_says_so(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", no_process)
    found = program.plan(tiny(), "gpu:h200:2", mesh={"fsdp": 2}, name="x")
    assert (found.method, found.chips, found.chip, found.config) == ("fast", 2, "h200", "x") and found.mesh["fsdp"] == 2
    assert any("no compiler for GPUs" in note for note in found.notes)


def test_a_compiler_that_dies_is_told_with_its_last_words(monkeypatch, folder):
    script = folder / "fails"
    script.write_text("#!/bin/sh\necho 'it broke' >&2\nexit 3\n")
    script.chmod(0o755)
    monkeypatch.setattr(program.sys, "executable", str(script))
    with pytest.raises(dump.CompilerError, match=r"ended with code 3:\nit broke"):
        program.plan(tiny(), "cpu:2")


def test_training_compiles_what_the_plan_compiles(monkeypatch):
    """`Setup.programs` and a plan go through the same `Setup.trace`."""
    setup = Setup(jsonable(tiny().to_dict()), log=lambda text: None, devices=jax.devices()[:1])
    traced = []
    original = setup.trace
    monkeypatch.setattr(setup, "trace", lambda name, seq_len: traced.append(name) or original(name, seq_len))
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda self, compiler_options=None: None)
    setup._compile(setup.config.seq_len)
    assert traced == ["eval_step", *setup.step_programs] == ["eval_step", "train_step"]


@pytest.mark.slow
@pytest.mark.subprocess
def test_two_plans_at_once(folder):
    """Two of the same program and one of another; all have an answer, and nothing unfinished stays behind."""
    found = {}

    def one(number, devices):
        found[number] = program.plan(tiny(), f"cpu:{devices}", what="decode")

    threads = [threading.Thread(target=one, args=pair) for pair in enumerate((1, 1, 2))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0].memory.parameters == found[1].memory.parameters == found[2].memory.parameters
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]


@pytest.mark.slow
@pytest.mark.subprocess
def test_the_plan_of_quickstart_is_what_it_takes_to_run(folder):
    """Peak memory within 15 %, the time of a step within a factor of two, on one CPU device of this machine."""
    config = quickstart.get_config()
    planned = program.plan(config, "cpu:1")
    request, result = folder / "measure.json", folder / "measured.json"
    request.write_text(json.dumps({"config": jsonable(config.to_dict()), "before": jsonable(tiny().to_dict()), "steps": 10}))
    subprocess.run([sys.executable, "-m", "tests.plan.measured", str(request), str(result)], check=True, env=environment())
    measured = json.loads(result.read_text())
    assert planned.memory.total == pytest.approx(measured["bytes"], rel=0.15), (planned.seconds, measured)
    assert 0.5 < planned.seconds / measured["seconds"] < 2, (planned.seconds, measured)


def environment():
    """Of a run as a person starts it, except that freed memory goes back to the system at once and is not counted twice."""
    flags = " ".join(f for f in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in f)
    kept = {name: value for name, value in os.environ.items() if name != "NPROC"}
    path = os.pathsep.join(p or os.getcwd() for p in sys.path)
    heap = "glibc.malloc.mmap_threshold=131072:glibc.malloc.arena_max=2"
    return kept | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path, "GLIBC_TUNABLES": heap}


# Through the TPU compiler.


@pytest.mark.aot
@pytest.mark.subprocess
def test_parameters_that_do_not_fit(folder):
    """64 GiB of embeddings on a chip: the compiler's own words, how much too large, and what is large."""
    c = tiny()
    c.model.vocab_size, c.model.d_model = 2**25, 512
    found = program.plan(c, "v4:1x1x1", level="O0")
    assert not found.fits and found.memory.total > 4 * 64 * GIB and found.memory.available == pytest.approx(chips.get("v4").hbm, rel=1e-3)
    over = (found.memory.total - found.memory.available) / GIB
    assert f"{over:.2f} GiB over the 30.75 GiB of a chip: " in found.out_of_memory and "Ran out of memory" in found.out_of_memory
    # A compiler that gives up late also names what the step would make.
    held = [row for row in found.largest if row[0].startswith(("parameters: ", "optimizer: "))]
    assert held[0] == ("parameters: float32[33554432, 512] embed", 64 * GIB) and len(found.largest) == 5, found.largest
    assert {what.rpartition(" ")[0].split("[")[0] for what, _ in held[1:3]} == {"optimizer: float32"}


@pytest.mark.aot
@pytest.mark.subprocess
@pytest.mark.parametrize("what", ["train", "prefill", "decode"])
def test_a_step_for_four_chips(what):
    config = moe_1b.get_config("small")
    found = program.plan(config, "v4:2x2x1", mesh={"fsdp": 2, "tensor": 2}, what=what, level="O0")
    whole = cost(ModelConfig.from_mapping(config.model.to_dict() | {"compute_dtype": "bfloat16"}), config.seq_len)
    assert found.fits and found.method == "memory" and found.chips == 4 and not found.operations
    compiled = program.compile_step(program.as_mapping(config, {"fsdp": 2, "tensor": 2}), topology.parse("v4:2x2x1"), what=what, level="O0")
    said = compiled.record["programs"][0]["memory"]  # the compiler's report is more than what is alive at once, by what lies between
    assert found.memory.total == said["hbm"] + said["generated_code"] and said["peak"] < said["hbm"] < said["argument"] + 2 * said["temp"]
    # Heads over tensor, the rest over fsdp as well; serving holds all that a bfloat16 product reads in bfloat16, the router not.
    shard = found.memory.parameters * (1 if what == "train" else 2)
    assert whole.param_bytes / 4 <= shard < 0.6 * whole.param_bytes
    if what == "decode":
        assert found.tokens == config.batch_size and found.model_flops == whole.decode_flops_per_token * config.batch_size
    if what != "train":
        assert found.memory.optimizer == 0 and found.memory.activations >= whole.decode_state_bytes * config.batch_size // 4

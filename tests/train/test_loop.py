"""The training loop as a whole: resumed equals straight, accumulation forms agree, sharded equals one device, clean stops."""
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import chex
import jax
import numpy as np
import pytest

from configs import quickstart
from effmodels.config import ConfigError
from effmodels.models.state import split
from effmodels.train import metrics
from effmodels.train.loop import NonFiniteError, Run, train
from effmodels.train.restore import load_run
from tests.numerics import assert_close

ONE = jax.devices()[:1]


@pytest.fixture
def config(corpus, tmp_path_factory):
    """Six steps of the quickstart's small form."""
    c = quickstart.get_config("test")
    c.data.paths, c.data.holdout = (str(corpus),), 0.2
    c.data.cache_dir = str(corpus.parent / "cache")
    c.model.num_layers, c.model.channel = 2, ("mlp", "moe")  # the fewest programs to compile
    c.eval.sample_tokens, c.log.tensorboard = 0, "off"
    return c


def final_params(workdir):
    """The parameters of the newest checkpoint, by path."""
    model = load_run(workdir, log=lambda *_: None)[0]
    return {k: np.asarray(v) for k, v in split(model)[1].items()}


def losses(workdir):
    return {r["step"]: r["loss"] for r in metrics.read(workdir) if "loss" in r}


def assert_same_run(one, other):
    a, b = final_params(one), final_params(other)
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)
    assert losses(one) == losses(other)


def test_resumed_equals_straight_bit_for_bit(config, tmp_path):
    result = train(config, tmp_path / "straight", devices=ONE, log=lambda *_: None)
    assert result["step"] == 6 and np.isfinite(result["bits_per_byte"])
    record = next(r for r in metrics.read(tmp_path / "straight") if "moe_load" in r)
    assert np.shape(record["moe_load"]) == (1, 4) and np.isclose(np.sum(record["moe_load"]), 1)  # one MoE layer of four experts
    assert len(record["moe_max_violation"]) == len(record["moe_drop_fraction"]) == 1

    class StopAfter(Exception):
        pass

    run = Run(config, pathlib.Path(tmp_path / "resumed"), lambda *_: None, ONE)
    read, seen = run._read, []

    def stop_at_four(pending, *args):
        seen.append(pending)
        if pending is not None and pending[0] == 3:
            raise StopAfter
        return read(pending, *args)

    run._read = stop_at_four
    with pytest.raises(StopAfter):  # after the save of step 3, in the middle of the next steps
        run.train()
    assert train(config, tmp_path / "resumed", devices=ONE, log=lambda *_: None)["step"] == 6
    assert_same_run(tmp_path / "straight", tmp_path / "resumed")


def test_one_trace_per_step_function(config, tmp_path):
    """A whole run traces its step and its evaluation once each: shapes and statics never change."""
    run = Run(config, pathlib.Path(tmp_path), lambda *_: None, ONE, start=False)
    chex.clear_trace_counter()
    functions = run.setup.functions
    run.setup.functions = functions._replace(
        train_step=chex.assert_max_traces(functions.train_step, 1), eval_step=chex.assert_max_traces(functions.eval_step, 1)
    )  # fmt: skip
    run.start()
    assert run.train()["step"] == 6


def test_accumulation_forms_agree(config, tmp_path):
    """The whole batch, a scan over micro-batches and the loop of two programs give the same losses and parameters to rounding."""
    config.steps, config.checkpoint.every_steps, config.eval.every_steps, config.eval.at_end = 2, 2, 100, False
    found = {}
    for name, micro, form in (("whole", 4, "scan"), ("scan", 2, "scan"), ("loop", 2, "loop")):
        config.train.micro_batch_size, config.train.accumulation = micro, form
        train(config, tmp_path / name, devices=ONE, log=lambda *_: None)
        found[name] = losses(tmp_path / name), final_params(tmp_path / name)
    for name in ("scan", "loop"):
        assert_close("losses", list(found[name][0].values()), list(found["whole"][0].values()), rel=1e-6)
        for path, want in found["whole"][1].items():
            # Adam divides by the root of tiny second moments after two steps: rounding of the gradient is magnified there.
            assert_close(path, found[name][1][path], want, rel=1e-3)
    for path, want in found["scan"][1].items():
        assert_close(path, found["loop"][1][path], want, rel=1e-5)


MESHES = [pytest.param(m, marks=pytest.mark.slow) for m in ({"data": 2, "fsdp": 2, "tensor": 2}, {"data": 1, "fsdp": 8})]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_eight_devices_equal_one(config, tmp_path, mesh):
    """The losses and gradient norms of three steps."""
    config.batch_size, config.steps, config.eval.every_steps, config.eval.at_end = 8, 3, 100, False
    config.checkpoint.every_steps = 100
    train(config, tmp_path / "one", devices=ONE, log=lambda *_: None)
    config.mesh.update(mesh)
    train(config, tmp_path / "eight", log=lambda *_: None)
    for a, b in zip(metrics.read(tmp_path / "one"), metrics.read(tmp_path / "eight")):
        assert_close("loss", b["loss"], a["loss"], rel=1e-5)
        assert_close("grad_norm", b["grad_norm"], a["grad_norm"], rel=1e-4)


@pytest.mark.slow
def test_batch_ramp_and_length_stages_resume(config, tmp_path):
    """Tokens are counted exactly through a ramp and a change of length, and a resumed run goes on in the middle of both."""
    config.train.batch_ramp, config.train.length_stages = ((0, 2), (2, 4)), ((0, 32), (4, 64))
    config.train.micro_batch_size = 2
    train(config, tmp_path / "straight", devices=ONE, log=lambda *_: None)
    assert metrics.read(tmp_path / "straight")[-1]["step"] == 6
    tokens = {r["step"]: r["tokens"] for r in metrics.read(tmp_path / "straight") if "tokens" in r}
    assert tokens == {1: 64, 2: 128, 3: 256, 4: 384, 5: 640, 6: 896}
    run = Run(config, pathlib.Path(tmp_path / "resumed"), lambda *_: None, ONE)
    save = run._save

    def save_and_stop(state, step, result):
        save(state, step, result)
        run.stopping = True

    run._save = save_and_stop
    assert run.train()["stopped"]
    train(config, tmp_path / "resumed", devices=ONE, log=lambda *_: None)
    assert_same_run(tmp_path / "straight", tmp_path / "resumed")


def test_non_finite_stops_and_names_the_layers(config, tmp_path):
    config.optim.lr, config.optim.clip, config.optim.warmup_steps, config.steps = 1e30, 0.0, 0, 20
    config.checkpoint.every_steps = 1
    config.eval.every_steps = 100
    with pytest.raises(NonFiniteError, match=r"step \d+: loss .*not finite: .*layers\.\d+\..*optim\.lr"):
        train(config, tmp_path, devices=ONE, log=lambda *_: None)


def test_another_config_in_the_workdir(config, tmp_path):
    Run(config, pathlib.Path(tmp_path), lambda *_: None, ONE, start=False)
    config.model.d_model = 16
    with pytest.raises(ConfigError, match=r"holds a run with another config: model\.d_model 32 there, 16 here"):
        train(config, tmp_path, devices=ONE, log=lambda *_: None)


def test_eval_only_needs_a_checkpoint(config, tmp_path):
    with pytest.raises(ConfigError, match="no checkpoint"):
        train(config, tmp_path, eval_only=True, devices=ONE, log=lambda *_: None)


def test_vocabulary_too_small(config, tmp_path):
    config.model.vocab_size = 100
    with pytest.raises(ConfigError, match="model.vocab_size=100 is smaller than the tokenizer's 258"):
        train(config, tmp_path, devices=ONE, log=lambda *_: None)


def command(config, workdir, *extra):
    paths, cache = config.data.paths[0], config.data.cache_dir
    return [
        sys.executable, "-u", "-m", "experiments.train", "--config=configs/quickstart.py:test", f"--workdir={workdir}",
        f"--config.data.paths=('{paths}',)", "--config.data.holdout=0.2", f"--config.data.cache_dir={cache}",
        "--config.eval.sample_tokens=0", "--config.checkpoint.every_steps=1", "--config.steps=40", "--config.eval.every_steps=1000",
        "--config.eval.at_end=False", "--config.model.num_layers=2", "--config.model.channel=('mlp','moe')",
        "--config.log.tensorboard=off", *extra,
    ]  # fmt: skip


def environment():
    cache = str(pathlib.Path(__file__).parents[2] / ".cache" / "jax-tests")
    return {**os.environ, "XLA_FLAGS": "", "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", cache)}


def start_and_signal(config, workdir, after_lines, number):
    """Starts the command, sends it a signal once it has printed a step line `after_lines` times; (exit code, output)."""
    process = subprocess.Popen(command(config, workdir), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment())
    seen, output = 0, []
    for line in process.stdout:
        output.append(line)
        seen += line.startswith("step ") and "/40" in line
        if seen == after_lines:
            process.send_signal(number)
            seen += 1
    return process.wait(60), "".join(output)


@pytest.mark.slow
@pytest.mark.subprocess
def test_sigterm_saves_and_resumes_bit_for_bit(config, tmp_path):
    code, output = start_and_signal(config, tmp_path / "run", 5, signal.SIGTERM)
    assert code == 0 and "stopped by a signal" in output, output
    done = subprocess.run(command(config, tmp_path / "run"), capture_output=True, text=True, env=environment())
    assert done.returncode == 0 and "resumed step" in done.stdout, done.stdout + done.stderr
    subprocess.run(command(config, tmp_path / "straight"), check=True, capture_output=True, env=environment())
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")
    assert len(losses(tmp_path / "run")) == 40


@pytest.mark.slow
@pytest.mark.subprocess
@pytest.mark.parametrize("delay", [0.0, 0.05, 0.2, 0.7])
def test_sigkill_at_any_moment_resumes_bit_for_bit(config, tmp_path, delay):
    """A save every step: a kill falls between or into saves; what is left resumes and ends as the straight run."""
    process = subprocess.Popen(command(config, tmp_path / "run"), stdout=subprocess.PIPE, text=True, env=environment())
    for line in process.stdout:
        if line.startswith("step ") and "/40" in line and int(line.split()[1].split("/")[0]) >= 4:
            time.sleep(delay)
            process.kill()
            break
    process.wait(60)
    subprocess.run(command(config, tmp_path / "run"), check=True, capture_output=True, env=environment())
    subprocess.run(command(config, tmp_path / "straight"), check=True, capture_output=True, env=environment())
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["identity"]["seed"] == 0

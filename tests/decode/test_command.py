"""`python -m experiments.generate` as a person types it."""
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from configs import quickstart
from effmodels.train.loop import train

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Two trained steps of the quickstart's small form."""
    folder = tmp_path_factory.mktemp("generate")
    for i in range(20):
        (folder / f"f{i}.py").write_text("\n".join(f"def f{j}(x):\n    return x * {j} + {i}" for j in range(40)))
    config = quickstart.get_config("test")
    config.steps, config.model.num_layers, config.model.channel = 2, 2, ("mlp", "moe")
    config.data.paths, config.data.cache_dir, config.data.holdout = (f"{folder}/*.py",), str(folder / "cache"), 0.2
    config.eval.at_end, config.eval.sample_tokens, config.log.tensorboard = False, 0, "off"
    train(config, folder / "run", devices=jax.devices()[:1], log=lambda *_: None)
    return folder / "run"


def generate(workdir, *arguments, module="generate"):
    command = [sys.executable, "-m", f"experiments.{module}", f"--workdir={workdir}", *arguments]
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax-tests")}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


@pytest.mark.subprocess
def test_streams_reproducibly_and_stops(workdir):
    options = ("--prompt=def ", "--max_new_tokens=12", "--temperature=1.0", "--top_k=30", "--top_p=0.95", "--seed=5")
    first, again = generate(workdir, *options), generate(workdir, *options)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("def ") and first.stdout == again.stdout and len(first.stdout) > len("def \n")
    assert "checkpoint of step 2, prompt of" in first.stderr and "tokens/s" in first.stderr
    new = first.stdout.removesuffix("\n")[len("def ") :]
    stopped = generate(workdir, *options, f"--stop={new[3:5]}")
    assert stopped.stdout == "def " + new[: new.index(new[3:5])] + "\n"


@pytest.mark.slow
@pytest.mark.subprocess
def test_evaluates_by_position_on_longer_rows(workdir, tmp_path):
    scaling, out = "--rope_scaling=kind=ntk,factor=2", tmp_path / "bins.json"
    ran = generate(workdir, "--seq_len=96", "--batches=2", "--batch_size=2", scaling, f"--json={out}", module="eval")
    assert ran.returncode == 0, ran.stderr
    found = json.loads(out.read_text())
    assert found["seq_len"] == 96 and found["rope_scaling"] == {"kind": "ntk", "factor": 2}
    assert [b["first"] for b in found["bins"]][:4] == [0, 1, 2, 4] and found["bins"][-1]["last"] == 127
    assert found["tokens"] == sum(b["tokens"] for b in found["bins"]) and f"loss {found['loss']:.4f}" in ran.stdout
    wrong = generate(workdir, "--rope_scaling=kind=ntx", module="eval")
    assert wrong.returncode != 0 and "rope_scaling.kind: unknown 'ntx'" in wrong.stderr and "Traceback" not in wrong.stderr


@pytest.mark.subprocess
@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--prompt=",), "expected prompts"),
        (("--prompt=a", "--top_k=0", "--temperature=1"), "top_k=0: expected at least 1"),
        (("--prompt=a", "--step=77"), "77"),
        (("--prompt=a", "--speculate"), "no modules that predict further tokens"),
        ((), "--prompt must have a value"),
    ],
)
def test_mistakes(workdir, arguments, message):
    ran = generate(workdir, *arguments)
    assert ran.returncode != 0 and message in ran.stderr + ran.stdout and "Traceback" not in ran.stderr, ran.stderr

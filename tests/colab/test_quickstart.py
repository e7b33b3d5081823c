"""The Colab notebook equals its source, runs as a script and as a notebook, fails loudly on a fallback and never touches the runtime's
jax."""
import importlib.util
import os
import pathlib
import subprocess
import sys
from importlib import metadata

import jax
import pytest

jupytext = pytest.importorskip("jupytext")

ROOT = pathlib.Path(__file__).resolve().parents[2]
SOURCE, NOTEBOOK = ROOT / "colab" / "quickstart.py", ROOT / "colab" / "quickstart.ipynb"
FIND_SPEC = importlib.util.find_spec


def cells(path=SOURCE):
    return [(c.cell_type, c.metadata.get("tags", []), c.source) for c in jupytext.read(path).cells]


def run_cells(*tags, **settings):
    """Executes the first code cell, changes its settings, then the cells with these tags; the namespace."""
    code = [(t, source) for kind, t, source in cells() if kind == "code"]
    chosen = [code[0][1]] + [source for t, source in code if set(t) & set(tags)]
    assert len(chosen) == 1 + len(tags)
    namespace = {}
    for source in chosen:
        exec(compile(source, str(SOURCE), "exec"), namespace)
        namespace.update(settings)
    return namespace


def environment(tmp_path):
    """One CPU device, the `:test` config, no window for plots, caches inside the checkout, the checkout importable."""
    return {
        **os.environ,
        "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax-tests"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3", "MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT),
        "EFFMODELS_DATA": os.environ.get("EFFMODELS_DATA", str(ROOT / ".cache" / "data")),
        "EFFMODELS_ACCELERATOR": "cpu", "EFFMODELS_QUICKSTART": "test", "EFFMODELS_WORKDIR": str(tmp_path / "run"),
    }  # fmt: skip


def test_notebook_equals_its_source():
    notebook = jupytext.read(NOTEBOOK)
    assert cells(NOTEBOOK) == cells(SOURCE), "run: jupytext --to ipynb --update colab/quickstart.py"
    assert all(not c.get("outputs") and c.get("execution_count") is None for c in notebook.cells), "strip the outputs"
    assert notebook.metadata.kernelspec.language == "python"
    again = jupytext.reads(jupytext.writes(notebook, "py:percent"), "py:percent")
    assert [c.source for c in again.cells] == [c.source for c in notebook.cells]


@pytest.mark.slow  # the notebook below runs the same cells
@pytest.mark.subprocess
def test_runs_as_a_script(tmp_path):
    ran = subprocess.run([sys.executable, SOURCE], cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    check_results(tmp_path, ran.stdout)


@pytest.mark.slow(always=True)
@pytest.mark.subprocess
def test_runs_as_a_notebook(tmp_path, monkeypatch):
    """After the script, so that its programs come from the compilation cache."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(o.get("text", "") for c in notebook.cells if c.cell_type == "code" for o in c.outputs)
    check_results(tmp_path, printed)


def check_results(tmp_path, printed):
    run = tmp_path / "run"
    assert (run / "metrics.jsonl").exists() and (run / "loss.png").stat().st_size > 5000
    assert "checkpoint of step 6\ndef " in printed, printed


def test_holds_no_library_code():
    assert len(SOURCE.read_text().splitlines()) < 200
    assert not any("class " in source or "jit" in source for kind, _, source in cells() if kind == "code")


def test_a_tpu_that_jax_does_not_see_is_an_error():
    means = r"ACCELERATOR = 'tpu' means a TPU here, but jax \S+ runs on a CPU\."
    with pytest.raises(RuntimeError, match=f"{means} In Colab: Runtime > Change runtime type > TPU, .*set ACCELERATOR = 'cpu'"):
        run_cells("accelerator", ACCELERATOR="tpu")


def test_a_silent_fallback_is_an_error(monkeypatch):
    """ACCELERATOR = "auto" on a machine with a TPU, and jax on its CPU."""
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v4-8")
    with pytest.raises(RuntimeError, match="'auto' means a TPU here, but jax .* runs on a CPU"):
        run_cells("accelerator", ACCELERATOR="auto")


def test_no_device_is_an_error(monkeypatch):
    def fails():
        raise RuntimeError("Unable to initialize backend 'tpu': TPU already in use")

    monkeypatch.setattr(jax, "default_backend", fails)
    with pytest.raises(RuntimeError, match="finds no device: Unable to initialize backend 'tpu': TPU already in use"):
        run_cells("accelerator", ACCELERATOR="tpu")


@pytest.fixture
def colab(monkeypatch):
    """A Colab runtime without effmodels: what pip would be called with is recorded; versions are those of `runtime`."""

    class Runtime:
        versions = {"jax": "0.10.2", "jaxlib": "0.10.2", "flax": "0.12.8", "optax": "0.2.3", "rich": "14.1", "chex": "0.1.92"}
        requires = ["jax<0.13,>=0.10.2", "flax<0.13,>=0.12.8", "optax<0.3,>=0.2.8", "chex<0.2,>=0.1.92", "grain<0.3,>=0.2.18", "rich>=14",
                    'jax[tpu]<0.13,>=0.10.2; extra == "tpu"', 'pytest>=8; extra == "test"']  # fmt: skip
        commands = []

        def __init__(self):
            self.commands, self.pins, self.versions = [], [], dict(self.versions)

        def version(self, name):
            if name not in self.versions:
                raise metadata.PackageNotFoundError(name)
            return self.versions[name]

        def pip(self, command):
            self.commands.append(command)
            self.pins.append(pathlib.Path(command[command.index("--constraint") + 1]).read_text())
            self.versions |= {"effmodels": "0.1.0"} if "--no-deps" in command else {}

    runtime = Runtime()
    monkeypatch.setitem(sys.modules, "google.colab", object())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "effmodels" else FIND_SPEC(name, *rest))
    monkeypatch.setattr(metadata, "version", runtime.version)
    monkeypatch.setattr(metadata, "requires", lambda name: runtime.requires)
    monkeypatch.setattr(subprocess, "check_call", runtime.pip)
    return runtime


REPOSITORY = "https://example.com/effmodels.git"


def test_installs_what_is_missing_and_never_jax(colab):
    run_cells("install", REPOSITORY=REPOSITORY)
    ours, missing = colab.commands
    assert "--no-deps" in ours and ours[-1] == f"git+{REPOSITORY}"
    assert missing[-2:] == ["optax<0.3,>=0.2.8", "grain<0.3,>=0.2.18"], "optax is too old, grain is missing, the rest fits"
    for command, pins in zip(colab.commands, colab.pins):
        assert command[:4] == [sys.executable, "-m", "pip", "install"]
        assert not {"-U", "--upgrade", "--force-reinstall"} & set(command)
        assert not any(a.startswith(("jax", "flax")) for a in command[4:])
        assert pins == "jax==0.10.2\njaxlib==0.10.2\nflax==0.12.8\n", "pip may not replace them as somebody's dependency either"


@pytest.mark.parametrize("name, version", [("jax", "0.7.2"), ("flax", "0.10.7"), ("jax", "0.13.1")])
def test_a_runtime_that_does_not_fit_is_said_in_one_sentence(colab, name, version):
    colab.versions[name] = version
    message = rf"This runtime has {name} {version}, effmodels needs {name}<0\.13.*never replaces it: choose a runtime version that fits"
    with pytest.raises(RuntimeError, match=message):
        run_cells("install", REPOSITORY=REPOSITORY)
    assert len(colab.commands) == 1, "only effmodels itself, without dependencies"
    with pytest.raises(RuntimeError, match=message):  # the cell is run again: effmodels is there now, the runtime is as before
        run_cells("install", REPOSITORY=REPOSITORY)


@pytest.mark.parametrize("installed", [True, False], ids=["installed", "a checkout on the path"])
def test_a_present_effmodels_is_left_alone(colab, monkeypatch, installed):
    monkeypatch.setattr(importlib.util, "find_spec", FIND_SPEC)
    if installed:
        colab.versions |= {"effmodels": "0.1.0", "optax": "0.2.8", "grain": "0.2.18"}
    run_cells("install", REPOSITORY=REPOSITORY)
    assert not colab.commands


def test_without_an_address_or_outside_colab_it_says_what_to_do(colab, monkeypatch):
    with pytest.raises(RuntimeError, match="set REPOSITORY in the first cell to the git address"):
        run_cells("install", REPOSITORY="")
    monkeypatch.delitem(sys.modules, "google.colab")
    with pytest.raises(RuntimeError, match=r"run `pip install -e \.` in its checkout"):
        run_cells("install", REPOSITORY=REPOSITORY)
    assert not colab.commands

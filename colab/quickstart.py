# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # effmodels: train a small RetNet-style model and let it write
#
# A hybrid of retention, attention and a mixture of experts learns the source code of Python's standard library, on whatever this runtime
# has: a TPU, a GPU or a CPU. Run all cells; on a CPU it takes a few minutes.
#
# `colab/quickstart.py` is the source of this notebook; `jupytext --to ipynb --update colab/quickstart.py` writes it again.

# %%
import glob
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata

ACCELERATOR = os.environ.get("EFFMODELS_ACCELERATOR", "auto")  # "auto", "tpu", "gpu" or "cpu"
ARGUMENT = os.environ.get("EFFMODELS_QUICKSTART")  # of configs/quickstart.py; "test" takes seconds
WORKDIR = os.environ.get("EFFMODELS_WORKDIR", "runs/quickstart")  # the same folder resumes
REPOSITORY = os.environ.get("EFFMODELS_REPOSITORY", "")  # the git address to install from, such as https://.../effmodels.git
IN_COLAB = "google.colab" in sys.modules

# %% [markdown]
# ## Install
#
# Only in Colab, and only what is missing. The runtime's jax and flax stay as they are: jax, its accelerator library and the machine belong
# together, and a reinstalled jax usually finds only the CPU. If they do not fit, this cell says so and stops.

# %% tags=["install"]
KEPT = ("jax", "jaxlib", "flax")  # of the runtime; never installed, upgraded or replaced here


def version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def install(*arguments):
    """pip install under constraints that pin what is kept: pip refuses rather than replace it."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as pins:
        pins.writelines(f"{name}=={version(name)}\n" for name in KEPT if version(name))
        pins.flush()
        subprocess.check_call([sys.executable, "-m", "pip", "install", "--quiet", "--constraint", pins.name, *arguments])
    importlib.invalidate_caches()


def check_and_complete():
    """Compares the runtime with the versions that effmodels asks for, and installs the missing packages by name."""
    from packaging.requirements import Requirement

    missing = []
    for requirement in map(Requirement, metadata.requires("effmodels")):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        here = version(requirement.name)
        if here is not None and requirement.specifier.contains(here, prereleases=True):
            continue
        if requirement.name in KEPT:
            raise RuntimeError(
                f"This runtime has {requirement.name} {here or 'missing'}, effmodels needs {requirement}. The notebook never replaces it: "
                "choose a runtime version that fits (Runtime > Change runtime type > Runtime version)."
            )
        missing.append(str(requirement))
    if missing:
        install(*missing)


if importlib.util.find_spec("effmodels") is None:
    if not IN_COLAB:
        raise RuntimeError("effmodels is not installed: run `pip install -e .` in its checkout, then start this notebook again.")
    if not REPOSITORY:
        raise RuntimeError("effmodels is not installed: set REPOSITORY in the first cell to the git address of effmodels.")
    install("--no-deps", f"git+{REPOSITORY}")
if IN_COLAB and version("effmodels"):
    check_and_complete()

# %% [markdown]
# ## Which accelerator?
#
# jax falls back to the CPU with a line in the log when it cannot use the accelerator. Here that is an error.

# %% tags=["accelerator"]
import jax


def hardware():
    """What the machine has, whatever jax thinks of it."""
    if glob.glob("/dev/accel*") or "COLAB_TPU_ADDR" in os.environ or "TPU_ACCELERATOR_TYPE" in os.environ:
        return "tpu"
    return "gpu" if os.path.exists("/dev/nvidia0") or shutil.which("nvidia-smi") else "cpu"


wanted = hardware() if ACCELERATOR == "auto" else ACCELERATOR
if wanted == "cpu":
    jax.config.update("jax_platforms", "cpu")
try:
    found = f"runs on a {jax.default_backend().upper()}"
except RuntimeError as error:
    found = f"finds no device: {error}"
if found != f"runs on a {wanted.upper()}":
    raise RuntimeError(
        f"ACCELERATOR = {ACCELERATOR!r} means a {wanted.upper()} here, but jax {jax.__version__} {found}. In Colab: Runtime > Change "
        f"runtime type > {wanted.upper()}, then run all cells again. Elsewhere: pip install -e '.[tpu]' or '.[cuda]'. "
        "To go on without it, set ACCELERATOR = 'cpu' in the first cell and restart."
    )
print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}, Python {sys.version.split()[0]}")

# %% [markdown]
# ## Train
#
# The same call as `python -m experiments.train --config=configs/quickstart.py`. Interrupt it and run the cell again: it resumes.

# %%
from configs.quickstart import get_config
from effmodels.train.loop import train

config = get_config(ARGUMENT)
train(config, WORKDIR)

# %% [markdown]
# ## The loss
#
# Bits per byte of text that was never trained on: a model that knows only how frequent each byte is reaches the unigram line, `gzip -9` the
# other one.

# %%
import matplotlib.pyplot as plt

from effmodels import data

baselines = data.baselines(data.prepare(config.data, config.seq_len))
records = [json.loads(line) for line in (pathlib.Path(WORKDIR) / "metrics.jsonl").read_text().splitlines()]
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5))
trained = [(r["step"], r["loss"]) for r in records if "loss" in r]
left.plot(*zip(*trained))
left.set(xlabel="step", ylabel="training loss, nats per token")
held_out = [(r["step"], r["bits_per_byte"]) for r in records if "bits_per_byte" in r]
right.plot(*zip(*held_out), marker="o", label="this model")
for name, style in (("unigram", ":"), ("gzip", "--")):
    right.axhline(baselines[f"{name}_bits_per_byte"], color="grey", linestyle=style, label=name)
right.set(xlabel="step", ylabel="bits per byte, held-out text")
right.legend()
figure.tight_layout()
figure.savefig(pathlib.Path(WORKDIR) / "loss.png")
plt.show()

# %% [markdown]
# ## Let it write
#
# Decoded from the saved checkpoint with the carried state: one step per token, never the prefix again.

# %%
from effmodels import decode
from effmodels.train.restore import load_run

model, tokenizer, step = load_run(WORKDIR)
prompt = "def "
tokens = decode.generate(
    model, [tokenizer.encode(prompt)], config.eval.sample_tokens, temperature=0.7, top_k=40, key=jax.random.key(0),
    eos_id=tokenizer.eos_id, vocab_size=tokenizer.vocab_size,
)  # fmt: skip
print(f"checkpoint of step {step}\n" + tokenizer.decode(tokens[0].tolist()))

"""A real language model, where $EFFMODELS_SMOLLM2 names the folder of make_smollm2: its logits, and its words through the command."""
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effmodels.decode import generate
from effmodels.interop import load_pretrained

FOLDER = os.environ.get("EFFMODELS_SMOLLM2")
ROOT = pathlib.Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not FOLDER, reason="EFFMODELS_SMOLLM2 names no folder of make_smollm2")]


def test_logits_and_greedy_words():
    folder = pathlib.Path(FOLDER)
    ref, want = json.loads((folder / "reference.json").read_text()), np.load(folder / "reference.npy")
    with jax.default_matmul_precision("highest"):
        model, tokenizer = load_pretrained(folder)
        assert tokenizer.encode(ref["text"]).tolist() == ref["ids"]
        got = np.asarray(model(jnp.asarray([ref["ids"]])))[0]
        assert np.max(np.abs(got - want)) / np.sqrt(np.mean(want**2)) <= 1e-4
        new = np.asarray(generate(model, [ref["ids"]], len(ref["more"])))[0, len(ref["ids"]) :]
    assert new.tolist() == ref["more"]


def test_the_command_says_something_sensible():
    options = (f"--workdir={FOLDER}", "--prompt=The capital of France is", "--max_new_tokens=8")
    command = [sys.executable, "-m", "experiments.generate", *options]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "XLA_FLAGS": ""})
    assert ran.returncode == 0 and "Paris" in ran.stdout, ran.stdout + ran.stderr

"""`python -m experiments.data`, and the default corpus end to end."""
import json
import subprocess
import sys

import ml_collections
import pytest

import effmodels.data
from experiments import data as experiment

CONFIG = """
import ml_collections

def get_config(arg=None):
    return ml_collections.ConfigDict({config})
"""


def config_of(tmp_path, corpus_dir):
    return {"seed": 0, "seq_len": 32, "batch_size": 4, "data": {
        **effmodels.data.defaults(), "paths": (str(corpus_dir),), "cache_dir": str(tmp_path / "cache"), "holdout": 0.2}}


@pytest.mark.parametrize("split", ["train", "validation"])
def test_shows_a_batch_as_text_with_its_sources(tmp_path, corpus_dir, split):
    lines = []
    experiment.show(ml_collections.ConfigDict(config_of(tmp_path, corpus_dir)), split=split, rows=3, out=lines.append)
    text = "\n".join(lines)
    for word in ("corpus ", "file list sha256", "bytes per token", "filled", "unigram", "gzip -9", f"{split} batch 0: 4 rows of 32 tokens",
                 "=== row 2: window", "--- document 1: doc", "bytes "):
        assert word in text, word


def test_a_batch_past_the_end_is_said(tmp_path, corpus_dir):
    with pytest.raises(effmodels.data.DataError, match="--batch=999: the validation split has .* windows"):
        experiment.show(ml_collections.ConfigDict(config_of(tmp_path, corpus_dir)), split="validation", batch=999, out=lambda line: None)


@pytest.mark.subprocess
def test_command_line(tmp_path, corpus_dir):
    path = tmp_path / "config.py"
    path.write_text(CONFIG.format(config=repr(config_of(tmp_path, corpus_dir))))
    command = [sys.executable, "-m", "experiments.data", f"--config={path}"]
    done = subprocess.run([*command, "--rows=1", "--config.data.packing=best_fit"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "best_fit" in done.stdout and "=== row 0" in done.stdout
    failed = subprocess.run([*command, "--config.data.tokenizer=bites"], capture_output=True, text=True, timeout=120)
    assert failed.returncode == 1 and "error: config.data.tokenizer='bites'" in failed.stderr and "Traceback" not in failed.stderr


@pytest.mark.subprocess
def test_a_warm_start_imports_neither_tfds_nor_jax_nor_tokenizers(tmp_path, corpus_dir):
    config = config_of(tmp_path, corpus_dir)["data"]
    code = ("import json, sys, effmodels.data as d; d.prepare(json.loads(sys.argv[1]), 32, log=lambda s: None); "
            "print([m for m in ('tensorflow_datasets', 'grain', 'jax', 'tokenizers', 'pyarrow') if m in sys.modules])")
    for want in (None, "[]"):
        done = subprocess.run([sys.executable, "-c", code, json.dumps(config)], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert want is None or done.stdout.strip() == want
        assert not done.stderr


@pytest.mark.subprocess
def test_no_import_is_replaced_after_the_libraries_are_in(tmp_path, corpus_dir):
    """While etils.epy.lazy_imports runs, every thread's imports are lazy modules: a thread that compiles would fail."""
    config = config_of(tmp_path, corpus_dir)["data"]
    code = """if True:
        import json, sys
        import effmodels.data as d
        d.import_libraries()
        from etils import epy
        def replaced(*args, **kwargs):
            raise AssertionError("imports replaced")
        epy.lazy_imports = epy.lazy_imports_utils.lazy_imports = replaced
        prepared = d.prepare(json.loads(sys.argv[1]), 32, log=lambda s: None)
        batch = next(d.batches(prepared, batch_size=2, seed=0))
        d.trace({k: v[0] for k, v in batch.items()}, prepared), d.baselines(prepared)
    """
    done = subprocess.run([sys.executable, "-c", code, json.dumps(config)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_default_corpus_with_a_learned_vocabulary(tmp_path):
    prepared = effmodels.data.prepare({"cache_dir": str(tmp_path), "tokenizer": "bpe:8192"}, 512, log=print)
    assert 8e6 < prepared.info["bytes"] < 13e6 and prepared.info["vocab_size"] == 8192 and 3.5 < prepared.info["bytes_per_token"] < 4.5
    base = effmodels.data.baselines(prepared)
    assert 1.9 < base["gzip_bits_per_byte"] < base["unigram_bits_per_byte"] < 3
    best = effmodels.data.prepare({"cache_dir": str(tmp_path), "tokenizer": "bpe:8192", "packing": "best_fit"}, 512, log=print)
    assert best.info["efficiency"] > 0.99 and best.info["corpus_hash"] == prepared.info["corpus_hash"]

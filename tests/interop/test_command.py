"""Tokenizers and runs: what travels with the weights."""
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import common as config_defaults
from effmodels.config import ConfigError
from effmodels.data.tokenizer import ByteTokenizer
from effmodels.interop import InteropError, load_pretrained, save_pretrained
from effmodels.models import Decoder
from effmodels.train.imported import write_run
from effmodels.train.restore import load_run

TEXT = "naïve cafés\n\tcost 3 € or <|endoftext|>"


def decoder(vocab_size=258):
    parts = {"mixers": {"attention": {"num_heads": 2}}, "channels": {"mlp": {"hidden": 24}}}
    return Decoder({"vocab_size": vocab_size, "d_model": 16, "num_layers": 2, **parts}, rngs=nnx.Rngs(0))


@pytest.mark.slow
def test_bytes_become_a_tokenizer_file_with_the_same_ids(tmp_path):
    model, bytes_ = decoder(), ByteTokenizer()
    assert save_pretrained(model, tmp_path, tokenizer=bytes_) == "llama"
    again, tokenizer = load_pretrained(tmp_path)
    np.testing.assert_array_equal(tokenizer.encode(TEXT), bytes_.encode(TEXT))
    assert tokenizer.decode(bytes_.encode(TEXT)) == TEXT
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (256, 257, 258)
    tokens = jnp.asarray([[1, 2, 3, 200]])
    np.testing.assert_array_equal(again(tokens), model(tokens))


def test_a_tokenizer_with_more_ids_than_the_model(tmp_path):
    save_pretrained(decoder(200), tmp_path, tokenizer=ByteTokenizer())
    with pytest.raises(InteropError, match="ids up to 257, and config.json a vocabulary of 200"):
        load_pretrained(tmp_path)


def test_a_folder_becomes_a_run_and_comes_back(tmp_path):
    model, config = decoder(), config_defaults.base().to_dict()
    write_run(tmp_path / "run", model, ByteTokenizer(), config, log=lambda *_: None)
    again, tokenizer, step = load_run(tmp_path / "run", log=lambda *_: None)
    assert step == 0 and tokenizer.vocab_size == 258
    tokens = jnp.asarray([[1, 2, 3, 200]])
    np.testing.assert_array_equal(again(tokens), model(tokens))
    with pytest.raises(ConfigError, match="holds a run already"):
        write_run(tmp_path / "run", model, ByteTokenizer(), config)
    with pytest.raises(ConfigError, match="needs a tokenizer"):
        write_run(tmp_path / "other", model, None, config)


@pytest.mark.slow
@pytest.mark.subprocess
def test_the_command_converts_both_ways(tmp_path):
    def run(*arguments):
        return subprocess.run([sys.executable, "-m", "experiments.convert", *arguments], capture_output=True, text=True)

    save_pretrained(decoder(), tmp_path / "a", tokenizer=ByteTokenizer())
    there, back = (tmp_path / "a", f"--run={tmp_path / 'run'}"), (tmp_path / "run", f"--folder={tmp_path / 'b'}")
    for arguments in ((f"--source={source}", target) for source, target in (there, back)):
        ran = run(*arguments)
        assert ran.returncode == 0 and "wrote" in ran.stdout, ran.stderr
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    ran = run(f"--source={tmp_path / 'nothing'}", f"--folder={tmp_path / 'c'}")
    assert ran.returncode != 0 and "error:" in ran.stderr and "Traceback" not in ran.stderr

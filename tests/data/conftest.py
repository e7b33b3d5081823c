"""A small corpus that has every awkward length: empty, one byte, shorter and longer than a window, many windows, non-ASCII."""
import pytest

import effmodels.data


def write_corpus(root, sizes=(0, 1, 7, 15, 16, 17, 33, 64, 200, 1000, 5, 5, 9, 700)):
    root.mkdir(parents=True, exist_ok=True)
    words = "the quick brown fox jumps over the lazy dog; größe 日本 🙂\n".split(" ")
    for i, size in enumerate(sizes):
        text = " ".join(words[(i + j) % len(words)] for j in range(size))[:size]
        (root / f"doc{i:02d}.txt").write_text(text)
    return root


@pytest.fixture
def corpus_dir(tmp_path):
    return write_corpus(tmp_path / "corpus")


@pytest.fixture
def make(tmp_path, corpus_dir):
    """prepare() on the small corpus: make(seq_len, **fields of config.data); `make.lines` holds what was logged."""
    def build(seq_len=16, **fields):
        build.lines = []
        config = {"paths": (str(corpus_dir),), "cache_dir": str(tmp_path / "cache"), "holdout": 0.2, **fields}
        return effmodels.data.prepare(config, seq_len, log=build.lines.append)
    return build

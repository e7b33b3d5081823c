"""TFDS without TensorFlow: datasets by name, without a network, and the sentence when one is needed."""
import socket

import numpy as np
import pytest
import tensorflow_datasets as tfds

import effmodels.data
from effmodels.data import tfds_text
from effmodels.data.options import DataError


class TinyProse(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.2.0")

    def _info(self):
        features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "label": tfds.features.Scalar(np.int64)})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(30), "test": self._generate_examples(4)}

    def _generate_examples(self, n):
        for i in range(n):
            yield i, {"text": f"document {i} of {n}: " + "lorem ipsum " * i, "label": i}


@pytest.fixture
def make(tmp_path):
    def build(**fields):
        config = {"name": "tiny_prose", "data_dir": str(tmp_path / "tfds"), "cache_dir": str(tmp_path / "cache"), **fields}
        return effmodels.data.prepare(config, 32, log=lambda line: build.lines.append(line))
    build.lines = []
    return build


@pytest.fixture
def no_network(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: pytest.fail("a network look-up was made"))


def test_dataset_by_name(make, no_network):
    prepared = make()
    assert prepared.info["documents"] == 30 and prepared.info["validation_documents"] == 4
    (name, offset, size), *_ = effmodels.data.trace(prepared.train[0], prepared)
    assert name.startswith("tiny_prose/train:") and offset == 0
    assert prepared.tokenizer.decode(prepared.train[0]["tokens"]).startswith("document ")
    make.lines.clear()
    assert make().info == prepared.info and len(make.lines) == 1
    sliced = make(train_split="train[:50%]", validation_split="train[50%:]")
    assert (sliced.info["documents"], sliced.info["validation_documents"]) == (15, 15)


def test_faults(make, no_network):
    for fields, match in (
        ({"name": "tiny_prosa"}, "neither 'local' nor a TFDS dataset; did you mean 'tiny_prose'"),
        ({"column": "body"}, "has no feature 'body'; it has: label, text|has no feature 'body'; it has: text, label"),
        ({"column": "label"}, "feature 'label' is Scalar, text is expected"),
        ({"train_split": "training"}, "train_split='training': tiny_prose/1.2.0 has the splits train, test"),
    ):
        with pytest.raises(DataError, match=match):
            make(**fields)


def test_a_dataset_that_needs_a_network_says_so_at_once(make, monkeypatch):
    from tensorflow_datasets.core.download import downloader

    def offline(self, *args, **kwargs):
        raise ConnectionError("Max retries exceeded with url: /data")

    monkeypatch.setattr(TinyProse, "download_and_prepare", offline)
    with pytest.raises(DataError, match=r"could not be prepared \(ConnectionError: Max retries .*\). It may need a network"):
        make(data_dir="")
    assert downloader.MAX_RETRIES == 0


def test_faults_of_the_sources_come_through_the_builder_unchanged(tmp_path):
    def documents(split):
        yield "a", 0, b"fine"
        raise DataError("a.jsonl, line 2: not valid JSON")

    with pytest.raises(DataError, match="^a.jsonl, line 2: not valid JSON$"):
        tfds_text.write(tmp_path, ("train",), documents)


def test_local_text_makes_no_network_look_up_and_no_tensorflow(tmp_path, no_network):
    import sys

    (tmp_path / "a.txt").write_text("some text, long enough\n" * 20)
    effmodels.data.prepare({"paths": (str(tmp_path / "a.txt"),), "cache_dir": str(tmp_path / "cache")}, 16, log=lambda s: None)
    assert "tensorflow" not in sys.modules

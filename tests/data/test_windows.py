"""Windows as batches: targets never cross a document and none is lost, every token is traced to its byte, damage is found."""
import errno
import json

import numpy as np
import pytest

import effmodels.data
from effmodels.data import storage
from effmodels.data.options import DataError


def documents_from(prepared, window_set):
    """{source id: [(offset, bytes)]} of all pieces, decoded; and for each piece the checks that hold by itself."""
    pieces, targets, tokenizer = {}, 0, prepared.tokenizer
    for w in range(len(window_set)):
        row = window_set[w]
        assert np.array_equal(row["weights"] > 0, row["segment_ids"] > 0)
        for s, source in enumerate(row["source_id"][row["source_id"] >= 0], start=1):
            at = np.flatnonzero(row["segment_ids"] == s)
            ids, wanted = row["tokens"][at], row["targets"][at]
            assert np.array_equal(at, np.arange(at[0], at[-1] + 1)) and np.array_equal(row["positions"][at], np.arange(len(at)))
            assert np.array_equal(wanted[:-1], ids[1:])
            size = len(tokenizer.decode_bytes(ids))
            assert size == row["source_bytes"][s - 1]
            pieces.setdefault(int(source), []).append((int(row["source_offset"][s - 1]), ids, int(wanted[-1]), size))
            targets += len(at)
        assert row["segment_ids"].max() == (row["source_id"] >= 0).sum()
    return pieces, targets


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:270"])
def test_windows_give_back_every_document_exactly(make, corpus_dir, packing, tokenizer):
    prepared = make(16, packing=packing, tokenizer=tokenizer)
    seen, total_bytes = set(), 0
    for split, window_set in (("train", prepared.train), ("validation", prepared.validation)):
        pieces, targets = documents_from(prepared, window_set)
        assert len(pieces) > 0
        for source, parts in pieces.items():
            parts.sort(key=lambda p: (p[0], p[0] + p[3]))
            row = {"source_id": [source], "source_offset": [0], "source_bytes": [0]}
            (name, _, _), = effmodels.data.trace({k: np.array(v) for k, v in row.items()}, prepared)
            text = (corpus_dir / name).read_bytes()
            ids = np.concatenate([p[1] for p in parts])
            assert ids[0] == prepared.tokenizer.bos_id and parts[-1][2] == prepared.tokenizer.eos_id
            assert prepared.tokenizer.decode_bytes(ids) == text
            for (offset, these, following, size), after in zip(parts, [*parts[1:], None]):
                assert text[offset:offset + size] == prepared.tokenizer.decode_bytes(these)
                assert after is None or following == after[1][0]  # the token after a cut is the next piece's first
            assert name not in seen  # no document on both sides
            seen.add(name)
            total_bytes += len(text)
        batches = effmodels.data.batches(prepared, batch_size=3, seed=0, split=split, repeat=False)
        everything = list(batches)
        prefix = "" if split == "train" else "validation_"
        assert sum(b["target_bytes"].sum() for b in everything) == prepared.info[prefix + "bytes"]
        assert sum(b["weights"].sum() for b in everything) == targets == prepared.info[prefix + "tokens"] - len(pieces)
    assert len(seen) == 13 and total_bytes == prepared.info["bytes"] + prepared.info["validation_bytes"]  # one of 14 files is empty


def test_columns_and_info(make):
    prepared = make(16)
    n = len(prepared.train)
    assert prepared.train["tokens"].shape == (n, 16) == prepared.train["segment_ids"].shape and prepared.train["tokens"].dtype == np.int32
    assert np.array_equal(prepared.train[n - 1]["tokens"], prepared.train["tokens"][-1])
    assert json.loads(json.dumps(prepared.info)) == prepared.info
    assert prepared.info["efficiency"] == pytest.approx(prepared.train["weights"].mean())
    with pytest.raises(IndexError):
        prepared.train[n]


def test_baselines_are_what_they_say(make):
    import gzip

    prepared = make(16)
    train, held = (effmodels.data.batches(prepared, batch_size=1, seed=0, split=s, repeat=False) for s in ("train", "validation"))
    counts = {k: np.bincount(np.concatenate([b["targets"][b["weights"] > 0] for b in it]), minlength=258) for k, it in
              (("train", train), ("held", held))}
    p = (counts["train"] + 1) / (counts["train"] + 1).sum()
    got = effmodels.data.baselines(prepared)
    size = prepared.info["validation_bytes"]
    assert got["unigram_bits_per_byte"] == pytest.approx(-(counts["held"] * np.log2(p)).sum() / size)
    text = b"".join(b["tokens"][b["tokens"] < 256].astype(np.uint8).tobytes() for b in
                    effmodels.data.batches(prepared, batch_size=1, seed=0, split="validation", repeat=False))
    assert got["gzip_bits_per_byte"] == pytest.approx(8 * len(gzip.compress(text, 9)) / size, rel=0.05)  # another order


def test_warm_prepare_reads_only_the_windows(make, monkeypatch):
    first = make(16, tokenizer="bpe:270")
    monkeypatch.setattr(effmodels.data.corpus.Corpus, "open", lambda *a: pytest.fail("the corpus was read again"))
    again = make(16, tokenizer="bpe:270")
    assert len(make.lines) == 1 and "ready in" in make.lines[0]
    assert again.info == first.info and np.array_equal(again.train["tokens"], first.train["tokens"])


def test_another_length_reuses_the_token_streams(make, monkeypatch):
    make(16)
    monkeypatch.setattr(effmodels.data.corpus.Corpus, "open", lambda *a: pytest.fail("the corpus was read again"))
    assert make(24).train.seq_len == 24


def test_a_touched_file_changes_nothing_and_a_changed_one_does(make, corpus_dir):
    before = make(16).info["corpus_hash"]
    (corpus_dir / "doc09.txt").touch()
    assert make(16).info["corpus_hash"] == before
    (corpus_dir / "doc09.txt").write_text("other")
    assert make(16).info["corpus_hash"] != before


def damaged_folder(prepared):
    return prepared.train.folders[0].folder


@pytest.mark.parametrize("how", ["flip", "truncate", "remove", "manifest"])
def test_damaged_windows_are_said_and_rebuilt(make, how):
    before = make(16)
    path = damaged_folder(before) / ("manifest.json" if how == "manifest" else "train_ids.bin")
    want = before.train["tokens"]
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[100] ^= 1
    path.write_bytes(data if how == "flip" else data[:len(data) // 2])
    if how == "remove":
        path.unlink()
    after = make(16)
    assert any("Rebuilding it now" in line for line in make.lines)
    assert np.array_equal(after.train["tokens"], want)


def test_damage_after_the_start_is_found_when_the_row_is_read(make, monkeypatch):
    monkeypatch.setattr(storage, "VERIFY_BYTES", 0)  # as for windows too large to hash at each start
    path = damaged_folder(make(16)) / "train_ids.bin"
    data = bytearray(path.read_bytes())
    data[70] ^= 1
    path.write_bytes(data)
    prepared = make(16)
    prepared.train.rows([0])
    with pytest.raises(effmodels.data.DamagedError, match="Window 2 of .* is damaged.*Delete the folder"):
        prepared.train.rows([1, 2])


def test_damaged_shard_is_named(make):
    make(16)
    shard, = (make(16).cache / "corpora").rglob("*train.array_record*")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(effmodels.data.DamagedError, match="train.array_record.* is damaged.*Delete"):
        make(16, tokenizer="bpe:270")


def test_corpus_smaller_than_one_sequence(make, corpus_dir):
    with pytest.raises(DataError, match=r"smaller than one sequence: the training split holds \d+ tokens, seq_len is 5000"):
        make(5000)


def test_a_single_document_gives_its_tail_to_validation(tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("".join(f"line {i} äö\n" for i in range(500)))
    prepared = effmodels.data.prepare({"paths": str(path), "cache_dir": str(tmp_path / "c"), "holdout": 0.1}, 32, log=lambda s: None)
    (name, offset, size), *_ = effmodels.data.trace(prepared.validation[0], prepared)
    text = path.read_bytes()
    assert name == "one.txt" and offset == prepared.info["bytes"] and text[offset - 1:offset] == b"\n"
    assert text[offset:offset + size] == prepared.tokenizer.decode_bytes(prepared.validation[0]["tokens"])
    assert prepared.info["bytes"] + prepared.info["validation_bytes"] == len(text)
    assert 0.05 < prepared.info["validation_bytes"] / len(text) < 0.15


def test_full_disk(make, monkeypatch, tmp_path):
    usage = storage.shutil.disk_usage
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda p: usage(p)._replace(free=1000))
    with pytest.raises(DataError, match=r"Writing the corpus needs about .* MB, but .* has 0.0 MB free"):
        make(16)
    monkeypatch.undo()

    def full(self, name, array):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage.ArrayWriter, "append", full)
    with pytest.raises(DataError, match="The disk filled up while writing the token streams"):
        make(16)
    assert not list((tmp_path / "cache" / "tokens").iterdir())  # nothing half-written stays


def test_files_without_text(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "empty.txt").write_text("\n")
    with pytest.raises(DataError, match="The 1 files found hold no text .*1 empty documents skipped"):
        effmodels.data.prepare({"paths": (str(tmp_path / "a"),), "cache_dir": str(tmp_path / "c")}, 16, log=lambda s: None)


def test_unknown_fields_and_values(make):
    for fields, match in (
        ({"tokenzier": "bytes"}, "no field 'tokenzier'; did you mean 'tokenizer'"),
        ({"packing": "bestfit"}, "packing='bestfit' is not a packing policy; did you mean 'best_fit'"),
        ({"holdout": 2}, r"holdout=2 must be a fraction in \[0, 1\)"),
        ({"name": "lm1b"}, "names a TFDS dataset, but paths="),
        ({"mixture": "a"}, "mixture must be a tuple of dicts"),
        ({"mixture": ({"path": "a"},)}, r"mixture\[0\] has no field 'path'; did you mean 'paths'"),
        ({"mixture": ({"weight": 0},)}, r"weight=0 must be above 0"),
    ):
        with pytest.raises(DataError, match=match):
            make(16, **fields)
    assert set(effmodels.data.defaults()) >= {"name", "paths", "tokenizer", "packing", "mixture", "cache_dir", "holdout", "column"}
    for name in effmodels.data.defaults():
        assert name in effmodels.data.__doc__

"""Tokenizers: exact round trips, source bytes per id, streaming across UTF-8, and rebuilding from what a run saves."""
import json
import sys

import numpy as np
import pytest

from effmodels.data import tokenizer as T
from effmodels.data.options import DataError

TEXT = "def größe(x):\n    return x + 1  # 日本 🙂 <|endoftext|>\n"


@pytest.fixture(scope="module")
def bpe():
    return T.train_bpe([TEXT * 20, "the quick brown fox " * 50], 300)


@pytest.mark.parametrize("which", ["bytes", "bpe"])
def test_round_trip_lengths_and_streaming(which, bpe):
    tokenizer = T.ByteTokenizer() if which == "bytes" else bpe
    (ids, lengths), (none, _) = tokenizer.encode_with_lengths([TEXT, b""])
    assert len(none) == 0 and lengths.sum() == len(TEXT.encode())
    assert tokenizer.decode(ids) == TEXT and tokenizer.decode_bytes(ids) == TEXT.encode()
    assert np.array_equal(ids, tokenizer.encode(TEXT.encode()))
    assert [len(tokenizer.decode_bytes([i])) for i in ids] == lengths.tolist()
    stream = tokenizer.stream()
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.flush() == TEXT and "\ufffd" not in "".join(pieces)
    assert ids.max() < tokenizer.vocab_size and tokenizer.eos_id not in ids  # a quoted special token stays text
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id, tokenizer.pad_id]) == TEXT


def test_streaming_ends_with_a_replacement_for_half_a_character():
    stream = T.ByteTokenizer().stream()
    assert [stream.push(b) for b in "é".encode()[:1]] == [""] and stream.flush() == "\ufffd"


def test_bpe_size_and_determinism(bpe):
    again = T.train_bpe([TEXT * 20, "the quick brown fox " * 50], 300)
    assert bpe.vocab_size == 300 and again.fingerprint == bpe.fingerprint
    assert len(bpe.encode("the quick brown fox")) < 8


@pytest.mark.parametrize("which", ["bytes", "bpe"])
def test_saved_with_a_run_and_rebuilt(which, bpe, tmp_path):
    tokenizer = T.ByteTokenizer() if which == "bytes" else bpe
    tokenizer.save(tmp_path / "tokenizer.json")
    again = T.load(tmp_path / "tokenizer.json")
    assert again.fingerprint == tokenizer.fingerprint and (again.bos_id, again.eos_id, again.pad_id) == (
        tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    assert np.array_equal(again.encode(TEXT), tokenizer.encode(TEXT))
    assert T.from_file(tmp_path / "tokenizer.json").fingerprint == tokenizer.fingerprint


def test_special_ids_of_a_tokenizer_json(tmp_path, bpe):
    """Named in tokenizer_config.json, else by custom, else added; padding and truncation of the file are switched off."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    library = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<unk>": 2, "<s>": 3, "</s>": 4, "<odd>": 5}, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.enable_truncation(2)
    library.enable_padding(length=9)
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = T.from_file(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (3, 4)
    (ids, lengths), = tokenizer.encode_with_lengths(["a b a  ö "])
    assert ids.tolist() == [0, 1, 0, 2] and lengths.tolist() == [1, 2, 2, 5]  # the space before a word, and the rest of the text
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<odd>"}, "bos_token": "a"}))
    named = T.from_file(tmp_path)
    assert (named.bos_id, named.eos_id) == (0, 5) and named.fingerprint != tokenizer.fingerprint

    bare = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    added = T.HFTokenizer(bare.to_str())
    assert added.eos_id == added.bos_id == added.pad_id == 2 and added.vocab_size == 3


def test_long_documents_are_encoded_in_parts_with_the_same_bytes(bpe, monkeypatch):
    monkeypatch.setattr(T, "PART_CHARS", 40)
    (ids, lengths), = bpe.encode_with_lengths([TEXT * 5])
    assert bpe.decode(ids) == TEXT * 5 and lengths.sum() == len(TEXT.encode()) * 5


def test_metaspace_tokenizer_streams_and_counts_bytes():
    """Ids without bytes of their own (a SentencePiece-like decoder): text comes from neighbours, lengths from offsets."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    library = Tokenizer(models.WordLevel({"▁the": 0, "▁fox": 1, "<unk>": 2, "</s>": 3}, unk_token="<unk>"))
    library.pre_tokenizer, library.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = T.HFTokenizer(library.to_str())
    (ids, lengths), = tokenizer.encode_with_lengths(["the fox the"])
    assert lengths.sum() == 11 and tokenizer.table is None
    stream = tokenizer.stream()
    assert "".join([stream.push(i) for i in ids] + [stream.flush()]) == "the fox the"


def test_sentencepiece(tmp_path):
    spm = pytest.importorskip("sentencepiece")
    import io

    model = io.BytesIO()
    spm.SentencePieceTrainer.train(sentence_iterator=iter((TEXT * 20).split("\n")), model_writer=model, vocab_size=310, model_type="bpe",
                                   byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2)
    (tmp_path / "m.model").write_bytes(model.getvalue())
    tokenizer = T.from_file(tmp_path / "m.model")
    line = "return  x größe ω"
    (ids, lengths), = tokenizer.encode_with_lengths([line])
    assert tokenizer.decode(ids) == line and lengths.sum() == len(line.encode())
    stream = tokenizer.stream()
    assert "".join([stream.push(i) for i in ids] + [stream.flush()]) == line
    assert T.from_dict(tokenizer.to_dict()).fingerprint == tokenizer.fingerprint


def test_faults(tmp_path, monkeypatch):
    for spec, match in (("bites", "is not a tokenizer.*did you mean 'bytes'"), ("bpe:100", "needs at least 258 ids")):
        with pytest.raises(DataError, match=match):
            T.parse(spec)
    with pytest.raises(DataError, match="tokenizer file .*none.json does not exist"):
        T.from_file(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{"model": {"type": "Nonsense"}}')
    with pytest.raises(DataError, match="bad.json does not parse as a Hugging Face tokenizer.json"):
        T.from_file(tmp_path / "bad.json")
    (tmp_path / "worse.json").write_text("{")
    with pytest.raises(DataError, match="worse.json does not parse as a Hugging Face tokenizer.json"):
        T.from_file(tmp_path / "worse.json")
    with pytest.raises(DataError, match="kind 'bite' was saved; did you mean 'bytes'"):
        T.from_dict({"kind": "bite"})
    (tmp_path / "m.model").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(DataError, match="sentencepiece is not installed. Run: pip install"):
        T.from_file(tmp_path / "m.model")

"""Text to token ids and back: bytes, byte-level BPE trained here, a Hugging Face tokenizer.json, a SentencePiece model.

One interface: encode, decode, decode_bytes, stream, vocab_size, bos_id, eos_id, pad_id, fingerprint, to_dict. A document is stored as
bos + text + eos, so that a model learns to start from bos and to end with eos; where a vocabulary has no bos, eos takes its place.
"""
import base64
import codecs
import functools
import json
import pathlib
import re

import numpy as np

from effmodels.data import storage
from effmodels.data.options import DataError, nearest

END, PAD = "<|endoftext|>", "<|pad|>"
# Tried in this order when no tokenizer_config.json beside the file names them.
EOS_NAMES = (END, "</s>", "<eos>", "<|eos|>", "<|end_of_text|>", "<|im_end|>", "[SEP]")
BOS_NAMES = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[CLS]")
PAD_NAMES = (PAD, "<pad>", "[PAD]")
PART_CHARS = 1_000_000  # longer documents are encoded in parts cut at line ends: bounded memory, the same bytes back
SPECS = ("bytes", "bpe:8192")


class Tokenizer:
    """What every tokenizer offers; subclasses give `kind`, the ids and the methods that raise here."""

    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int

    def encode(self, text):
        """int32 ids of a str or of UTF-8 bytes, without bos and eos."""
        return self.encode_with_lengths([text])[0][0]

    def encode_with_lengths(self, texts):
        """For each text (ids, source bytes per id): lengths add up to the bytes of the text, so that any token is traced to its place."""
        raise NotImplementedError

    def decode(self, ids):
        """Text of ids; special ids are left out, incomplete UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids):
        raise NotImplementedError

    def stream(self):
        """A decoder for one sequence: push(id) gives the text that has become certain, flush() the rest."""
        raise NotImplementedError

    def to_dict(self):
        """JSON-able description from which `from_dict` makes the same tokenizer anywhere."""
        raise NotImplementedError

    def save(self, path):
        storage.write_json(pathlib.Path(path), self.to_dict())

    @functools.cached_property
    def fingerprint(self):
        return storage.digest(self.to_dict())


class ByteTokenizer(Tokenizer):
    """Ids 0..255 are the bytes, 256 separates documents (bos and eos), 257 pads."""

    vocab_size, bos_id, eos_id, pad_id = 258, 256, 256, 257

    def encode_with_lengths(self, texts):
        ids = [np.frombuffer(_bytes(text), np.uint8).astype(np.int32) for text in texts]
        return [(i, np.ones(len(i), np.uint16)) for i in ids]

    def decode_bytes(self, ids):
        ids = np.asarray(ids, np.int64).reshape(-1)
        return ids[(ids >= 0) & (ids < 256)].astype(np.uint8).tobytes()

    def stream(self):
        return ByteStream(self.decode_bytes)

    def to_dict(self):
        return {"kind": "bytes"}


class HFTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library, from its JSON text."""

    def __init__(self, text, *, bos_id=None, eos_id=None, pad_id=None, names=None):
        from tokenizers import Tokenizer as Library

        self.library = Library.from_str(text)
        self.library.no_truncation()  # tokenizer.json files carry the limits of the model they came from
        self.library.no_padding()
        self.library.encode_special_tokens = True  # a document that quotes "<|endoftext|>" must not end there
        names = names or {}
        self.eos_id = eos_id if eos_id is not None else self._special(names.get("eos_token"), EOS_NAMES)
        if self.eos_id is None:
            self.library.add_special_tokens([END])
            self.eos_id = self.library.token_to_id(END)
        self.bos_id = _first(bos_id, self._special(names.get("bos_token"), BOS_NAMES), self.eos_id)
        self.pad_id = _first(pad_id, self._special(names.get("pad_token"), PAD_NAMES), self.eos_id)
        self.text = self.library.to_str()
        spec = json.loads(self.text)
        self.vocab_size = 1 + max(self.library.get_vocab(with_added_tokens=True).values())
        self.special_ids = {t["id"] for t in spec["added_tokens"] if t["special"]} | {self.bos_id, self.eos_id, self.pad_id}
        self.table = _byte_table(spec, self.library, self.vocab_size, self.special_ids)

    def _special(self, named, candidates):
        """Id of the token that tokenizer_config.json names (and only that one), else of the first candidate there is."""
        found = (self.library.token_to_id(name) for name in ((named,) if named else candidates))
        return next((i for i in found if i is not None), None)

    def encode_with_lengths(self, texts):
        parts = [(d, part) for d, text in enumerate(texts) for part in _parts(_bytes(text).decode(errors="replace"))]
        encode = self.library.encode_batch if self.table is None else self.library.encode_batch_fast  # fast: without offsets
        encodings = encode([part for _, part in parts], add_special_tokens=False)
        ids = [[np.zeros(0, np.int32)] for _ in texts]
        lengths = [[np.zeros(0, np.uint16)] for _ in texts]
        for (d, part), encoding in zip(parts, encodings):
            ids[d].append(np.asarray(encoding.ids, np.int32))
            lengths[d].append(self._lengths(part, encoding))
        return [(np.concatenate(i), np.concatenate(n)) for i, n in zip(ids, lengths)]

    def _lengths(self, text, encoding):
        if self.table is not None:
            return self._table_lengths[np.asarray(encoding.ids, np.int64)]
        return lengths_from_offsets(text, encoding.offsets)

    @functools.cached_property
    def _table_lengths(self):
        return np.array([len(b) for b in self.table], np.uint16)

    def decode_bytes(self, ids):
        ids = np.asarray(ids, np.int64).reshape(-1).tolist()
        if self.table is not None:
            return b"".join(self.table[i] for i in ids if 0 <= i < self.vocab_size)
        return self.library.decode([i for i in ids if i not in self.special_ids], skip_special_tokens=True).encode()

    def stream(self):
        return ByteStream(self.decode_bytes) if self.table is not None else TextStream(self.decode)

    def to_dict(self):
        return {"kind": "tokenizers", "json": self.text, "bos_id": self.bos_id, "eos_id": self.eos_id, "pad_id": self.pad_id}


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, from the bytes of its file."""

    def __init__(self, model):
        try:
            import sentencepiece
        except ImportError as e:
            raise DataError("This tokenizer is a SentencePiece model, and sentencepiece is not installed. "
                            "Run: pip install 'sentencepiece>=0.2.1,<0.3' (or pip install 'effmodels[sentencepiece]').") from e
        self.model, self.library = model, sentencepiece.SentencePieceProcessor()
        self.library.LoadFromSerializedProto(model)
        self.vocab_size = self.library.get_piece_size()
        self.eos_id = self.library.eos_id()
        if self.eos_id < 0:
            raise DataError("This SentencePiece model has no eos piece, so documents could not be told apart. Train it with eos_id >= 0.")
        self.bos_id = self.library.bos_id() if self.library.bos_id() >= 0 else self.eos_id
        self.pad_id = self.library.pad_id() if self.library.pad_id() >= 0 else self.eos_id

    def encode_with_lengths(self, texts):
        return [self._encode_one(_bytes(text).decode(errors="replace")) for text in texts]

    def _encode_one(self, text):
        ids, lengths = [np.zeros(0, np.int32)], [np.zeros(0, np.uint16)]
        for part in _parts(text):
            ids.append(np.asarray(self.library.encode(part), np.int32))
            lengths.append(self._lengths(ids[-1], part))
        return np.concatenate(ids), np.concatenate(lengths)

    def _lengths(self, ids, text):
        """Bytes of the pieces, exact where the normaliser is the identity; what it adds or drops is made up for by the last piece."""
        ends = np.cumsum(self._piece_bytes[ids])
        if len(ids) and not text.startswith(" ") and self.library.id_to_piece(int(ids[0])).startswith("\u2581"):
            ends -= 1  # the space that a model puts before the first word
        total = len(text.encode())
        ends = np.minimum(np.maximum.accumulate(np.maximum(ends, 0)), total)
        ends[-1:] = total
        return np.minimum(np.diff(ends, prepend=0), 65535).astype(np.uint16)

    @functools.cached_property
    def _piece_bytes(self):
        def size(i):
            if self.library.is_control(i) or self.library.is_unknown(i):
                return 0
            return 1 if self.library.is_byte(i) else len(self.library.id_to_piece(i).replace("\u2581", " ").encode())

        return np.array([size(i) for i in range(self.vocab_size)], np.int64)

    def decode(self, ids):
        ids = np.asarray(ids, np.int64).reshape(-1).tolist()
        return self.library.decode([i for i in ids if 0 <= i < self.vocab_size and not self.library.is_control(i)])

    def decode_bytes(self, ids):
        return self.decode(ids).encode()

    def stream(self):
        return TextStream(self.decode)

    def to_dict(self):
        return {"kind": "sentencepiece", "model": base64.b64encode(self.model).decode()}


class ByteStream:
    """Streaming where each id stands for bytes: characters are held back until their last byte is there."""

    def __init__(self, decode_bytes):
        self.decode_bytes, self.utf8 = decode_bytes, codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, *ids):
        return self.utf8.decode(self.decode_bytes(ids))

    def flush(self):
        return self.utf8.decode(b"", final=True)


class TextStream:
    """Streaming where the text of an id depends on its neighbours: decode with a little context, give what is new."""

    def __init__(self, decode):
        self.decode, self.ids, self.context, self.read = decode, [], 0, 0

    def push(self, *ids):
        self.ids.extend(int(i) for i in ids)
        before, after = self.decode(self.ids[self.context:self.read]), self.decode(self.ids[self.context:])
        if after.endswith("\ufffd") or len(after) <= len(before):
            return ""  # part of a character, or a special id
        self.context, self.read = self.read, len(self.ids)
        return after[len(before):]

    def flush(self):
        text = self.decode(self.ids[self.context:])[len(self.decode(self.ids[self.context:self.read])):]
        self.ids, self.context, self.read = [], 0, 0
        return text


def from_dict(saved):
    """The tokenizer that `to_dict` described."""
    kind = saved.get("kind")
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "tokenizers":
        return HFTokenizer(saved["json"], bos_id=saved["bos_id"], eos_id=saved["eos_id"], pad_id=saved["pad_id"])
    if kind == "sentencepiece":
        return SentencePieceTokenizer(base64.b64decode(saved["model"]))
    raise DataError(f"A tokenizer of kind {kind!r} was saved; {nearest(kind, ('bytes', 'tokenizers', 'sentencepiece'))}")


def load(path):
    """The tokenizer saved at `path` by `Tokenizer.save`."""
    saved = storage.read_json(path)
    if saved is None:
        raise DataError(f"{path} does not exist; a tokenizer saved with a run is expected.")
    return from_dict(saved)


def from_file(path):
    """A tokenizer.json of Hugging Face, a SentencePiece .model, or a file written by `Tokenizer.save`."""
    path = pathlib.Path(path).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.exists():
        raise DataError(f"The tokenizer file {path} does not exist. "
                        "Give 'bytes', 'bpe:<size>', a tokenizer.json or a SentencePiece .model.")
    try:
        if path.suffix == ".json":
            text = path.read_text()
            saved = json.loads(text)
            return from_dict(saved) if "kind" in saved else HFTokenizer(text, names=_names_beside(path))
        return SentencePieceTokenizer(path.read_bytes())
    except DataError:
        raise
    except Exception as e:  # the libraries raise bare Exception, RuntimeError, ...
        kind = "a Hugging Face tokenizer.json" if path.suffix == ".json" else "a SentencePiece model"
        raise DataError(f"{path} does not parse as {kind}: {str(e).splitlines()[0][:200] if str(e) else type(e).__name__}") from e


def parse(spec):
    """("bytes", None), ("bpe", vocabulary size) or ("file", path) of `config.data.tokenizer`."""
    if spec == "bytes":
        return "bytes", None
    match = re.fullmatch(r"bpe:(\d+)", str(spec))
    if match:
        if int(match[1]) < 258:
            raise DataError(f"config.data.tokenizer={spec!r}: byte-level BPE needs at least 258 ids (256 bytes, end of text, padding).")
        return "bpe", int(match[1])
    if str(spec).endswith((".json", ".model")) or pathlib.Path(str(spec)).expanduser().exists():
        return "file", str(spec)
    raise DataError(f"config.data.tokenizer={spec!r} is not a tokenizer: 'bytes', 'bpe:<size>', a path to a tokenizer.json or .model; "
                    + nearest(spec, SPECS))


def train_bpe(texts, vocab_size):
    """Byte-level BPE with `vocab_size` ids learned from an iterator of str; every text round-trips exactly."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END, PAD], show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    library.train_from_iterator(texts, trainer)
    return HFTokenizer(library.to_str())


def lengths_from_offsets(text, offsets):
    """Source bytes per token from its (begin, end) characters: gaps go to the token after them, what is left to the last one."""
    if not offsets:
        return np.zeros(0, np.uint16)
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    width = 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)
    byte_at = np.concatenate([[0], np.cumsum(width)])
    ends = byte_at[np.maximum.accumulate(np.array([end for _, end in offsets]))]
    ends[-1] = byte_at[-1]
    return np.minimum(np.diff(ends, prepend=0), 65535).astype(np.uint16)


def _byte_table(spec, library, vocab_size, special_ids):
    """Bytes of each id of a byte-level vocabulary (special ids: none), or None where ids have no fixed bytes."""
    def types(part):
        return [p["type"] for p in (part or {}).get("decoders", (part or {}).get("pretokenizers", [part] if part else []))]

    plain = types(spec.get("decoder")) == ["ByteLevel"] and spec.get("normalizer") is None
    stages = (spec.get("pre_tokenizer") or {}).get("pretokenizers", [spec.get("pre_tokenizer") or {}])
    if not plain or any(stage.get("add_prefix_space") for stage in stages):
        return None
    of_char = _gpt2_bytes()
    table = [b""] * vocab_size
    added = {t["id"]: t["content"] for t in spec["added_tokens"]}
    for token, i in library.get_vocab(with_added_tokens=True).items():
        if i not in special_ids:
            table[i] = added[i].encode() if i in added else bytes(of_char[c] for c in token)
    return table


@functools.cache
def _gpt2_bytes():
    """The printable character that stands for each byte in byte-level vocabularies, inverted."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [b for b in range(256) if b not in kept]
    return {chr(b): b for b in kept} | {chr(256 + i): b for i, b in enumerate(moved)}


def _names_beside(path):
    """Special tokens named in the tokenizer_config.json beside a tokenizer.json."""
    saved = storage.read_json(path.with_name("tokenizer_config.json")) or {}
    names = {key: saved.get(key) for key in ("bos_token", "eos_token", "pad_token")}
    return {key: value.get("content") if isinstance(value, dict) else value for key, value in names.items()}


def _parts(text):
    start = 0
    while len(text) - start > PART_CHARS:
        cut = text.rfind("\n", start + 1, start + PART_CHARS) + 1 or start + PART_CHARS
        yield text[start:cut]
        start = cut
    if start < len(text):
        yield text[start:] if start else text


def _bytes(text):
    return text.encode() if isinstance(text, str) else bytes(text)


def _first(*values):
    return next(v for v in values if v is not None)

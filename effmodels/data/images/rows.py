"""Rows of packed image-text documents: bos, the placeholders of the image, the caption, eos; as a Grain source, like windows of text.

`<cache>/image_rows/<hash>`, for each split: pixels [D, S, S, C] (already square), ids [all tokens] and starts [D + 1] of the documents,
bytes [D] of the captions, first [W + 1] (the first document of each row), counts [V] (targets by id); names.json.
Letters: D documents, W rows, T tokens of a row, B rows of a batch, I images of a row, S side, C channels, P patches, V vocabulary.
"""
import itertools

import numpy as np

from effmodels.data import storage
from effmodels.data.corpus import SPLITS
from effmodels.data.images.preprocess import normalise, patchify, square
from effmodels.data.options import DataError

FORMAT = 1
CHUNK = 256  # documents written at once
NAMES = "names.json"


def image_token(tokenizer):
    """The id that stands for an image in a row: the first one behind the tokenizer's own."""
    return tokenizer.vocab_size


def prepare(corpus, tokenizer, seq_len, spec, cache, log):
    """The rows of an `ImageCorpus` as an ArrayFolder, made now if they are not there or not intact."""
    shape = [spec.size, spec.channels, spec.placeholders, spec.images]
    target = cache / "image_rows" / storage.digest([FORMAT, corpus.hash, tokenizer.fingerprint, seq_len, shape])[:24]
    folder = storage.open_or_none(target, log)
    if folder is not None:
        return folder
    count = sum(corpus.documents(split) for split in SPLITS)
    progress = storage.Progress(log, "packing images", count, unit_bytes=False)
    needed = count * (spec.size**2 * spec.channels + 4 * (spec.placeholders + 64)) + 1_000_000
    with storage.new_folder(target, needed=needed, what="the rows of images") as temporary:
        writer, meta, names = storage.ArrayWriter(temporary), {}, {}
        for split in SPLITS:
            meta[split], names[split] = _write_split(writer, corpus, split, tokenizer, seq_len, spec, progress)
        writer.close({"format": FORMAT, "corpus": corpus.hash, "tokenizer": tokenizer.fingerprint, "seq_len": seq_len, "splits": meta})
        storage.write_json(temporary / NAMES, names)
    return storage.ArrayFolder(target, verify=False)


def _write_split(writer, corpus, split, tokenizer, seq_len, spec, progress):
    """Appends the arrays of one split; (its figures, the names of its documents)."""
    lengths, sizes, names, counts = [], [], [], np.zeros(tokenizer.vocab_size + 1, np.int64)
    documents = corpus.images(split)
    while part := list(itertools.islice(documents, CHUNK)):
        ids = [_document(tokenizer, caption, spec) for _, _, caption in part]
        writer.append(f"{split}_pixels", np.stack([square(image, spec) for _, image, _ in part]))
        writer.append(f"{split}_ids", np.concatenate(ids))
        for one in ids:
            counts += np.bincount(one[1:], minlength=len(counts))
        lengths += map(len, ids)
        sizes += [len(caption) for _, _, caption in part]
        names += [name for name, _, _ in part]
        progress(len(part))
    first = _pack(np.array(lengths) - 1, seq_len, spec.images)
    counts[image_token(tokenizer)] = 0  # no target
    arrays = {"starts": np.concatenate([[0], np.cumsum(lengths)]), "bytes": np.array(sizes), "first": first, "counts": counts[:-1]}
    for name, array in arrays.items():
        writer.append(f"{split}_{name}", array.astype(np.int64))
    inputs, rows = int(sum(lengths) - len(lengths)), len(first) - 1
    figures = {"windows": rows, "documents": len(lengths), "bytes": sum(sizes), "tokens": sum(lengths), "inputs": inputs,
               "efficiency": inputs / (rows * seq_len)}  # fmt: skip
    return figures, names


def _document(tokenizer, caption, spec):
    places = np.full(spec.placeholders, image_token(tokenizer), np.int32)
    return np.concatenate([[tokenizer.bos_id], places, tokenizer.encode(caption), [tokenizer.eos_id]]).astype(np.int32)


def _pack(inputs_D, seq_len, images):
    """int [W + 1]: the first document of every row, documents in their order, as many as fit of `images` and of seq_len tokens."""
    if inputs_D.max() > seq_len:
        raise DataError(f"an image with its caption takes {inputs_D.max()} tokens and seq_len is {seq_len}; set seq_len to at least that.")
    first, used = [0], 0
    for d, length in enumerate(inputs_D.tolist()):
        if used + length > seq_len or d - first[-1] == images:
            first.append(d)
            used = 0
        used += length
    return np.array([*first, len(inputs_D)])


class ImageRows:
    """The rows of one split as a source of batches, with the interface of `windows.WindowSet`."""

    def __init__(self, folder, split, tokenizer, spec):
        self.folders, self.split, self.spec = [folder], split, spec
        self.pad_id, self.image_id = tokenizer.pad_id, image_token(tokenizer)
        self.seq_len, self.sizes = folder.meta["seq_len"], [folder.meta["splits"][split]["windows"]]
        self.starts = np.array([0, *self.sizes])
        self.before = folder.meta["splits"]["train"]["documents"] if split == "validation" else 0  # documents are numbered through

    def __len__(self):
        return self.sizes[0]

    def __getitem__(self, name):
        if not isinstance(name, str):
            return {key: value[0] for key, value in self.rows(np.array([name])).items()}
        return self.rows(np.arange(len(self)))[name]

    def rows(self, index_B):
        """A batch of rows by index; -1 gives a row of padding with weight 0."""
        index_B = np.asarray(index_B, np.int64)
        B, T, images, s = len(index_B), self.seq_len, self.spec.images, self.spec
        side = s.size // s.patch
        batch = {
            "tokens": np.full((B, T), self.pad_id, np.int32), "targets": np.full((B, T), self.pad_id, np.int32),
            "weights": np.zeros((B, T), np.float32), "segment_ids": np.zeros((B, T), np.int32), "positions": np.zeros((B, T), np.int32),
            "source_patches": np.zeros((B, images, side * side, s.patch**2 * s.channels), np.float32),
            "source_index": np.zeros((B, images), np.int32), "source_segment_ids": np.zeros((B, images), np.int32),
            "window": index_B, "target_bytes": np.zeros(B, np.int64),
        }  # fmt: skip
        batch |= {name: np.full((B, images), -1, np.int64) for name in ("source_id", "source_offset", "source_bytes")}
        for b, w in enumerate(index_B.tolist()):
            if w >= 0:
                self._fill({name: a[b] for name, a in batch.items() if a.ndim > 1}, self._documents(w))
                batch["target_bytes"][b] = sum(int(self._array("bytes")[d]) for d in self._documents(w))
        return batch

    def _documents(self, row):
        first = self._array("first")
        return range(int(first[row]), int(first[row + 1]))

    def _array(self, name):
        return self.folders[0][f"{self.split}_{name}"]

    def _fill(self, row, documents):
        """Writes the documents into the arrays of one row, which are views."""
        at = 0
        for i, d in enumerate(documents):
            start, stop = (int(n) for n in self._array("starts")[d : d + 2])
            ids = np.asarray(self._array("ids")[start:stop])
            here = slice(at, at + len(ids) - 1)
            row["tokens"][here], row["targets"][here], row["segment_ids"][here] = ids[:-1], ids[1:], i + 1
            row["weights"][here], row["positions"][here] = ids[1:] != self.image_id, np.arange(len(ids) - 1)
            row["source_patches"][i] = patchify(normalise(self._array("pixels")[d], self.spec), self.spec.patch)
            row["source_index"][i], row["source_segment_ids"][i] = at + 1, i + 1  # behind bos
            row["source_id"][i], row["source_offset"][i], row["source_bytes"][i] = self.before + d, 0, self._array("bytes")[d]
            at += len(ids) - 1

    def source_name(self, document):
        """The name of a document, of either split, by its number."""
        names = storage.read_json(self.folders[0].folder / NAMES)
        return [name for split in SPLITS for name in names[split]][document]


def info(corpus, folder, tokenizer, options, seq_len):
    """The figures of `Prepared.info`."""
    splits = folder.meta["splits"]
    found = {
        "corpus_hash": corpus.hash, "tokenizer": str(options["tokenizer"]), "tokenizer_fingerprint": tokenizer.fingerprint,
        "corpora": [{"hash": corpus.hash, "file_list_sha256": corpus.hash, "name": corpus.source["name"], "weight": 1.0,
                     "paths": [str(p) for p in corpus.source["paths"]], "windows": splits["train"]["windows"]}],
        "vocab_size": tokenizer.vocab_size, "packing": "whole documents", "seq_len": seq_len, "gzip": corpus.manifest["gzip"],
    }  # fmt: skip
    for split, prefix in (("train", ""), ("validation", "validation_")):
        found |= {prefix + k: splits[split][k] for k in ("documents", "bytes", "tokens", "windows", "efficiency")}
    return found | {"bytes_per_token": found["bytes"] / max(found["tokens"], 1)}

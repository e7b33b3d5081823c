"""A corpus as one stream of token ids per split, written once per tokenizer: every sequence length and packing policy starts from it.

Arrays of `<cache>/tokens/<hash>`, for each split: ids [tokens] (each document bos + text + eos), lengths [tokens] (source bytes per id),
starts [documents + 1] (first id of each document), bases [documents] (byte in the source where the text begins),
names [bytes] and name_ends [documents], and the number of times each id is a target, counts [vocab].
"""
import numpy as np

from effmodels.data import storage
from effmodels.data.corpus import SPLITS

FORMAT = 1
BATCH_BYTES = 2_000_000  # text encoded at once: bounds memory, keeps the tokenizer's threads busy


def prepare(corpus, tokenizer, cache, log):
    """The token streams of a corpus as an ArrayFolder."""
    target = cache / "tokens" / key(corpus, tokenizer)
    folder = storage.open_or_none(target, log)
    if folder is not None:
        return folder
    total = sum(corpus.bytes(split) for split in SPLITS)
    dtype = id_dtype(tokenizer)
    progress = storage.Progress(log, "tokenizing", total)
    documents = sum(corpus.documents(split) for split in SPLITS)
    needed = total * (dtype.itemsize + 2) + documents * 64 + 1_000_000  # at most one id per byte
    with storage.new_folder(target, needed=needed, what="the token streams") as temporary:
        writer = storage.ArrayWriter(temporary)
        meta = {split: _write_split(writer, corpus, split, tokenizer, dtype, progress, log) for split in SPLITS}
        writer.close({"format": FORMAT, "corpus": corpus.hash, "tokenizer": tokenizer.fingerprint, "splits": meta})
    tokens = sum(m["tokens"] for m in meta.values())
    log(f"data: {tokens / 1e6:.2f} M tokens, {total / max(tokens, 1):.2f} bytes per token; {progress.seconds:.1f} s")
    return storage.ArrayFolder(target, verify=False)


def key(corpus, tokenizer):
    return storage.digest([FORMAT, corpus.hash, tokenizer.fingerprint])[:24]


def id_dtype(tokenizer):
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 65_536 else np.uint32)


def names(folder, split, documents):
    """Names of documents by their index in the split."""
    ends = folder[f"{split}_name_ends"]
    for d in documents:
        begin = int(ends[d - 1]) if d else 0
        yield bytes(folder[f"{split}_names"][begin:int(ends[d])]).decode()


def _write_split(writer, corpus, split, tokenizer, dtype, progress, log):
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    writer.append(f"{split}_starts", np.zeros(1, np.int64))
    position = name_end = documents = 0
    for names_, bases, texts in _batched(corpus.open(split, log)):
        encoded = tokenizer.encode_with_lengths(texts)
        ids, lengths = _join(encoded, tokenizer, dtype)
        sizes = np.array([len(i) + 2 for i, _ in encoded], np.int64)
        starts = position + np.cumsum(sizes)
        counts += np.bincount(ids, minlength=tokenizer.vocab_size)
        counts[tokenizer.bos_id] -= len(sizes)  # every id but the first of a document is a target exactly once
        blobs = [name.encode() for name in names_]
        ends = name_end + np.cumsum([len(b) for b in blobs])
        for field, array in (("ids", ids), ("lengths", lengths), ("starts", starts), ("bases", np.array(bases, np.int64)),
                             ("names", np.frombuffer(b"".join(blobs), np.uint8)), ("name_ends", ends.astype(np.int64))):
            writer.append(f"{split}_{field}", array)
        position, name_end, documents = int(starts[-1]), int(ends[-1]), documents + len(sizes)
        progress(sum(map(len, texts)))
    writer.append(f"{split}_counts", counts)
    return {"documents": documents, "tokens": position, "bytes": corpus.bytes(split)}


def _join(encoded, tokenizer, dtype):
    bos, eos, zero = np.array([tokenizer.bos_id]), np.array([tokenizer.eos_id]), np.zeros(1, np.uint16)
    ids = np.concatenate([part for i, _ in encoded for part in (bos, i, eos)]).astype(dtype)
    return ids, np.concatenate([part for _, n in encoded for part in (zero, n, zero)])


def _batched(documents):
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document[2])
        if size >= BATCH_BYTES:
            yield zip(*batch)
            batch, size = [], 0
    if batch:
        yield zip(*batch)

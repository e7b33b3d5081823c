"""The one way in: everything made before step 1 (corpus, tokenizer, windows), and what can be asked of it."""
import dataclasses
import time

import numpy as np

from effmodels.data import corpus as corpora
from effmodels.data import options as fields
from effmodels.data import pipeline, storage, tokens, windows
from effmodels.data import tokenizer as tokenizers
from effmodels.data.options import DataError


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a run needs of its data; `info` is JSON-able."""

    tokenizer: tokenizers.Tokenizer
    train: windows.WindowSet
    validation: windows.WindowSet
    weights: tuple
    info: dict
    cache: object  # pathlib.Path


def import_libraries():
    """Imports TFDS and Grain now (0.9 s): while they load they replace Python's import for all threads, so before one of them compiles."""
    import grain.python  # noqa: F401

    from effmodels.data import tfds_text  # noqa: F401


def prepare(config_data, seq_len, *, images=None, log=print):
    """Builds what is missing of corpus, tokenizer and windows of `seq_len` tokens; well under a second when all is there.

    images: the `ImageSpec` of a model that reads images.
    """
    options = fields.resolve(config_data, images=images is not None)
    if seq_len < 1:
        raise DataError(f"seq_len={seq_len} must be at least 1.")
    spec = tokenizers.parse(options["tokenizer"])
    weights = tuple(source["weight"] for source in options["sources"])
    pipeline.Mixture(weights)  # refuses weights without a short period before anything is written
    cache, start = fields.cache_dir(options), time.monotonic()
    if images is not None:
        return _prepare_images(options, spec, seq_len, images, cache, log)
    with storage.lock(cache, log):
        found = [corpora.prepare(source, cache, log) for source in options["sources"]]
        tokenizer = _tokenizer(spec, found, options, cache, log)
        folders = [windows.prepare(c, tokenizer, seq_len, options["packing"], cache, log) for c in found]
    sets = {split: windows.WindowSet(folders, split, tokenizer.pad_id) for split in corpora.SPLITS}
    info = _info(found, folders, tokenizer, options, seq_len)
    log(f"data: {info['windows']} windows of {seq_len} ({info['packing']}, {info['efficiency']:.1%} filled), {info['tokens']} tokens, "
        f"{info['bytes_per_token']:.2f} bytes/token, corpus {info['corpus_hash'][:12]}; ready in {time.monotonic() - start:.2f} s")
    return Prepared(tokenizer, sets["train"], sets["validation"], weights, info, cache)


def _prepare_images(options, spec, seq_len, images, cache, log):
    from effmodels.data.images import corpus, rows

    start = time.monotonic()
    with storage.lock(cache, log):
        found = corpus.prepare(options["sources"][0], cache, log)
        tokenizer = _tokenizer(spec, [found], options, cache, log)
        folder = rows.prepare(found, tokenizer, seq_len, images, cache, log)
    sets = {split: rows.ImageRows(folder, split, tokenizer, images) for split in corpora.SPLITS}
    info = rows.info(found, folder, tokenizer, options, seq_len)
    log(f"data: {info['windows']} rows of {seq_len} with {info['documents']} images ({info['efficiency']:.1%} filled), "
        f"ready in {time.monotonic() - start:.2f} s")
    return Prepared(tokenizer, sets["train"], sets["validation"], (1.0,), info, cache)


def batches(
    prepared, *, batch_size, seed, split="train", process_index=0, process_count=1, rows=None, start=0, repeat=True, threads=1
):
    """Iterator of this process's rows of each global batch, from batch `start` on; .state() and .restore() are exact.

    rows: the numbers of the rows that it reads of each batch, instead of the process_index-th of process_count equal parts.

    The training split is shuffled; validation is in order. With repeat=False every window comes exactly once and the last batch is
    padded with rows of weight 0.
    """
    return pipeline.BatchIterator(_split(prepared, split), prepared.weights, batch_size=batch_size, seed=seed, shuffle=split == "train",
                                  repeat=repeat, process_index=process_index, process_count=process_count, rows=rows, start=start,
                                  threads=threads)


def trace(batch_row, prepared):
    """[(source name, byte offset in that source, bytes), ...] of the documents of one row, in the order of its segment ids."""
    used = np.flatnonzero(np.asarray(batch_row["source_id"]) >= 0)
    return [(_source_name(prepared, int(batch_row["source_id"][s])), int(batch_row["source_offset"][s]), int(batch_row["source_bytes"][s]))
            for s in used]


def baselines(prepared):
    """Bits per byte of the validation split under the training split's token frequencies, and under gzip -9 of its documents in a row."""
    train, validation = _counts(prepared.train), _counts(prepared.validation)
    size, gzip = prepared.info["validation_bytes"], prepared.info["gzip"]
    if not size:
        return {"unigram_bits_per_byte": float("nan"), "gzip_bits_per_byte": float("nan")}
    smoothed = (train + 1) / (train + 1).sum()
    return {"unigram_bits_per_byte": float(-(validation * np.log2(smoothed)).sum() / size),
            "gzip_bits_per_byte": 8 * gzip["compressed"] / max(gzip["bytes"], 1)}


def _tokenizer(spec, found, options, cache, log):
    kind, value = spec
    if kind == "bytes":
        return tokenizers.ByteTokenizer()
    if kind == "file":
        return tokenizers.from_file(value)
    limit = options["bpe_train_bytes"]
    key = storage.digest(["bpe", 1, value, limit, [c.hash for c in found]])[:24]
    path = cache / "tokenizers" / f"{key}.json"
    if path.exists():
        return tokenizers.load(path)
    size, start = sum(c.bytes("train") for c in found), time.monotonic()
    log(f"data: learning a vocabulary of {value} from {min(size, limit) / 1e6:.1f} MB of the training split")
    trained = tokenizers.train_bpe(_training_texts(found, limit, log), value)
    if trained.vocab_size < value:
        log(f"data: the corpus gives only {trained.vocab_size} distinct tokens, fewer than the {value} asked for")
    trained.save(path)
    log(f"data: vocabulary of {trained.vocab_size} in {time.monotonic() - start:.1f} s")
    return trained


def _training_texts(found, limit, log):
    """Training documents, every corpus up to its share of `limit` bytes."""
    total = sum(c.bytes("train") for c in found)
    for c in found:
        left = limit * c.bytes("train") / max(total, 1)
        for _, _, text in c.open("train", log):
            if left <= 0:
                break
            left -= len(text)
            yield text.decode(errors="replace")


def _info(found, folders, tokenizer, options, seq_len):
    def total(split, field):
        return sum(f.meta["splits"][split][field] for f in folders)

    info = {
        "corpus_hash": found[0].hash if len(found) == 1 else storage.digest([c.hash for c in found])[:24],
        "corpora": [{"hash": c.hash, "file_list_sha256": c.manifest["file_list_sha256"], "name": c.source["name"],
                     "paths": [str(p) for p in c.source["paths"]], "weight": c.source["weight"],
                     "windows": f.meta["splits"]["train"]["windows"]} for c, f in zip(found, folders)],
        "tokenizer": str(options["tokenizer"]), "tokenizer_fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size,
        "packing": options["packing"], "seq_len": seq_len,
        "gzip": {k: sum(c.manifest["gzip"][k] for c in found) for k in ("bytes", "compressed")},
    }
    for split, prefix in (("train", ""), ("validation", "validation_")):
        slots = total(split, "windows") * seq_len
        info |= {prefix + k: total(split, k) for k in ("documents", "bytes", "tokens", "windows")}
        info |= {prefix + "efficiency": total(split, "inputs") / max(slots, 1)}
    return info | {"bytes_per_token": info["bytes"] / max(info["tokens"], 1)}


def _split(prepared, split):
    if split not in corpora.SPLITS:
        raise DataError(f"split={split!r} is not a split; {fields.nearest(split, corpora.SPLITS)}")
    return prepared.train if split == "train" else prepared.validation


def _counts(window_set):
    return sum(np.asarray(f[f"{window_set.split}_counts"], np.float64) for f in window_set.folders)


def _source_name(prepared, source_id):
    """Names are kept with the token streams, which sources number first by corpus, then training before validation."""
    if not isinstance(prepared.train, windows.WindowSet):
        return prepared.train.source_name(source_id)
    for folder in prepared.train.folders:
        stream = storage.ArrayFolder(prepared.cache / "tokens" / folder.meta["stream"], verify=False)
        for split in corpora.SPLITS:
            documents = folder.meta["splits"][split]["documents"]
            if source_id < documents:
                return next(tokens.names(stream, split, [source_id]))
            source_id -= documents
    raise DataError(f"Source {source_id} is not one of the documents of these windows.")

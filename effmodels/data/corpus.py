"""A corpus on disk: documents in two splits, written once by TFDS, found again by a hash of what went in.

`<cache>/corpora/<hash>` holds ArrayRecord shards and corpus.json (file list, sizes, sha256 of every source and shard);
`<cache>/aliases/<hash of paths, sizes, mtimes>.json` lets a warm start find it by a stat of each file.
"""
import contextlib
import dataclasses
import gzip
import os
import pathlib
import sys

from effmodels.data import sources, storage
from effmodels.data.options import DataError

FORMAT = 1
CHUNK = 64  # records per read
GZIP_BYTES = 32_000_000  # the gzip baseline is measured on at most so much of the validation split
SPLITS = ("train", "validation")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents of the splits "train" and "validation"; `open` imports TFDS, the rest does not."""

    hash: str
    manifest: dict
    source: dict
    folder: pathlib.Path | None  # of a local corpus

    def documents(self, split):
        return self.manifest["splits"][split]["documents"]

    def bytes(self, split):
        return self.manifest["splits"][split]["bytes"]

    def open(self, split, log):
        """Yields (name, offset, text) of every document in the stored order."""
        if self.folder is None:
            yield from _named_documents(self.source, split, log)
            return
        _check_shards(self.folder, self.manifest)
        from effmodels.data import tfds_text

        records = tfds_text.read(self.folder / self.manifest["tfds"], split)
        for record in _chunked(records):
            yield record["name"].decode(), int(record["offset"]), record["text"]


def prepare(source, cache, log):
    """The corpus of one entry of `options["sources"]`, built where it is not there yet."""
    return _prepare_local(source, cache, log) if source["name"] == "local" else _prepare_named(source, cache, log)


def _prepare_local(source, cache, log):
    files = sources.find(source["paths"])
    stats = [(f.name, str(f.path.absolute()), f.size, f.mtime_ns) for f in files]
    alias = cache / "aliases" / f"{storage.digest([FORMAT, stats, source['column'], source['holdout']])[:24]}.json"
    known = storage.read_json(alias)
    if known is not None:
        corpus = _load(cache, known["corpus"], source)
        if corpus is not None:
            return corpus
    total = sum(f.size for f in files)
    log(f"data: reading {len(files)} files, {total / 1e6:.1f} MB")
    survey = _survey(files, source, storage.Progress(log, "reading", total))
    corpus = _load(cache, survey["hash"], source) or _build(files, source, survey, cache, log)
    storage.write_json(alias, {"corpus": corpus.hash})
    return corpus


def _load(cache, corpus_hash, source):
    folder = cache / "corpora" / corpus_hash
    manifest = storage.read_json(folder / "corpus.json")
    return manifest and Corpus(corpus_hash, manifest, source, folder)


def _survey(files, source, progress):
    """One pass over all documents: hashes, sizes per split and, where no document falls into the holdout, the tail to cut off."""
    notes = sources.Notes()
    splits = {split: {"documents": 0, "bytes": 0} for split in SPLITS}
    listing, longest = [], ("", 0)
    for file in files:
        listing.append({"name": file.name, "bytes": file.size, "sha256": sources.file_sha256(file)})
        for name, _, text in sources.documents(file, source["column"], notes):
            split = splits[_split_of(name, source)]
            split["documents"] += 1
            split["bytes"] += len(text)
            longest = max(longest, (name, len(text)), key=lambda item: item[1])
        progress(file.size)
    total = sum(s["bytes"] for s in splits.values())
    if not total:
        raise DataError(f"The {len(files)} files found hold no text ({notes.sentence() or 'all are empty'}). Give files with text.")
    file_list = storage.digest(listing)
    corpus_hash = storage.digest([FORMAT, file_list, source["column"], source["holdout"]])[:24]
    cut = _cut(splits, longest, total, source["holdout"])
    return {"hash": corpus_hash, "file_list_sha256": file_list, "files": listing, "splits": splits, "cut": cut, "notes": notes}


def _split_of(name, source):
    return "validation" if sources.held_out(name, source["holdout"]) else "train"


def _cut(splits, longest, total, holdout):
    """(name, bytes kept) of a document whose tail is held out, when the hash chose none (or all) of a few documents; else None."""
    if not holdout or (splits["train"]["documents"] and splits["validation"]["documents"]):
        return None
    name, size = longest
    return (name, size - min(max(int(total * holdout), 16), size // 2)) if size >= 64 else None


def _split_documents(files, source, cut, notes, split):
    """Documents of one split; the document of `cut` gives its head to training and its tail to validation."""
    for file in files:
        for name, offset, text in sources.documents(file, source["column"], notes):
            if cut is None:
                if _split_of(name, source) == split:
                    yield name, offset, text
            elif name != cut[0]:
                if split == "train":
                    yield name, offset, text
            else:
                at = _line_start(text, cut[1])
                yield (name, offset, text[:at]) if split == "train" else (name, offset + at, text[at:])


def _line_start(text, at):
    """The start of a line near byte `at`, else the start of a character: the cut splits neither where it can help it."""
    line = text.rfind(b"\n", 0, at) + 1
    if line > at // 2:
        return line
    while at < len(text) and text[at] & 0xC0 == 0x80:
        at += 1
    return at


def _build(files, source, survey, cache, log):
    target = cache / "corpora" / survey["hash"]
    total = sum(s["bytes"] for s in survey["splits"].values())
    out = sys.stdout

    def loud(line):  # TFDS runs with its own printing switched off
        with contextlib.redirect_stdout(out):
            log(line)

    progress = storage.Progress(loud, "writing shards", total)
    seen = {split: {"documents": 0, "bytes": 0} for split in SPLITS}
    held = []

    def split_documents(split):
        for name, offset, text in _split_documents(files, source, survey["cut"], sources.Notes(), split):
            seen[split]["documents"] += 1
            seen[split]["bytes"] += len(text)
            if split == "validation" and sum(map(len, held)) < GZIP_BYTES:
                held.append(text)
            progress(len(text))
            yield name, offset, text

    from effmodels.data import tfds_text

    with storage.new_folder(target, needed=int(total * 2.2) + 1_000_000, what="the corpus") as folder:  # TFDS shuffles through a copy
        filled = [s for s in SPLITS if survey["splits"][s]["documents"] or survey["cut"]]
        shards = tfds_text.write(folder, filled, split_documents)
        if sum(s["bytes"] for s in seen.values()) != total:
            raise DataError("A source file changed while it was read. Run again when the files are at rest.")
        compressed = len(gzip.compress(b"".join(held), 9))
        manifest = {
            "format": FORMAT, "hash": survey["hash"], "file_list_sha256": survey["file_list_sha256"], "files": len(files),
            "column": source["column"], "holdout": source["holdout"], "cut": survey["cut"], "splits": seen, "tfds": shards,
            "notes": dataclasses.asdict(survey["notes"]),
            "gzip": {"bytes": sum(map(len, held)), "compressed": compressed},
            "shards": {p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": storage.file_sha256(p)}
                       for p in sorted(folder.rglob("*")) if p.is_file()},
        }
        storage.write_json(folder / "files.json", survey["files"])
        storage.write_json(folder / "corpus.json", manifest)
    said = survey["notes"].sentence()
    if survey["cut"]:
        log(f"data: too few documents to hold one out: the last {seen['validation']['bytes']} bytes of {survey['cut'][0]} are held out")
    log(f"data: corpus {survey['hash'][:12]}: {seen['train']['documents']} documents, {seen['train']['bytes'] / 1e6:.2f} MB to train on, "
        f"{seen['validation']['documents']} documents, {seen['validation']['bytes'] / 1e6:.2f} MB held out; {progress.seconds:.1f} s"
        + (f"; {said}" if said else ""))
    return Corpus(survey["hash"], manifest, source, target)


def _check_shards(folder, manifest):
    for name, entry in manifest["shards"].items():
        path = folder / name
        if not path.exists() or path.stat().st_size != entry["bytes"] or storage.file_sha256(path) != entry["sha256"]:
            raise storage.DamagedError(f"{path} is damaged: it is not the file that was written. "
                                       f"Delete {folder} and run again: it is rebuilt.")


def _prepare_named(source, cache, log):
    """A TFDS dataset by name keeps its own files; ours is a small manifest."""
    fields = {k: source[k] for k in ("name", "column", "train_split", "validation_split", "data_dir", "holdout")}
    alias = cache / "aliases" / f"{storage.digest([FORMAT, 'tfds', fields, os.environ.get('TFDS_DATA_DIR', '')])[:24]}.json"
    known = storage.read_json(alias)
    if known is None:
        known = _survey_named(source, log)
        storage.write_json(alias, known)
    return Corpus(known["hash"], known, source, None)


def _survey_named(source, log):
    from effmodels.data import tfds_text

    builder = tfds_text.by_name(source["name"], source["data_dir"], log)
    splits = {split: {"documents": 0, "bytes": 0} for split in SPLITS}
    held = []
    total = sum(builder.info.splits[s.split("[")[0]].num_examples for s in tfds_text.pick_splits(builder, source) if s)
    progress = storage.Progress(log, f"reading {source['name']}", total, unit_bytes=False)
    for split in SPLITS:
        for _, _, text in _named_documents(source, split, log, builder):
            progress(1)
            splits[split]["documents"] += 1
            splits[split]["bytes"] += len(text)
            if split == "validation" and sum(map(len, held)) < GZIP_BYTES:
                held.append(text)
    if not splits["train"]["documents"]:
        raise DataError(f"TFDS dataset {builder.info.full_name}: split {source['train_split']!r} holds no text in {source['column']!r}.")
    listing = [builder.info.full_name, *tfds_text.pick_splits(builder, source),
               {name: [s.num_examples, s.shard_lengths, s.num_bytes] for name, s in builder.info.splits.items()}]
    corpus_hash = storage.digest([FORMAT, listing, source["column"], source["holdout"]])[:24]
    return {"hash": corpus_hash, "file_list_sha256": storage.digest(listing), "dataset": builder.info.full_name, "splits": splits,
            "holdout": source["holdout"], "gzip": {"bytes": sum(map(len, held)), "compressed": len(gzip.compress(b"".join(held), 9))}}


def _named_documents(source, split, log, builder=None):
    from effmodels.data import tfds_text

    builder = builder or tfds_text.by_name(source["name"], source["data_dir"], log)
    train, validation = tfds_text.pick_splits(builder, source)
    wanted = train if split == "train" or validation is None else validation
    records = tfds_text.open_split(builder, wanted, source["column"])
    for i, record in enumerate(_chunked(records)):
        name, text = f"{source['name']}/{wanted}:{i}", record[source["column"]]
        if text.strip() and (validation is not None or _split_of(name, source) == split):
            yield name, 0, text


def _chunked(records):
    for i in range(0, len(records), CHUNK):
        yield from records.__getitems__(list(range(i, min(i + CHUNK, len(records)))))

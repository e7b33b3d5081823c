"""What goes in: parameters drawn by canonical name, rows of packed documents with padding. Numpy; the same for every grouping and mesh.

Letters: B batch, T time.
"""
import zlib

import numpy as np

KEYS = ("tokens", "targets", "weights", "segment_ids", "positions")


def arrays_by_path(abstract, infos, names, seed):
    """{path: array} of parameters or buffers; each canonical name has a generator of its own, so the grouping of layers does not matter.

    No initial zero or one hides a wrong term: matrices have their initial variance, scales are spread around 1, biases around 0.
    """
    out = {path: np.zeros(a.shape, a.dtype) for path, a in abstract.items()}
    for name, (path, index) in names.items():
        if path not in out:
            continue
        info, target = infos[path], out[path] if index is None else out[path][index]
        sizes = dict(zip(info.dim_names, out[path].shape))
        fan_in = np.prod([sizes[d] for d in info.in_dims]) if info.in_dims else 25.0
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        target[...] = rng.standard_normal(target.shape, np.float32) * fan_in**-0.5 + name.endswith("scale")
    return out


def by_name(arrays, names):
    """{canonical name: numpy array} of arrays by path, parameters that are absent left out."""
    host = {path: np.asarray(a) for path, a in arrays.items()}
    return {name: host[path] if index is None else host[path][index] for name, (path, index) in names.items() if path in host}


def by_path(named, names, abstract):
    """The inverse of `by_name`, into the shapes of `abstract`."""
    out = {path: np.zeros(a.shape, a.dtype) for path, a in abstract.items()}
    for name, (path, index) in names.items():
        if path in out:
            out[path][() if index is None else index] = named[name]
    return out


def packed_batch(rows, length, vocab, seed):
    """{tokens, targets, weights, segment_ids, positions} [B, T]: documents of random lengths, some of one token, padding behind.

    One row has a boundary in its middle, where shards of a sequence meet, another one next to it.
    """
    rng = np.random.default_rng([seed, 1])
    segments = np.zeros((rows, length), np.int32)
    for b in range(rows):
        end = length - (int(rng.integers(1, max(2, length // 8))) if b % 2 else 0)
        cuts = {int(c) for c in rng.integers(1, max(2, end), int(rng.integers(1, 4)))}
        middle = length // 2 + (0, 1, -1)[b % 3]
        cuts |= {middle - 1, middle} if b % 4 == 0 else {middle} if b % 4 < 3 else set()
        edges = sorted(c for c in cuts if 0 < c < end)
        for i, (start, stop) in enumerate(zip([0, *edges], [*edges, end])):
            segments[b, start:stop] = i + 1
    return _batch(rng.integers(0, vocab, (rows, length)).astype(np.int32), segments)


def with_images(batch, sources, seed):
    """The batch with images at random tokens of its documents, in some rows fewer than there are places.

    sources: `train.sources.arrays` of the model, empty for a model of text.
    """
    if not sources:
        return batch
    rng, (images, *patches) = np.random.default_rng([seed, 2]), sources["source_patches"][0]
    rows, length = batch["tokens"].shape
    at = np.sort(np.argsort(rng.random((rows, length)), axis=1)[:, :images], axis=1).astype(np.int32)
    ids = np.take_along_axis(batch["segment_ids"], at, axis=1) * (rng.random((rows, images)) < 0.8)
    drawn = rng.standard_normal((rows, images, *patches), np.float32)
    return batch | {"source_patches": drawn, "source_index": at, "source_segment_ids": ids.astype(np.int32)}


def documents(batch):
    """[(row, start, stop)] of all documents of a batch."""
    found = []
    for b, row in enumerate(batch["segment_ids"]):
        for segment in range(1, int(row.max(initial=0)) + 1):
            where = np.flatnonzero(row == segment)
            if where.size:
                found.append((b, int(where[0]), int(where[-1]) + 1))
    return found


def alone(batch):
    """Batches of the same shape with one document to a row, from its start; and [(batch, row)] of every document of `documents`."""
    rows, docs = len(batch["tokens"]), documents(batch)
    batches, places = [], []
    for i, (b, start, stop) in enumerate(docs):
        if i % rows == 0:
            batches.append({k: np.full_like(v, -1 if k == "experts" else 0) for k, v in batch.items()})
        for key in batch:
            if not key.startswith("source"):
                batches[-1][key][i % rows, : stop - start] = 1 if key == "segment_ids" else batch[key][b, start:stop]
        if "source_patches" in batch:
            _move_images(batches[-1], i % rows, batch, b, start)
        places.append((len(batches) - 1, i % rows))
    return batches, places


def _move_images(there, row, batch, b, start):
    """Puts the images of the document that starts at this token of row b into a row in which it stands alone."""
    mine = batch["source_segment_ids"][b] == batch["segment_ids"][b, start]
    there["source_segment_ids"][row], there["source_patches"][row] = mine, batch["source_patches"][b]
    there["source_index"][row] = np.where(mine, batch["source_index"][b] - start, 0)


def without_rows(batch, rows):
    """The batch with some rows turned into padding."""
    keep_B = ~np.asarray(rows)
    return {k: v * keep_B.reshape(-1, *(1,) * (v.ndim - 1)).astype(v.dtype) for k, v in batch.items()}


def _batch(tokens, segments):
    length = tokens.shape[1]
    starts = np.concatenate([np.ones((len(tokens), 1), bool), segments[:, 1:] != segments[:, :-1]], axis=1)
    place = np.arange(length)
    positions = (place - np.maximum.accumulate(np.where(starts, place, 0), axis=1)) * (segments > 0)
    follows = np.concatenate([segments[:, 1:] == segments[:, :-1], np.zeros((len(tokens), 1), bool)], axis=1) & (segments > 0)
    tokens = tokens * (segments > 0)
    return {
        "tokens": tokens, "targets": np.roll(tokens, -1, axis=1) * follows, "weights": follows.astype(np.float32),
        "segment_ids": segments, "positions": positions.astype(np.int32),
    }  # fmt: skip

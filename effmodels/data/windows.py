"""Fixed windows on disk, and their assembly into a batch of rows.

`<cache>/windows/<hash of tokenizer, length, policy, corpus>`, for each split: ids [W,T], crc [W] (of each row, checked whenever it is
read), rows [W+1] (first piece of each window), pieces [P,6] with the columns of COLUMNS, counts [V] (targets by id).
Letters: W windows, T window length, P pieces, B rows of a batch, S pieces of one row, V vocabulary.
"""
import zlib

import numpy as np

from effmodels.data import packing, storage, tokens
from effmodels.data.corpus import SPLITS
from effmodels.data.options import DataError

FORMAT = 1
COLUMNS = ("source", "offset", "bytes", "tokens", "next", "target_bytes")
SOURCE, OFFSET, BYTES, TOKENS, NEXT, TARGET_BYTES = range(6)
CHUNK = 2048  # windows assembled at once
# Rows of a batch that stay on the host.
HOST_KEYS = ("window", "source_id", "source_offset", "source_bytes", "target_bytes")


def key(corpus, tokenizer, seq_len, policy):
    return storage.digest([FORMAT, tokenizer.fingerprint, seq_len, policy, corpus.hash])[:24]


def prepare(corpus, tokenizer, seq_len, policy, cache, log):
    """The windows of a corpus as an ArrayFolder, packed now if they are not there or not intact."""
    target = cache / "windows" / key(corpus, tokenizer, seq_len, policy)
    folder = storage.open_or_none(target, log)
    if folder is not None:
        return folder
    stream = tokens.prepare(corpus, tokenizer, cache, log)
    plans = {split: _plan(stream, split, policy, seq_len) for split in SPLITS}
    _check_size(plans["train"], seq_len)
    total = sum(plan.windows for plan in plans.values())
    progress = storage.Progress(log, f"packing {policy}", total, unit_bytes=False)
    needed = total * (seq_len * tokens.id_dtype(tokenizer).itemsize + 12) + 48 * sum(len(p.length_P) for p in plans.values()) + 1_000_000
    with storage.new_folder(target, needed=needed, what=f"the windows of {seq_len} tokens") as temporary:
        writer = storage.ArrayWriter(temporary)
        meta = {split: _write_split(writer, stream, split, plans[split], seq_len, tokenizer, progress) for split in SPLITS}
        writer.close({"format": FORMAT, "corpus": corpus.hash, "tokenizer": tokenizer.fingerprint, "seq_len": seq_len, "packing": policy,
                      "stream": stream.folder.name, "splits": meta})
    train = meta["train"]
    log(f"data: {train['windows']} training windows of {seq_len}, {train['efficiency']:.2%} filled; {progress.seconds:.1f} s")
    return storage.ArrayFolder(target, verify=False)


def _plan(stream, split, policy, seq_len):
    return packing.pack(policy, np.diff(stream[f"{split}_starts"]) - 1, seq_len)


def _check_size(plan, seq_len):
    total = int(plan.length_P.sum())
    if total < seq_len:
        raise DataError(f"The corpus is smaller than one sequence: the training split holds {total} tokens, seq_len is {seq_len}. "
                        f"Give more text, or set seq_len to at most {total}.")


def _write_split(writer, stream, split, plan, seq_len, tokenizer, progress):
    table, flat_P = _describe(stream, split, plan)
    order = np.argsort(plan.window_P, kind="stable")
    table, flat_P, length_P, window_P = table[order], flat_P[order], plan.length_P[order], plan.window_P[order]
    rows = np.searchsorted(window_P, np.arange(plan.windows + 1))
    writer.append(f"{split}_pieces", table)
    writer.append(f"{split}_rows", rows.astype(np.int64))
    writer.append(f"{split}_counts", stream[f"{split}_counts"])
    for w in range(0, plan.windows, CHUNK):
        end = min(w + CHUNK, plan.windows)
        part = slice(rows[w], rows[end])
        ids = _fill(stream[f"{split}_ids"], flat_P[part], length_P[part], window_P[part] - w, end - w, seq_len, tokenizer.pad_id)
        writer.append(f"{split}_ids", ids)
        writer.append(f"{split}_crc", np.array([zlib.crc32(row) for row in ids], np.uint32))
        progress(end - w)
    inputs, slots = int(length_P.sum()), plan.windows * seq_len
    return {"windows": plan.windows, "inputs": inputs, "efficiency": inputs / slots if slots else 0.0, **stream.meta["splits"][split],
            "pieces": len(length_P), "max_pieces": int(np.diff(rows).max(initial=1)), "target_bytes": int(table[:, TARGET_BYTES].sum())}


def _describe(stream, split, plan):
    """The pieces table [P,6] in document order, and where each piece begins in the stream of ids."""
    if not len(plan.length_P):
        return np.zeros((0, len(COLUMNS)), np.int64), np.zeros(0, np.int64)
    starts_D, ids, lengths = stream[f"{split}_starts"], stream[f"{split}_ids"], stream[f"{split}_lengths"]
    flat_P = np.asarray(starts_D)[plan.document_P] + plan.start_P
    # Pieces tile the stream, so the bytes of each are one segmented sum; a document's eos, 0 bytes, falls to its last piece.
    bytes_P = np.add.reduceat(lengths, flat_P, dtype=np.int64)
    after_P = flat_P + plan.length_P
    before_P = np.cumsum(bytes_P) - bytes_P
    first_P = np.searchsorted(plan.document_P, plan.document_P)  # the first piece of the same document
    offset_P = np.asarray(stream[f"{split}_bases"])[plan.document_P] + before_P - before_P[first_P]
    target_P = bytes_P - lengths[flat_P].astype(np.int64) + lengths[after_P].astype(np.int64)
    columns = (plan.document_P, offset_P, bytes_P, plan.length_P, ids[after_P].astype(np.int64), target_P)
    return np.stack(columns, axis=1).astype(np.int64), flat_P


def _fill(ids, flat_P, length_P, window_P, windows, seq_len, pad_id):
    """ids [windows, T]: the pieces of each window one after the other, then padding."""
    before_P = np.cumsum(length_P) - length_P
    first_P = np.searchsorted(window_P, window_P)
    column_P = before_P - before_P[first_P]
    step = np.arange(int(length_P.sum()))
    out = np.full(windows * seq_len, pad_id, ids.dtype)
    out[np.repeat(window_P * seq_len + column_P - before_P, length_P) + step] = ids[np.repeat(flat_P - before_P, length_P) + step]
    return out.reshape(windows, seq_len)


class WindowSet:
    """The windows of one split of one corpus or of several, numbered through: len(), [i] one row, ["tokens"] one column of all rows."""

    def __init__(self, folders, split, pad_id):
        self.folders, self.split, self.pad_id = folders, split, pad_id
        metas = [f.meta["splits"][split] for f in folders]
        self.sizes = [m["windows"] for m in metas]
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)])
        self.seq_len = folders[0].meta["seq_len"]
        self.max_pieces = max(m["max_pieces"] for m in metas)
        # Sources are numbered through the corpora, in each corpus first the training documents, then those held out.
        documents = [sum(f.meta["splits"][s]["documents"] for s in SPLITS) for f in folders]
        ahead = [f.meta["splits"]["train"]["documents"] if split == "validation" else 0 for f in folders]
        self.source_base = [sum(documents[:i]) + a for i, a in enumerate(ahead)]

    def __len__(self):
        return int(self.starts[-1])

    def __getitem__(self, index):
        if isinstance(index, str):
            return self.rows(np.arange(len(self)))[index]
        if not -len(self) <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        return {name: value[0] for name, value in self.rows(np.array([index % len(self)])).items()}

    def rows(self, index_B):
        """A batch of rows by global window index; -1 gives a row of padding with weight 0."""
        index_B = np.asarray(index_B, np.int64)
        B, T = len(index_B), self.seq_len
        tokens_BT = np.full((B, T), self.pad_id, np.int32)
        rows_S, pieces = [np.zeros(0, np.int64)], [np.zeros((0, len(COLUMNS)), np.int64)]
        which_B = np.searchsorted(self.starts, index_B, side="right") - 1  # -1 for padding
        for c in np.unique(which_B[index_B >= 0]):
            at_B = np.flatnonzero((which_B == c) & (index_B >= 0))
            local = index_B[at_B] - self.starts[c]
            tokens_BT[at_B] = self._read(c, local)
            row_S, piece_S = self._pieces(c, local)
            rows_S.append(at_B[row_S])
            pieces.append(piece_S)
        return self._batch(index_B, tokens_BT, np.concatenate(rows_S), np.concatenate(pieces))

    def _read(self, c, local):
        folder = self.folders[c]
        ids, crc = folder[f"{self.split}_ids"][local], folder[f"{self.split}_crc"][local]
        for i, row in enumerate(ids):
            if zlib.crc32(row) != crc[i]:
                raise storage.DamagedError(f"Window {local[i]} of {folder.folder} is damaged: its checksum is not the one recorded. "
                                           "Delete the folder and run again: it is rebuilt.")
        return ids

    def _pieces(self, c, local):
        folder = self.folders[c]
        first, last = folder[f"{self.split}_rows"][local], folder[f"{self.split}_rows"][local + 1]
        count = last - first
        row_S = np.repeat(np.arange(len(local)), count)
        piece_S = folder[f"{self.split}_pieces"][np.repeat(first - (np.cumsum(count) - count), count) + np.arange(count.sum())]
        piece_S[:, SOURCE] += self.source_base[c]
        return row_S, piece_S

    def _batch(self, index_B, tokens_BT, row_S, piece_S):
        B, T = tokens_BT.shape
        order = np.argsort(row_S, kind="stable")
        row_S, piece_S = row_S[order], piece_S[order]
        length_S = piece_S[:, TOKENS]
        rank_S = np.arange(len(row_S)) - np.searchsorted(row_S, row_S)
        before_S = np.cumsum(length_S) - length_S
        column_S = before_S - before_S[np.searchsorted(row_S, row_S)]
        used_B = np.bincount(row_S, length_S, minlength=B).astype(np.int64)
        valid_BT = np.arange(T) < used_B[:, None]

        segment_BT, start_BT = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
        segment_BT[row_S, column_S] = 1
        start_BT[row_S, column_S] = column_S
        segment_BT = np.cumsum(segment_BT, axis=1, dtype=np.int32) * valid_BT
        positions_BT = (np.arange(T, dtype=np.int32) - np.maximum.accumulate(start_BT, axis=1)) * valid_BT

        targets_BT = np.full((B, T), self.pad_id, np.int32)
        targets_BT[:, :-1] = tokens_BT[:, 1:]
        targets_BT[row_S, column_S + length_S - 1] = piece_S[:, NEXT]  # known from the document: no target is lost at a cut
        targets_BT[~valid_BT] = self.pad_id

        traced = np.full((3, B, self.max_pieces), -1, np.int64)
        traced[:, row_S, rank_S] = piece_S[:, [SOURCE, OFFSET, BYTES]].T
        return {"tokens": tokens_BT, "targets": targets_BT, "weights": valid_BT.astype(np.float32), "segment_ids": segment_BT,
                "positions": positions_BT, "window": index_B, "source_id": traced[0], "source_offset": traced[1], "source_bytes": traced[2],
                "target_bytes": np.bincount(row_S, piece_S[:, TARGET_BYTES], minlength=B).astype(np.int64)}

"""Packing against a slow twin: every input in exactly one piece, no window overfull, documents never mixed."""
import numpy as np
import pytest

from effmodels.data import packing
from effmodels.data.options import DataError


def slow_concat(inputs, seq_len):
    pieces, filled, window = [], 0, 0
    for d, n in enumerate(inputs):
        start = 0
        while start < n:
            length = min(n - start, seq_len - filled)
            pieces.append((d, start, length, window))
            start, filled = start + length, filled + length
            if filled == seq_len:
                filled, window = 0, window + 1
    return pieces, window + (filled > 0)


def slow_best_fit(inputs, seq_len):
    parts = [(d, s, min(seq_len, n - s)) for d, n in enumerate(inputs) for s in range(0, n, seq_len)]
    rooms, placed = [], {}
    for d, start, length in sorted(parts, key=lambda p: -p[2]):
        fits = [(room, -w) for w, room in enumerate(rooms) if room >= length]
        if fits:
            room, w = min(fits)
            w = -w
        else:
            rooms.append(seq_len)
            w = len(rooms) - 1
        rooms[w] -= length
        placed[d, start, length] = w
    return [(*p, placed[p]) for p in parts], len(rooms)


@pytest.mark.parametrize("seq_len", [1, 7, 64])
@pytest.mark.parametrize("seed", [0, 1])
def test_policies_tile_every_document(seq_len, seed):
    inputs = np.random.default_rng(seed).geometric(0.03, 60)
    for policy in ("concat", "best_fit"):
        got = packing.pack(policy, inputs, seq_len)
        end = 0
        for d, start, length in zip(got.document_P, got.start_P, got.length_P):
            end = 0 if start == 0 else end
            assert start == end and length > 0
            end = start + length
            assert end <= inputs[d]
        assert np.array_equal(np.bincount(got.document_P, got.length_P), inputs)
        filled = np.bincount(got.window_P, got.length_P, minlength=got.windows)
        assert len(filled) == got.windows and filled.max() <= seq_len and filled.min() > 0


@pytest.mark.parametrize("seq_len", [1, 7, 64])
def test_policies_equal_their_slow_twins(seq_len):
    inputs = np.random.default_rng(2).geometric(0.05, 40)
    pieces, windows = slow_concat(inputs, seq_len)
    got = packing.concat(inputs, seq_len)
    assert got.windows == windows
    assert np.array_equal(np.stack([got.document_P, got.start_P, got.length_P, got.window_P], 1), pieces)
    pieces, windows = slow_best_fit(inputs, seq_len)
    got = packing.best_fit(inputs, seq_len)
    assert got.windows == windows and [tuple(p[:3]) for p in pieces] == list(zip(got.document_P, got.start_P, got.length_P))
    fill = lambda w, n: sorted(np.bincount(w, n).tolist())  # noqa: E731  equal up to the naming of windows of equal room
    assert fill(got.window_P, got.length_P) == fill([p[3] for p in pieces], [p[2] for p in pieces])


def test_best_fit_keeps_short_documents_whole_and_concat_fills():
    inputs = np.array([10, 6, 16, 3, 40])
    best = packing.best_fit(inputs, 16)
    assert np.bincount(best.document_P).tolist() == [1, 1, 1, 1, 3]  # only the document longer than a window is cut
    concat = packing.concat(inputs, 16)
    assert np.bincount(concat.window_P, concat.length_P)[:-1].tolist() == [16] * (concat.windows - 1)


def test_no_documents_and_unknown_policy():
    for policy in ("concat", "best_fit"):
        assert packing.pack(policy, np.zeros(0, np.int64), 8).windows == 0
    with pytest.raises(DataError, match="'best-fit' is not a packing policy; did you mean 'best_fit'"):
        packing.pack("best-fit", np.array([3]), 8)

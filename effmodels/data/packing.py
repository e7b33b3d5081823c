"""Which pieces of which documents share a window: two policies, as pure functions of the documents' lengths.

A document of n tokens offers n - 1 inputs (its last token is only ever a target). A piece is a run of inputs of one document; together
the pieces cover every input exactly once, and the token after a piece, known from the document, is the target of its last input.
Letters: D documents, P pieces, W windows, T window length.
"""
import bisect
import dataclasses

import numpy as np

from effmodels.data.options import PACKINGS, DataError, nearest


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Pieces in the order of their documents, then of their starts."""

    document_P: np.ndarray
    start_P: np.ndarray  # first input of the piece, counted in its document
    length_P: np.ndarray
    window_P: np.ndarray
    windows: int


def pack(policy, inputs_D, seq_len):
    """Pieces and their windows under a named policy."""
    if policy not in PACKINGS:
        raise DataError(f"{policy!r} is not a packing policy; {nearest(policy, PACKINGS)}")
    return concat(inputs_D, seq_len) if policy == "concat" else best_fit(inputs_D, seq_len)


def concat(inputs_D, seq_len):
    """Concatenate and split: every window but the last is full, documents are cut wherever a window ends."""
    end_D = np.cumsum(inputs_D)
    start_D = end_D - inputs_D
    total = int(end_D[-1]) if len(end_D) else 0
    cut_P = np.union1d(start_D, np.arange(0, total, seq_len))
    document_P = np.searchsorted(start_D, cut_P, side="right") - 1
    length_P = np.diff(cut_P, append=total)
    return Pieces(document_P, cut_P - start_D[document_P], length_P, cut_P // seq_len, -(-total // seq_len))


def best_fit(inputs_D, seq_len):
    """Documents longer than a window are cut into full windows and a rest; rests and short documents are packed best-fit decreasing."""
    pieces_D = -(-inputs_D // seq_len)
    document_P = np.repeat(np.arange(len(inputs_D)), pieces_D)
    first_D = np.cumsum(pieces_D) - pieces_D
    start_P = (np.arange(len(document_P)) - first_D[document_P]) * seq_len
    length_P = np.minimum(inputs_D[document_P] - start_P, seq_len)
    window_P = np.empty(len(length_P), np.int64)
    windows, rooms = 0, {}  # room left -> windows with that room
    open_rooms = []  # the keys of `rooms`, sorted
    for p in np.argsort(-length_P, kind="stable").tolist():
        length = int(length_P[p])
        at = bisect.bisect_left(open_rooms, length)  # the tightest window that still takes the piece
        if at < len(open_rooms):
            room = open_rooms[at]
            window = rooms[room].pop()
            if not rooms[room]:
                del rooms[room], open_rooms[at]
        else:
            room, window, windows = seq_len, windows, windows + 1
        window_P[p] = window
        if room > length:
            if room - length not in rooms:
                rooms[room - length] = []
                bisect.insort(open_rooms, room - length)
            rooms[room - length].append(window)
    return Pieces(document_P, start_P, length_P, window_P, windows)

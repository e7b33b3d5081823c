"""Where the tokens of a row lie on a sharded sequence axis, and what that costs attention. Plain numpy; no device is touched.

contiguous: shard d holds the d-th part. zigzag: of 2n parts, shard d holds parts d and 2n-1-d, so that causal work is equal at every step
of a ring (arXiv:2405.07719). striped: shard d holds tokens d, d+n, d+2n, ... (arXiv:2311.09431).
Letters: T tokens of a row, n shards, c = T / n tokens of one shard.
"""
import functools

import numpy as np

from effmodels.config import ConfigError
from effmodels.parallel.options import LAYOUTS


@functools.lru_cache(64)
def order(layout, length, pieces):
    """int32 [T]: the place in the row of the token in each slot; slots c d .. c (d+1) are those of shard d.

    Raises ConfigError when the row cannot be split evenly.
    """
    parts = 2 * pieces if layout == "zigzag" else pieces
    if length % parts:
        near = sorted({max(parts, length // parts * parts), -(-length // parts) * parts})
        raise ConfigError(
            f"layout {layout!r}: a row of {length} tokens cannot be split into {parts} equal parts for {pieces} devices; "
            f"nearest: {' or '.join(map(str, near))}."
        )
    place_nc = np.arange(length, dtype=np.int32).reshape(parts, -1)
    if layout == "zigzag":
        place_nc = np.stack([place_nc[:pieces], place_nc[pieces:][::-1]], axis=1)
    elif layout == "striped":
        place_nc = np.arange(length, dtype=np.int32).reshape(-1, pieces).T
    flat = place_nc.reshape(-1)
    flat.flags.writeable = False  # cached
    return flat


def to_layout(x, layout, pieces, axis=1):
    """x (numpy or jax), whose `axis` is in the order of the row, with its entries put where the layout wants them."""
    return x if layout == "contiguous" or pieces == 1 else x.take(order(layout, x.shape[axis], pieces), axis=axis)


def from_layout(x, layout, pieces, axis=1):
    """The inverse of `to_layout`."""
    return x if layout == "contiguous" or pieces == 1 else x.take(np.argsort(order(layout, x.shape[axis], pieces)), axis=axis)


def runs(layout):
    """How many stretches of the row one shard holds, in order; what passes states needs few. None: as many as it has tokens."""
    return {"contiguous": 1, "zigzag": 2, "striped": None}[layout]


def visible_pairs(layout, length, pieces, window=None):
    """int64 [n, n]: the (query, key) pairs of a causal row that the queries of shard d have with the keys of shard s."""
    place_nc = np.sort(order(layout, length, pieces).reshape(pieces, -1), axis=1).astype(np.int64)
    pairs = np.zeros((pieces, pieces), np.int64)
    for d, query_c in enumerate(place_nc):
        for s, key_c in enumerate(place_nc):
            upto = np.searchsorted(key_c, query_c, side="right")
            below = 0 if window is None else np.searchsorted(key_c, query_c - window, side="left")
            pairs[d, s] = np.sum(upto - below)
    return pairs


def shifts(layout, length, pieces, window=None):
    """The ring steps in which any shard sees any key: shard d meets the keys of shard (d - shift) mod n. Always starts with 0."""
    pairs = _pairs(layout, length, pieces, window)
    return tuple(s for s in range(pieces) if s == 0 or any(pairs[d, (d - s) % pieces] for d in range(pieces)))


def critical_path(layout, length, pieces, window=None):
    """What a ring has to wait for, in units of c^2 pairs: at every step the shard with most of them. Full causal: contiguous n - 1/2,
    zigzag n / 2, for large c."""
    pairs = _pairs(layout, length, pieces, window)
    steps = [max(pairs[d, (d - s) % pieces] for d in range(pieces)) for s in range(pieces)]
    return float(sum(steps)) / (length // pieces) ** 2


def balance(layout, length, pieces, window=None):
    """The share of the ring's time in which the mean shard has work: 1 is perfect."""
    total = float(_pairs(layout, length, pieces, window).sum()) / (length // pieces) ** 2
    return total / (pieces * critical_path(layout, length, pieces, window))


def choose(windows, lengths, pieces, allowed=LAYOUTS):
    """The allowed layout whose ring has the shortest path over all attention layers.

    windows: one entry per attention layer, None = all keys. lengths: those of all rows of a run; the last one counts, all must divide.
    Ties, and a model without attention, take "contiguous". Striped stays a choice by name: its pairs are well balanced, but every
    block of them is masked, and a window still needs every step of the ring.
    """
    divides = {"contiguous": pieces, "zigzag": 2 * pieces}
    fits = [name for name, parts in divides.items() if name in allowed and all(length % parts == 0 for length in lengths)]
    if pieces == 1 or not windows or not fits:
        return "contiguous"
    return min(fits, key=lambda name: sum(critical_path(name, lengths[-1], pieces, w) for w in windows))


@functools.lru_cache(64)
def _pairs(layout, length, pieces, window):
    return visible_pairs(layout, length, pieces, window)

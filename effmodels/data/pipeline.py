"""From windows to batches: Grain decides which window is row r of the endless sequence, so that any batch is found without the ones before.

Global batch k of b rows is rows k*b .. (k+1)*b of that sequence; process p of n takes its p-th n-th. The state is one integer, the next
row, and neither the number of processes nor the prefetching is part of it.
"""
import fractions
import math
import sys

import numpy as np

from effmodels.data import storage
from effmodels.data.options import DataError

MAX_PERIOD = 1_000_000


class Mixture:
    """Interleaves corpora in exact proportion: in any run of `period` rows corpus c has exactly `shares[c]`, spread evenly."""

    def __init__(self, weights):
        exact = [fractions.Fraction(str(w)) for w in weights]  # as typed: 0.7 is 7/10
        scale = math.lcm(*(w.denominator for w in exact))
        whole = [int(w * scale) for w in exact]
        self.shares = np.array([w // math.gcd(*whole) for w in whole], np.int64)
        self.period = int(self.shares.sum())
        if self.period > MAX_PERIOD:
            raise DataError(f"config.data.mixture: the weights {tuple(weights)} need a period of {self.period} rows. "
                            "Use weights with at most four significant digits.")
        # Occurrence i of a corpus with share s belongs at (i + 1/2) / s of the period; ties go to the earlier corpus.
        at = np.concatenate([(np.arange(s) + 0.5) / s for s in self.shares])
        corpus = np.repeat(np.arange(len(self.shares)), self.shares)
        order = np.lexsort((corpus, at))
        self.corpus_P = corpus[order]
        self.rank_P = np.concatenate([np.arange(s) for s in self.shares])[order]

    def __getitem__(self, row):
        periods, slot = divmod(row, self.period)
        c = int(self.corpus_P[slot])
        return c, periods * int(self.shares[c]) + int(self.rank_P[slot])

    def counts(self, rows):
        """How many of the first `rows` rows came from each corpus."""
        periods, slot = divmod(rows, self.period)
        return periods * self.shares + np.bincount(self.corpus_P[:slot], minlength=len(self.shares))


def order(window_set, weights, *, seed, shuffle, repeat):
    """A Grain MapDataset of window indices: row -> window. Every corpus is gone through completely, in a new order each epoch."""
    import grain

    starts = window_set.starts.tolist()
    if not repeat:  # every window of every corpus once; proportions have no meaning here
        windows = grain.MapDataset.range(len(window_set))
        return windows.shuffle(seed=_seed(seed, 0)) if shuffle else windows
    corpora = [grain.MapDataset.range(starts[c], starts[c + 1]) for c in range(len(starts) - 1)]
    if shuffle:
        corpora = [windows.shuffle(seed=_seed(seed, c)) for c, windows in enumerate(corpora)]
    corpora = [windows.repeat() for windows in corpora]
    return corpora[0] if len(corpora) == 1 else grain.MapDataset.select_from_datasets(corpora, _selection(Mixture(weights)))


def _seed(seed, c):
    """Grain adds the epoch to the seed: neighbouring seeds would repeat each other's epochs, hashed ones do not."""
    return int(storage.digest(["order", int(seed), c])[:8], 16)


def _selection(mixture):
    import grain.python

    class Selection(grain.python.DatasetSelectionMap):
        def __len__(self):
            return sys.maxsize

        def __getitem__(self, index):
            return mixture[index]

    return Selection()


class _Batches:
    """Grain source of this process's part of each global batch, counted from `first_row`; the last one of a finite order is padded."""

    def __init__(self, window_set, row_to_window, batch_size, first_row, part):
        self.window_set, self.row_to_window = window_set, row_to_window
        self.batch_size, self.first_row, self.part = batch_size, first_row, part

    def __len__(self):
        return max(-(-(len(self.row_to_window) - self.first_row) // self.batch_size), 0)

    def __getitem__(self, k):
        rows = (self.first_row + k * self.batch_size + self.part).tolist()
        end = len(self.row_to_window)
        return self.window_set.rows(np.array([self.row_to_window[r] if r < end else -1 for r in rows], np.int64))

    def __repr__(self):
        return f"Batches({len(self.window_set)} windows, batch_size={self.batch_size})"


class BatchIterator:
    """Batches of numpy arrays, with an exact O(1) position: `state()` is what has been handed out, whatever is prefetched."""

    def __init__(self, window_set, weights, *, batch_size, seed, shuffle, repeat, process_index=0, process_count=1, rows=None,
                 start=0, threads=1):
        if not len(window_set):
            raise DataError("This split holds no windows. Set config.data.holdout above 0 to hold out documents for validation.")
        if batch_size < 1 or batch_size % process_count:
            below = max(batch_size // process_count, 1) * process_count
            raise DataError(f"batch_size={batch_size} must be a positive multiple of the {process_count} processes; nearest: {below}.")
        if not 0 <= process_index < process_count:
            raise DataError(f"process_index={process_index} must be in [0, {process_count}).")
        self.window_set, self.batch_size, self.seed, self.threads = window_set, batch_size, int(seed), threads
        self.mixture = Mixture(weights) if repeat and len(window_set.sizes) > 1 else None
        local = batch_size // process_count
        self.part = np.arange(process_index * local, (process_index + 1) * local) if rows is None else np.asarray(rows)
        if self.part.min(initial=0) < 0 or self.part.max(initial=0) >= batch_size:
            raise DataError(f"rows={self.part.tolist()} must be numbers of rows of a batch of {batch_size}.")
        self.order = order(window_set, weights, seed=seed, shuffle=shuffle, repeat=repeat)
        self.identity = storage.digest([[f.folder.name for f in window_set.folders], window_set.split, shuffle, repeat,
                                        [str(w) for w in weights] if self.mixture else []])[:24]
        self._seek(start * batch_size)

    def _seek(self, row):
        import grain

        self._first_row = row
        source = _Batches(self.window_set, self.order, self.batch_size, row, self.part)
        # Grain's default of 16 threads is several times slower than one: assembling a batch holds the interpreter lock.
        options = grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=2 * self.threads)
        self._iterator = iter(grain.MapDataset.source(source).to_iter_dataset(options))

    def __iter__(self):
        return self

    def __next__(self):
        return next(self._iterator)

    @property
    def next_row(self):
        return self._first_row + self._iterator.get_state()["next_index"] * self.batch_size

    def state(self):
        """JSON-able position, the same on every process; `restore` takes it at any batch size and number of processes."""
        row = self.next_row
        index, size = row // self.batch_size, self.batch_size
        return {"next_index": index, "next_row": row, "batch_size": size, "seed": self.seed, "data": self.identity}

    def restore(self, state):
        """Continues where `state` was taken: the next row is the one that would have come next."""
        for field, mine, what in (("seed", self.seed, "seed"), ("data", self.identity, "windows, split or mixture")):
            if state[field] != mine:
                raise DataError(f"The saved data position belongs to another {what} (saved {state[field]!r}, this run {mine!r}). "
                                "Resume with the config.data, seq_len and seed of the saved run, or start in a new workdir.")
        self._seek(int(state["next_row"]))

    def epochs(self):
        """How often each corpus has been gone through by the rows handed out so far."""
        counts = self.mixture.counts(self.next_row) if self.mixture else [self.next_row]
        sizes = self.window_set.sizes if self.mixture else [len(self.window_set)]
        return [float(n) / size for n, size in zip(counts, sizes)]

    def close(self):
        """Stops the prefetching thread."""
        close = getattr(self._iterator, "close", None)
        if close is not None:
            close()

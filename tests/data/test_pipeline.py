"""The running path: exact epochs, exact mixtures, exact resumption on any number of processes, and its speed."""
import json
import threading
import time

import numpy as np
import pytest

import effmodels.data
from effmodels.data import pipeline, storage
from effmodels.data.options import DataError
from tests.data.conftest import write_corpus


def take(iterator, n):
    return [next(iterator) for _ in range(n)]


def equal(a, b):
    return set(a) == set(b) and all(np.array_equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def joined(parts):
    return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}


def test_every_epoch_has_every_window_once_in_a_new_order(make):
    prepared = make(16)
    n = len(prepared.train)
    iterator = effmodels.data.batches(prepared, batch_size=n, seed=3)
    first, second = (b["window"] for b in take(iterator, 2))
    assert sorted(first) == sorted(second) == list(range(n)) and not np.array_equal(first, second)
    assert iterator.epochs() == [2.0]
    other, = take(effmodels.data.batches(prepared, batch_size=n, seed=4), 1)
    assert not np.array_equal(other["window"], second)  # a neighbouring seed is not the same run one epoch later


def test_validation_covers_every_window_once_and_pads_the_last_batch(make):
    prepared = make(16)
    n = len(prepared.validation)
    got = list(effmodels.data.batches(prepared, batch_size=4, seed=0, split="validation", repeat=False))
    windows = np.concatenate([b["window"] for b in got])
    assert windows[:n].tolist() == list(range(n)) and (windows[n:] == -1).all() and all(b["tokens"].shape == (4, 16) for b in got)
    last = {k: v[windows[-4:] == -1] for k, v in got[-1].items()}
    assert len(last["tokens"]) and not last["weights"].any() and not last["segment_ids"].any() and not last["target_bytes"].any()
    assert (last["tokens"] == prepared.tokenizer.pad_id).all() and (last["source_id"] == -1).all()


@pytest.mark.parametrize("threads", [0, 1])
def test_resuming_gives_bit_identical_global_batches_on_any_number_of_processes(make, threads):
    prepared = make(16, packing="best_fit")
    straight = take(effmodels.data.batches(prepared, batch_size=8, seed=1, threads=threads), 30)
    state = None
    got = []
    for count in (4, 2, 1, 8):  # the run is stopped and continued on another number of processes
        parts = [effmodels.data.batches(prepared, batch_size=8, seed=1, process_index=p, process_count=count, threads=threads)
                 for p in range(count)]
        for part in parts:
            if state is not None:
                part.restore(state)
        got += [joined([next(part) for part in parts]) for _ in range(7)]
        states = [part.state() for part in parts]
        assert all(s == states[0] for s in states)
        state = json.loads(json.dumps(states[0]))
        for part in parts:
            part.close()
    assert state["next_index"] == 28 and len(json.dumps(state)) < 200
    assert all(equal(a, b) for a, b in zip(straight, got))


def test_a_process_may_read_any_rows_of_a_batch(make):
    """On a pod, the rows of a host's chips are scattered over the batch."""
    prepared = make(16)
    whole = take(effmodels.data.batches(prepared, batch_size=8, seed=1), 3)
    for rows in ([1, 5, 6], [7], range(8)):
        mine = take(effmodels.data.batches(prepared, batch_size=8, seed=1, rows=rows), 3)
        assert all(equal(a, {k: v[list(rows)] for k, v in b.items()}) for a, b in zip(mine, whole))
    with pytest.raises(effmodels.data.DataError, match="must be numbers of rows of a batch of 8"):
        effmodels.data.batches(prepared, batch_size=8, seed=1, rows=[8])


def test_start_and_another_batch_size_continue_the_same_sequence_of_rows(make):
    prepared = make(16)
    rows = joined(take(effmodels.data.batches(prepared, batch_size=4, seed=0), 12))
    assert equal(next(effmodels.data.batches(prepared, batch_size=4, seed=0, start=5)), {k: v[20:24] for k, v in rows.items()})
    iterator = effmodels.data.batches(prepared, batch_size=4, seed=0)
    take(iterator, 3)
    larger = effmodels.data.batches(prepared, batch_size=6, seed=0)  # a batch-size ramp: no row is skipped or seen twice
    larger.restore(iterator.state())
    assert equal(next(larger), {k: v[12:18] for k, v in rows.items()}) and larger.state()["next_row"] == 18


def test_restore_refuses_another_seed_or_other_windows(make):
    state = effmodels.data.batches(make(16), batch_size=4, seed=0).state()
    with pytest.raises(DataError, match="belongs to another seed"):
        effmodels.data.batches(make(16), batch_size=4, seed=1).restore(state)
    with pytest.raises(DataError, match="belongs to another windows, split or mixture"):
        effmodels.data.batches(make(24), batch_size=4, seed=0).restore(state)


@pytest.fixture
def mixed(make, tmp_path):
    other = write_corpus(tmp_path / "other", (300, 400, 500))
    return make(16, mixture=({"weight": 0.7}, {"paths": (str(other),), "weight": 0.3}))


def test_mixture_has_exact_proportions_and_exact_epochs(mixed):
    sizes = mixed.train.sizes
    iterator = effmodels.data.batches(mixed, batch_size=10, seed=0)
    windows = np.stack([b["window"] for b in take(iterator, 100)])
    assert ((windows >= sizes[0]).sum(1) == 3).all()  # in every run of ten rows, not only on average
    for c, (low, high) in enumerate(((0, sizes[0]), (sizes[0], sum(sizes)))):
        of_corpus = windows.ravel()[(windows.ravel() >= low) & (windows.ravel() < high)]
        assert len(of_corpus) == (700, 300)[c] and iterator.epochs()[c] == pytest.approx(len(of_corpus) / sizes[c])
        for epoch in range(len(of_corpus) // sizes[c]):
            assert sorted(of_corpus[epoch * sizes[c]:(epoch + 1) * sizes[c]]) == list(range(low, high))


def test_mixture_traces_to_its_corpora_and_resumes(mixed, tmp_path):
    iterator = effmodels.data.batches(mixed, batch_size=10, seed=0)
    batch, after = take(iterator, 2)
    for r in range(10):
        folder = "other" if batch["window"][r] >= mixed.train.sizes[0] else "corpus"
        row = {k: v[r] for k, v in batch.items()}
        for s, (name, offset, size) in enumerate(effmodels.data.trace(row, mixed), start=1):
            path = tmp_path / folder / name
            text = (path if path.exists() else tmp_path.joinpath("/", name)).read_bytes()
            assert text[offset:offset + size] == mixed.tokenizer.decode_bytes(row["tokens"][row["segment_ids"] == s])
    again = effmodels.data.batches(mixed, batch_size=10, seed=0, start=1)
    assert equal(next(again), after)
    everything = np.concatenate([b["window"] for b in effmodels.data.batches(mixed, batch_size=10, seed=0, repeat=False)])
    assert sorted(everything[everything >= 0]) == list(range(len(mixed.train)))


def test_mixture_is_even_and_exact_in_closed_form():
    mixture = pipeline.Mixture((0.5, 0.3, 0.2))
    assert mixture.shares.tolist() == [5, 3, 2] and mixture.period == 10
    seen = np.zeros(3, int)
    for row in range(57):
        assert mixture.counts(row).tolist() == seen.tolist()
        c, occurrence = mixture[row]
        assert occurrence == seen[c]
        seen[c] += 1
        assert np.abs(seen - (row + 1) * mixture.shares / 10).max() < 1.5  # never far from the proportion
    assert mixture[10**15 + 3] == (mixture[3][0], 10**14 * mixture.shares[mixture[3][0]] + mixture[3][1])
    with pytest.raises(DataError, match="need a period of"):
        pipeline.Mixture((1 / 3, 1))


def test_faults(make, corpus_dir):
    prepared = make(16)
    for options, match in (
        ({"batch_size": 6, "process_count": 4}, "batch_size=6 must be a positive multiple of the 4 processes; nearest: 4"),
        ({"batch_size": 4, "process_index": 2, "process_count": 2}, "process_index=2 must be in"),
        ({"batch_size": 4, "split": "valid"}, "split='valid' is not a split; did you mean 'validation'"),
    ):
        with pytest.raises(DataError, match=match):
            effmodels.data.batches(prepared, **{"seed": 0, **options})
    with pytest.raises(DataError, match="no windows. Set config.data.holdout"):
        effmodels.data.batches(make(16, holdout=0.0), batch_size=4, seed=0, split="validation")


def test_second_process_waits_for_the_first(tmp_path):
    lines, inside = [], threading.Event()

    def first():
        with storage.lock(tmp_path, print):
            inside.set()
            time.sleep(0.2)

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait()
    with storage.lock(tmp_path, lines.append):
        assert not thread.is_alive() or lines
    thread.join()
    assert "waiting for another process" in lines[0]


def test_disk_to_batch_speed(tmp_path):
    """Measured 12 to 19 M byte-tokens/s (seq 512, batch 16, page cache warm); the bound leaves room for a busy machine."""
    folder = write_corpus(tmp_path / "corpus", (40_000,) * 20)
    prepared = effmodels.data.prepare({"paths": (str(folder),), "cache_dir": str(tmp_path / "cache")}, 512, log=lambda s: None)
    iterator = effmodels.data.batches(prepared, batch_size=16, seed=0, threads=0)
    take(iterator, 20)
    start = time.process_time()
    take(iterator, 150)
    rate = 150 * 16 * 512 / (time.process_time() - start)
    assert rate > 1.5e6, f"{rate / 1e6:.2f} M tokens per CPU-second"

"""Which rows of a batch a process reads, where its devices are scattered over the mesh."""
import collections

import jax
import numpy as np
import pytest

from effmodels.train import setup as setups
from tests.configs.catalogue import load

Device = collections.namedtuple("Device", "id process_index")


class Scattered:
    """A sharding in which device d, of process d % 2, holds row d of 8; `together` gives every row to both processes."""

    def __init__(self, together=False):
        self.together = together

    def devices_indices_map(self, shape):
        rows = {d: d // 2 if self.together else d for d in range(8)}
        return {Device(d, d % 2): (slice(r, r + 1), slice(None)) for d, r in rows.items()}


@pytest.fixture
def run():
    config = load("quickstart", "test")
    config.batch_size = config.train.micro_batch_size = 8
    return setups.Setup(config, lambda *_: None, jax.devices()[:8])


def test_scattered_rows_are_read_and_counted_once(run, monkeypatch):
    monkeypatch.setattr(run, "_batch_sharding", lambda stacked: Scattered())
    rows, owned = run._rows_of_this_process()
    assert rows.tolist() == [0, 2, 4, 6] and owned.all()
    monkeypatch.setattr(setups.jax, "process_index", lambda: 1)
    assert run._rows_of_this_process()[0].tolist() == [1, 3, 5, 7]


def test_a_row_that_two_processes_hold_is_counted_by_the_first(run, monkeypatch):
    monkeypatch.setattr(run, "_batch_sharding", lambda stacked: Scattered(together=True))
    rows, owned = run._rows_of_this_process()
    assert rows.tolist() == [0, 1, 2, 3] and owned.all()
    monkeypatch.setattr(setups.jax, "process_index", lambda: 1)
    rows, owned = run._rows_of_this_process()
    assert rows.tolist() == [0, 1, 2, 3] and not owned.any()


def test_the_rows_that_were_read_land_where_they_belong(run):
    batch = {k: np.arange(8 * 64).reshape(8, 64) for k in setups.DEVICE_KEYS}
    for k, a in run.put(batch).items():
        assert np.array_equal(np.asarray(a), batch[k].astype(a.dtype)), k


def test_how_full_the_buffers_of_an_exchange_are():
    """Room for twice the mean is half full with even loads; where no token travels there is nothing to fill."""
    config = load("moe_1b", "small")
    config.mesh.expert, config.parallel.recv_bound = 2, 2.0
    bounded = setups.Setup(config, lambda *_: None, jax.devices()[:8])
    assert bounded.filled() == (0.5, 0.5) and any("even loads" in line for line in bounded.spread())
    assert setups.Setup(load("moe_1b", "small"), lambda *_: None, jax.devices()[:8]).filled() == (1.0, 1.0)
    config.model.channels.moe.top_k, config.parallel.recv_bound = 4, None  # both shards hold choices of nearly every token, once each
    assert setups.Setup(config, lambda *_: None, jax.devices()[:8]).filled() == (0.5, 1.0)

"""Where tokens lie on a split sequence, and what that costs: the closed forms against counting every pair."""
import numpy as np
import pytest

from effmodels.config import ConfigError
from effmodels.parallel import layouts
from effmodels.parallel.options import LAYOUTS
from pallas_kernels.flash_attention import ranges
from pallas_kernels.flash_attention.mask import Index, Spec

BALANCED = {"contiguous": 8 / 15, "zigzag": 1.0, "striped": 0.998}


def counted(layout, T, n, window):
    """visible_pairs by looking at every pair."""
    place = layouts.order(layout, T, n).reshape(n, -1)
    gap = place[:, None, :, None] - place[None, :, None, :]
    return ((gap >= 0) & (True if window is None else gap <= window)).sum((2, 3))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_token_has_one_slot_and_comes_back(layout):
    T, n = 24, 4
    order = layouts.order(layout, T, n)
    assert sorted(order) == list(range(T)) and order.dtype == np.int32
    x = np.random.default_rng(0).normal(size=(2, T, 3))
    np.testing.assert_array_equal(layouts.to_layout(x, layout, n), x[:, order])
    np.testing.assert_array_equal(layouts.from_layout(layouts.to_layout(x, layout, n), layout, n), x)
    np.testing.assert_array_equal(layouts.from_layout(layouts.to_layout(x[0], layout, n, axis=0), layout, n, axis=0), x[0])


def test_the_parts_of_each_layout():
    assert layouts.order("contiguous", 8, 2).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert layouts.order("zigzag", 8, 2).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    assert layouts.order("striped", 8, 2).tolist() == [0, 2, 4, 6, 1, 3, 5, 7]


@pytest.mark.parametrize("n", [1, 2, 3, 8])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pairs_and_shifts_as_counted(layout, n):
    for T, window in ((6 * n, None), (6 * n, 0), (6 * n, 2), (6 * n, 7), (2 * n, 3)):
        want = counted(layout, T, n, window)
        np.testing.assert_array_equal(layouts.visible_pairs(layout, T, n, window), want)
        met = [s for s in range(n) if s == 0 or any(want[d, (d - s) % n] for d in range(n))]
        assert list(layouts.shifts(layout, T, n, window)) == met


def test_a_window_visits_neighbours_only():
    T, n = 8 * 16, 8
    assert layouts.shifts("contiguous", T, n, 16) == (0, 1)
    assert layouts.shifts("contiguous", T, n, 17) == (0, 1, 2)
    assert layouts.shifts("zigzag", T, n, 8) == (0, 1, 7)
    assert layouts.shifts("striped", T, n, 8) == tuple(range(8))


@pytest.mark.parametrize("n", [2, 4, 8])
def test_the_critical_path_of_a_causal_ring(n):
    """In units of c^2 pairs: contiguous n - 1/2, zigzag n / 2, for large c; speed-up 2 - 1 / n."""
    T = 512 * n
    contiguous, zigzag = (layouts.critical_path(name, T, n) for name in ("contiguous", "zigzag"))
    assert contiguous == pytest.approx(n - 0.5, rel=2e-3) and zigzag == pytest.approx(n / 2, rel=2e-3)
    assert contiguous / zigzag == pytest.approx(2 - 1 / n, rel=2e-3)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("n", [2, 4])
def test_the_kernel_visits_no_more_than_the_critical_path(n, layout):
    """Tiles that the kernel steps through, from its own tables: at every step of the ring the shard with most of them."""
    c, block = 256, 16
    place = layouts.order(layout, n * c, n).reshape(n, 1, c)
    spec = Spec(True, None, 0, None, 1.0)

    def tiles(d, s):
        index = Index(q_position_BT=place[d], kv_position_BS=place[s])
        _, tables = ranges.make(index, c, c, spec, block, block)
        return np.asarray(tables.rows).reshape(-1, 2)[:, 0].sum() * block**2 / c**2

    visited = sum(max(tiles(d, (d - s) % n) for d in range(n)) for s in range(n))
    exact = n - 0.5 if layout == "contiguous" else n / 2
    assert exact <= visited <= exact + 1.5 * block / c  # the tiles on the diagonal of the first step, half of them masked


def test_balance():
    for layout, want in BALANCED.items():
        assert layouts.balance(layout, 8 * 512, 8) == pytest.approx(want, abs=3e-3)
    # A window prefers the layout whose neighbours in the row are neighbours on the ring: here one of as many keys as a shard has.
    assert layouts.balance("contiguous", 8 * 512, 8, 512) == pytest.approx(15 / 16, abs=3e-3)
    assert layouts.balance("zigzag", 8 * 512, 8, 512) == pytest.approx(5 / 8, abs=3e-3)


def test_the_choice():
    T = [1024, 4096]
    assert layouts.choose([None], T, 8) == "zigzag"
    assert layouts.choose([255] * 3, T, 8) == "contiguous"
    assert layouts.choose([None] + [255] * 3, T, 8) == "zigzag"
    assert layouts.choose([], T, 8) == layouts.choose([None], T, 1) == "contiguous"
    assert layouts.choose([None], [8 * 3, 4096], 8) == "contiguous", "a row that 16 parts do not divide"
    assert layouts.choose([None], T, 8, allowed=("contiguous",)) == "contiguous"


def test_a_row_that_cannot_be_split_says_what_can():
    with pytest.raises(ConfigError, match=r"zigzag.*row of 20 tokens cannot be split into 8 equal parts for 4 devices; nearest: 16 or 24"):
        layouts.order("zigzag", 20, 4)
    with pytest.raises(ConfigError, match=r"striped.*row of 3 tokens.*nearest: 4\."):
        layouts.order("striped", 3, 4)

"""Transfers that share links: ends computed by hand, packets taking turns, and no work lost or made."""
import numpy as np
import pytest

from effmodels.plan.compiled.links import Links, fair_rates

X, Y, BOTH = {"x+"}, {"y+"}, {"x+", "y+"}


def ends(*starts):
    """When each of [(seconds of the start, seconds alone, links)], in order of start, has ended."""
    net, found = Links(), []
    for begun, seconds, links in starts:
        net.advance(begun)
        found.append(net.start(seconds, links))
    for transfer in found:
        net.finish(transfer)
    return [t.ended for t in found]


@pytest.mark.parametrize(
    "starts, want",
    [
        ([(0, 2, X), (0, 2, X)], [4, 4]),
        ([(0, 12, X), (1, 0.04, X)], [12.04, 1.08]),  # the short one at half its speed, and not after the long one
        ([(0, 1, X), (0, 3, X)], [2, 4]),  # 1 left when the other has ended
        # Alone for 1 s; 1 s in two; then 1.5, 1.5 and 1 s in three until t=5; 0.5 each in two.
        ([(0, 3, X), (1, 2, X), (2, 1, X)], [6, 6, 5]),
        ([(0, 2, X), (0, 2, Y), (1, 3, {"z-"})], [2, 2, 4]),  # disjoint: as alone
        ([(0, 2, X), (5, 2, X)], [2, 7]),  # one after the other
        # y is in three until t=6, in which x gives 2/3 to the first: it ends at 3, and x is then for the second alone, which y holds back.
        ([(0, 2, X), (0, 2, BOTH), (0, 2, Y), (0, 2, Y)], [3, 6, 6, 6]),
        ([(0, 0, set()), (0, 1, X)], [0, 1]),  # a group of one sends nothing
    ],
)
def test_ends_by_hand(starts, want):
    assert ends(*starts) == pytest.approx(want)


def test_what_is_waited_for_is_what_is_left():
    net = Links()
    long, short = net.start(4, X), net.start(1, X)
    net.advance(1)
    assert net.finish(short) == pytest.approx(1) and short.flight == pytest.approx(2)
    assert net.finish(long) == pytest.approx(3) and long.flight == pytest.approx(5) and net.finish(long) == 0


def test_fair_sharing_is_packets_taking_turns():
    """Rounds of one packet for each transfer in flight on one link: five transfers, ends differ by less than a round for each."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        begun, packets = np.sort(rng.integers(0, 1200, 5)), rng.integers(20, 1000, 5)
        left, done, time = packets.copy(), np.zeros(5), 0
        while left.any():
            flying = [i for i in range(5) if left[i] and begun[i] <= time]
            for i in flying:
                left[i], time = left[i] - 1, time + 1
                done[i] = done[i] if left[i] else time
            time += not flying
        assert ends(*((int(b), int(n), X) for b, n in zip(begun, packets))) == pytest.approx(done, abs=25)


def test_no_work_is_lost_or_made():
    """Busy time never exceeds the sum, no link is faster than itself, nothing is faster than alone, and somebody's link is always full."""
    rng = np.random.default_rng(1)
    names = np.array(["x+", "x-", "y+", "y-"])
    for _ in range(50):
        starts = [(0, float(rng.uniform(0.1, 3)), set(rng.choice(names, rng.integers(1, 4), replace=False).tolist())) for _ in range(6)]
        links = [s[2] for s in starts]
        rates, found = fair_rates(links), ends(*starts)
        load = {name: sum(r for r, of in zip(rates, links) if name in of) for name in names}
        assert max(load.values()) <= 1 + 1e-9
        assert all(max(load[name] for name in of) == pytest.approx(1) for of in links)
        assert max(found) <= sum(s[1] for s in starts) * (1 + 1e-9)
        assert all(end >= s[1] * (1 - 1e-9) for end, s in zip(found, starts))
        for name in names:
            users = [i for i, of in enumerate(links) if name in of]
            assert max([found[i] for i in users], default=0) >= sum(starts[i][1] for i in users) * (1 - 1e-9)

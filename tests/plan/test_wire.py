"""Seconds on the wires against counts by hand: rings, lines, shared links, several dims, routes of permutes, networks between slices."""
import itertools

import pytest

from effmodels.plan import chips
from effmodels.plan.compiled.collectives import Collective
from effmodels.plan.compiled.wire import DCN_SECONDS, HOP_SECONDS, Wires
from tests.plan.programs import ICI, torus

V4, SIZE = chips.get("v4"), 360_000_000


def collective(kind, groups, lanes=0):
    return Collective(kind, "c", (), len(groups[0]), SIZE, 1, None, tuple(map(tuple, groups)), lanes)


def bandwidth_seconds(mesh, kind, groups, lanes=0, chip=V4, hops=0):
    return Wires(mesh, chip).time(collective(kind, groups, lanes)).seconds - hops * HOP_SECONDS


CUBE = torus(4, 4, 4, n=64)
Z_RING, PLANE, STRIDED = [0, 1, 2, 3], list(range(16)), [0, 2]


@pytest.mark.parametrize("name, mesh, group, lanes, links, hops", [
    ("a whole dim that closes", CUBE, Z_RING, 0, 2, 2),
    ("two whole dims", CUBE, PLANE, 0, 4, 4),
    ("the compiler drives fewer", CUBE, PLANE, 2, 2, 4),
    ("the compiler names more than there are", torus(2, 2, n=4), [0, 1, 2, 3], 4, 2, 2),
    ("a line: no wrap on eight chips", torus(2, 2, 2, n=8), [0, 1], 0, 1, 1),
    ("a part of a ring", torus(4, 4, 8, n=128), [0, 1, 2, 3], 0, 1, 3),
    ("every second chip shares its links", CUBE, STRIDED, 0, 1, 2),
])  # fmt: skip
def test_gathers_and_reductions(name, mesh, group, lanes, links, hops):
    n = len(group)
    for kind, times in (("all-gather", 1), ("reduce-scatter", 1), ("all-reduce", 2)):
        got = bandwidth_seconds(mesh, kind, [group], lanes, hops=times * hops)
        assert got == pytest.approx(times * SIZE * (n - 1) / n / (links * ICI)), kind


def loads(n, ring):
    """Busiest directed link of an all-to-all along n chips, in parts of what one chip holds, every message by its shorter way."""
    load = {}
    for a, b in itertools.permutations(range(n), 2):
        gap = b - a
        if ring and abs(gap) * 2 > n:
            gap -= n if gap > 0 else -n
        ways = [(gap, 1.0)] if not ring or abs(gap) * 2 != n else [(gap, 0.5), (-gap, 0.5)]
        for distance, share in ways:
            step = 1 if distance > 0 else -1
            for k in range(abs(distance)):
                link = (a + k * step) % n, step
                load[link] = load.get(link, 0.0) + share / n
    return max(load.values())


@pytest.mark.parametrize("n, ring", [(4, True), (8, True), (16, True), (4, False), (8, False)])
def test_all_to_all_against_counted_links(n, ring):
    mesh = torus(4, 4, n, n=16 * n) if ring else torus(1, 2, n, n=2 * n)
    hops = n // 2 if ring else n - 1
    assert bandwidth_seconds(mesh, "all-to-all", [range(n)], hops=hops) == pytest.approx(SIZE * loads(n, ring) / ICI)


@pytest.mark.parametrize("pairs, links, hops", [
    ([(0, 1), (1, 2), (2, 3), (3, 0)], 1, 1),  # round a ring that closes
    ([(0, 2), (1, 3), (2, 0), (3, 1)], 2, 2),  # two hops: two messages on a link
    ([(0, 16)], 1, 1),
    ([(0, 21)], 1, 3),  # one hop in each dim
])  # fmt: skip
def test_permutes_follow_their_routes(pairs, links, hops):
    assert bandwidth_seconds(CUBE, "collective-permute", pairs, hops=hops) == pytest.approx(links * SIZE / ICI)


def test_a_ring_on_a_line_comes_back_the_long_way_in_the_other_direction():
    time = Wires(torus(1, 1, 4, n=4), V4).time(collective("collective-permute", [(0, 1), (1, 2), (2, 3), (3, 0)]))
    assert time.seconds == pytest.approx(SIZE / ICI + 3 * HOP_SECONDS) and time.links == {"z+", "z-"}


def test_between_slices():
    """Eight chips in two slices reduce together: rings of four inside, then each its quarter through its share of the host's network."""
    mesh = torus(2, 2, slices=2, data=2, fsdp=4)
    time = Wires(mesh, V4).time(collective("all-reduce", [range(8)]))
    inside, between = 2 * SIZE * 3 / 4 / (2 * ICI) + 4 * HOP_SECONDS, SIZE / 4 * 2 / 2 / (25e9 / 4) + DCN_SECONDS
    assert time.seconds == pytest.approx(inside + between) and "dcn" in time.links
    one_each = Wires(mesh, V4).time(collective("all-gather", [(0, 4)]))
    assert one_each.seconds == pytest.approx(SIZE / 2 / (25e9 / 4) + DCN_SECONDS) and one_each.links == {"dcn"}


def test_groups_of_one_are_free_and_two_dimensional_pods_close_at_sixteen():
    assert Wires(CUBE, V4).time(collective("all-gather", [[0], [1]])).seconds == 0
    v5e = chips.get("v5e")
    small, large = (bandwidth_seconds(torus(n, n, n=n * n), "all-gather", [range(n)], chip=v5e, hops=h) for n, h in ((8, 7), (16, 8)))
    assert small == pytest.approx(SIZE * 7 / 8 / ICI) and large == pytest.approx(SIZE * 15 / 16 / (2 * ICI))

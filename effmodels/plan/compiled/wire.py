"""How long a collective takes on the wires: bandwidth of the links that its groups span, and a latency per hop.

Assumptions, none of them measured here. Links of a chip work in both directions and in all dims of the torus at once, each at `Chip.ici`. A
group that spans a whole dim with a wrap is a ring of two directions; one without, or a contiguous part of a dim, is a line, whose ends have
one direction to send in; members that are s chips apart share their links with s - 1 other groups. The compiler's own strategy (`lanes`)
bounds the directions from above. Between slices all chips of a host share its network, and only what has left the slice is counted.
A hop takes HOP_SECONDS, an operation between slices DCN_SECONDS.
"""
import dataclasses
import math

import numpy as np

HOP_SECONDS = 1e-6  # "How to Scale Your Model" (Google DeepMind, 2025), TPU chapter: about 1 us a hop
DCN_SECONDS = 5e-5


@dataclasses.dataclass(frozen=True)
class Time:
    """Seconds of one run, and which physical links it keeps busy meanwhile: names such as "x+", "y-", "dcn"."""

    seconds: float
    links: frozenset


@dataclasses.dataclass(frozen=True)
class _Dim:
    """One dim of the torus as a group sees it: members along it, whether they close a ring, chips from one to the next."""

    name: str
    members: int
    ring: bool
    step: int

    @property
    def rate(self):
        """Links of one direction that each member may call its own."""
        return (2.0 if self.ring else 1.0) / self.step

    @property
    def hops(self):
        return self.members * self.step // 2 if self.ring else (self.members - 1) * self.step


class Wires:
    """The wires of a mesh of `chips.Chip`s. wrap: for each dim of the torus whether it closes; None: as the chip's pods are built."""

    def __init__(self, mesh, chip, wrap=None):
        self.chip, devices = chip, mesh.devices.ravel()
        placed = chip.platform == "tpu" and all(hasattr(d, "coords") for d in devices)
        self.coords = np.array([d.coords for d in devices])[:, : chip.torus_dims] if placed else None
        self.slices = np.array([getattr(d, "slice_index", 0) or 0 for d in devices])
        self.extent = self.coords.max(0) - self.coords.min(0) + 1 if placed else None
        self.wrap = wrap if wrap is not None or not placed else _wraps(chip, self.extent)
        self.times = {}

    def time(self, collective) -> Time:
        """The Time of a `collectives.Collective`."""
        key = collective.kind, collective.groups, collective.size, collective.lanes
        if key not in self.times:
            self.times[key] = self._permute(collective) if collective.kind == "collective-permute" else self._grouped(collective)
        return self.times[key]

    def _grouped(self, c):
        if not c.groups:  # what the program itself hands to the network between slices
            return Time(c.sent / (self.chip.dcn / self.chip.per_host) + DCN_SECONDS, frozenset({"dcn"}))
        groups = [g for g in c.groups if len(g) > 1]
        if not groups:
            return Time(0.0, frozenset())
        group = np.array(groups[0])
        across = len(set(self.slices[group].tolist()))
        inside = group[self.slices[group] == self.slices[group[0]]]
        seconds, links = 0.0, set()
        if len(inside) > 1:
            seconds, links = self._on_ici(c, inside)
        if across > 1:
            # In two levels: a chip sends the share that its slice does not hold, through its part of the host's network.
            share = c.size / len(inside) * (across - 1) / across * (2 if c.kind == "all-reduce" else 1)
            seconds += share / (self.chip.dcn / self.chip.per_host) + DCN_SECONDS
            links.add("dcn")
        return Time(seconds, frozenset(links))

    def _on_ici(self, c, group):
        dims = self._dims(group)
        n, size, ici = len(group), c.size, self.chip.ici
        links = {f"{d.name}{way}" for d in dims for way in "+-"}
        latency = HOP_SECONDS * sum(d.hops for d in dims) * (2 if c.kind == "all-reduce" else 1)
        if c.kind in ("all-to-all", "ragged-all-to-all"):
            # Messages go 1/4 of a ring on average, over its two directions; of a line half of it crosses the middle.
            return latency + max(size * d.members * d.step / (8 if d.ring else 4) for d in dims) / ici, links
        sent = size * (n - 1) / n * (2 if c.kind == "all-reduce" else 1)
        rate = sum(d.rate for d in dims)
        return latency + sent / (min(rate, c.lanes or rate) * ici), links

    def _dims(self, group):
        if self.coords is None:  # nothing is known of the wires: a ring of its own
            return [_Dim("axis", len(group), True, 1)]
        dims = []
        for name, column, extent, wraps in zip("xyz", self.coords[group].T, self.extent, self.wrap):
            places = np.unique(column)
            if len(places) > 1:
                step = int(np.diff(places).min())
                dims.append(_Dim(name, len(places), bool(wraps) and len(places) * step == extent, step))
        # Devices of one chip differ in no dim: what is between them is taken to be as fast as all links of the chip.
        return dims or [_Dim("chip", len(group), True, 1)] * self.chip.torus_dims

    def _permute(self, c):
        """Every pair sends `size` bytes at once, dim after dim, the shorter way round; the busiest link decides."""
        if self.coords is None:
            return Time(c.size / self.chip.ici + HOP_SECONDS, frozenset({"axis+"}))
        load, most, dcn = {}, 0, {}
        for source, target in c.groups:
            if self.slices[source] != self.slices[target]:
                dcn[source // self.chip.per_host] = dcn.get(source // self.chip.per_host, 0) + 1
                continue
            route = list(self._route(source, target))
            most = max(most, len(route))
            for link in route:
                load[link] = load.get(link, 0) + 1
        links = {name + way for _, _, name, way in load} | ({"dcn"} if dcn else set())
        busiest = c.size * max(load.values(), default=0) / self.chip.ici
        between = c.size * max(dcn.values()) / self.chip.dcn + DCN_SECONDS if dcn else 0.0
        return Time(max(busiest, between) + HOP_SECONDS * most, frozenset(links))

    def _route(self, source, target):
        at = self.coords[source].copy()
        for d, name in enumerate("xyz"[: len(at)]):
            gap, extent = int(self.coords[target][d] - at[d]), int(self.extent[d])
            if self.wrap[d] and abs(gap) * 2 > extent:
                gap -= int(math.copysign(extent, gap))
            for _ in range(abs(gap)):
                yield int(self.slices[source]), tuple(at.tolist()), name, "+" if gap > 0 else "-"
                at[d] = (at[d] + (1 if gap > 0 else -1)) % extent if self.wrap[d] else at[d] + (1 if gap > 0 else -1)


def _wraps(chip, extent):
    """Slices of cubes of 4 x 4 x 4 close in every dim, smaller ones in none; the two-dimensional pods close at 16 chips."""
    if chip.torus_dims == 3:
        return [all(n % 4 == 0 for n in extent)] * 3
    return [n == 16 for n in extent]

"""Which links of the torus a collective over some mesh axes has, without devices: an assumption about where `mesh` will put them."""
import itertools
import math

# Link directions that the sums of programs for TPU v4 drive at once (`collectives.Collective.lanes`): in one or two dims of the torus two,
# in three dims of equal size all six, else three.
SUMS = ("reduce-scatter", "all-reduce")
FEW, UNEQUAL = 2, 3


def bandwidth(names, run, collective):
    """Bytes/s that a chip of an `abstract.Run` sends over these mesh axes: on the links of its torus, or on the network between slices."""
    place, chip = run.topology, run.topology.chip
    if place.slices > 1 and set(names) & {"data", "stage"}:
        return chip.dcn / chip.per_host
    if chip.platform != "tpu":
        return chip.ici
    number = run.size(names)
    ways = links(number, place)
    if collective in SUMS and number > chip.devices_per_chip:
        ways = min(ways, FEW if dims(number, place) < 3 else ways if len(set(place.shape)) == 1 else UNEQUAL)
    return chip.ici * ways


def dims(number, topology):
    """Over how many dims of the torus `number` devices of a slice lie; 0 for those of one chip."""
    whole, rest = _box(number // topology.chip.devices_per_chip, topology)
    return len(whole) + rest


def links(number, topology):
    """Links on which each of `number` devices of a slice sends to the others: two in a ring, one in a line, as `wire` counts them."""
    inside = topology.chip.devices_per_chip
    if number <= inside:  # devices of one chip: as fast as all its links
        return 2 * topology.chip.torus_dims
    whole, rest = _box(number // inside, topology)
    return max(1, sum(ways for _, ways in whole) + rest)


def rings(number, topology):
    """Sizes of the rings that `number` devices make, as `parallel.torus` finds them on a mesh: one per dim of the torus."""
    if topology.platform != "tpu":
        return (number,)
    whole, _ = _box(number // topology.chip.devices_per_chip, topology)
    rest = number // math.prod(n for n, _ in whole)
    return tuple(n for n in (*(n for n, _ in whole), rest) if n > 1)


def _box(number, topology):
    """(dims that are filled, as (size, ways), whether part of another is): as many whole dims as they can, side by side in the next."""
    found = [(n, 1 + wraps) for n, wraps in zip(topology.shape, topology.wrap) if n > 1]
    boxes = [box for count in range(len(found) + 1) for box in itertools.combinations(found, count)]
    fits = [box for box in boxes if number % math.prod(n for n, _ in box) == 0]
    whole = max(fits, key=lambda box: (math.prod(n for n, _ in box), len(box)))
    return whole, number > math.prod(n for n, _ in whole) and len(whole) < len(found)

"""How much of each unit's issue slots the bundles that ran have used."""
from collections.abc import Sequence

from effmodels.plan.schedule.bundles import Slots


def slot_shares(slots: Slots, executed: Sequence[int], first: int = 0, last: int | None = None) -> dict[str, float]:
    """Of each unit's issue slots in the bundles that ran, the share in use (0 to 1)."""
    span = range(first, len(executed) if last is None else last)
    total = sum(executed[i] for i in span)
    used = slots_used(slots, executed, first, last)
    return {name: used[name] / (capacity * total) if total else 0.0 for name, capacity in zip(slots.names, slots.capacity)}


def slots_used(slots: Slots, executed: Sequence[int], first: int = 0, last: int | None = None) -> dict[str, int]:
    """How many slots of each unit were issued."""
    span = [i for i in range(first, len(executed) if last is None else last) if executed[i]]
    return {name: sum(slots.used[i][column] * executed[i] for i in span) for column, name in enumerate(slots.names)}


def hottest(executed: Sequence[int]) -> tuple[int, int]:
    """(first, last + 1) of the stretch of bundles, all run equally often, that takes most of the time."""
    best, start = (0, 0, 0), 0
    for index in range(1, len(executed) + 1):
        if index == len(executed) or executed[index] != executed[start]:
            best = max(best, ((index - start) * executed[start], -start, -index))
            start = index
    return -best[1], -best[2]

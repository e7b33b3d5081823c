"""Which results are worth keeping for the backward pass (remat="save:..."): work saved for their bytes, by the traced layers."""
import math
from time import monotonic

from effmodels.config import OFFLOAD, REMAT, SAVE, SAVEABLE
from effmodels.plan.formulas import liveness

USUAL = (("kernel",), ("kernel", "heads", "kv_heads", "embed"))  # what kernels return; all but the products inside MLPs


def policies(resolved, groups, time, chip, until=math.inf):
    """Recomputation policies to try: the plain ones, USUAL, and of the names that save work the cheapest, the two cheapest, and so on.

    groups: [(LayerKinds of a period, repeats)] of a resolved model; time: tokens of one row on one `chips.Chip`. until: of the monotonic
    clock, when no further name is traced.
    """

    def work_and_bytes(remat):
        """FLOPs of the backward pass and bytes that wait for it, of one row through all layers."""
        periods = [(liveness.period(resolved, kinds, remat, time, chip), repeats) for kinds, repeats in groups]
        kept = (sum(math.prod(a.shape) * a.itemsize for a in p.kept if not a.host) * repeats for p, repeats in periods)
        return sum(p.flops[1] * repeats for p, repeats in periods), sum(kept)

    (most, least), worth = work_and_bytes("full"), {}
    for name in SAVEABLE:
        if monotonic() > until:
            break
        work, kept = work_and_bytes(SAVE + name)
        if work < most:
            worth[name] = (most - work) / max(1, kept - least)
    ranked = sorted(worth, key=worth.get, reverse=True)
    # Rows that reached their experts save no work, but their way.
    travelled = [(*names, "dispatch") for names in (("embed",), USUAL[1])] if _has_experts(groups) else ()
    lists = [sorted(names, key=SAVEABLE.index) for names in (*USUAL, *(ranked[: k + 1] for k in range(len(ranked))), *travelled)]
    # What kernels return is the dearest to make and stays; the rest of the longest lists may wait in the host's memory.
    to_host = [[name for name in names if name != "kernel"] for names in (lists[1], lists[len(USUAL) + len(ranked) - 1])]
    offloaded = [f"{SAVE}kernel+{OFFLOAD}{','.join(names)}" for names in to_host if names]
    return tuple(dict.fromkeys((*REMAT, *(SAVE + ",".join(names) for names in lists), *offloaded)))


def _has_experts(groups):
    return any(kind.channel.cls.reports_load for kinds, _ in groups for kind in kinds)

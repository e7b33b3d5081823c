"""How a retention is shared out over a Hopper GPU.

A computing warpgroup owns one head of one row of the batch and 64 columns of its value dim. A block has W of them, which share the tiles of
x and y when they own columns of one head (heads = 1), or own a head each (heads = W). A sequence may be cut into slices of time.
"""
from typing import NamedTuple

from pallas_kernels import gpu

C = 64  # tokens of a chunk: one wgmma tile of scores, 32 registers of a thread
TILE = 64  # columns of z of one warpgroup
TABLE_ROWS = 5
MULTIPROCESSORS = 132  # of an H100 or H200 SXM; only the speed depends on it
# Cycles of a chunk when one or two warpgroups share a multiprocessor, and of a chunk's state alone: from the instruction counts of
# the compiled kernel (H = P = 128: 640 a warp, 28 wgmma of 32 cycles), not measured.
_CYCLES, _STATE_CYCLES = {1: 1500, 2: 2400}, {1: 600, 2: 900}


class Plan(NamedTuple):
    warpgroups: int
    heads: int  # of a block
    stages: int  # slots of the ring
    slices: int  # of time


def plan(B, T, N, H, P, joined=False):
    """The Plan of the least estimated time. H and P are multiples of 64, at most 256; `joined` as in `gpu_scan.scan`."""
    options = [(w, heads, stages) for w, heads in ((2, 1), (2, 2), (1, 1)) if (stages := _stages(w, heads, N, H, P, joined)) >= 1]
    if any(stages >= 2 for _, _, stages in options):
        options = [option for option in options if option[2] >= 2]
    chunks = -(-T // C)
    best = None
    for w, heads, stages in options:
        blocks = B * N * (P // TILE) // w
        for slices in _slices(T):
            waves = -(-blocks * slices // MULTIPROCESSORS)
            cycles = waves * chunks // slices * (_CYCLES[w] + (_STATE_CYCLES[w] if slices > 1 else 0))
            if best is None or cycles < best[0]:
                best = cycles, Plan(w, heads, stages, slices)
    return best[1]


def _slices(T):
    """Into how many equal slices of at least 8 whole chunks T may be cut."""
    return [1] + [s for s in range(2, T // (8 * C) + 1) if T % (s * C) == 0]


def _stages(w, heads, N, H, P, joined):
    """Ring slots that fit in shared memory beside each warpgroup's rounded state, weighted z and out; 0 if the shape cannot be cut so."""
    if H > 128 and w > 1:  # the state alone fills 96 registers or more of a thread: two such warpgroups spill
        return 0
    if (N % heads if heads > 1 else (P // TILE) % w):
        return 0
    slot = heads * (2 * 2 * C * H + 2048) + w * 2 * TILE * (C + joined * (C + H))  # x, y, the table; z
    fixed = w * (2 * H * TILE + 2 * 2 * C * TILE) + 2048
    return min(4, (gpu.SMEM - fixed) // slot)

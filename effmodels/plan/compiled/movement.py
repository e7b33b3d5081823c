"""How long an instruction takes that multiplies no matrices: copies, element-wise fusions, changes of layout, gathers, sorts.

XLA's cost model is too high for them, and says nothing of gathers, slices, reshapes and sorts. The factors below are ratios of sums over
the 1,100 such instructions of a train step of two layers (retention, attention, both with experts; v4:2x2x1, libtpu 0.0.42.1), whose
bundles were simulated: what has an estimate took 0.44 of it; of those without one, changes of layout took 2.3 times what their arrays
take at the bandwidth of HBM, gathers of rows 2.4 times what their result takes, sorts 22 times, gathers of elements 12 cycles each,
scatters 4.3. Single instructions are off by a factor of two either way.
"""
import math
import re

from effmodels.plan import hlo

SHARE = 0.5  # of XLA's estimate: the ratio above and some percent, since simulated schedules are 5 to 16 % below timings
RELAYOUT, SORT = 2.5, 22.0  # times of arrays through HBM
GATHER, SCATTER = 12.0, 4.3  # cycles per element moved alone
LEAST = 700  # cycles: one copy to the core and back


def cycle(chip) -> float:
    """Seconds; of a nominal gigahertz where the chip has no clock in the table."""
    return 1e-6 / (chip.clock_mhz or 1000.0)


def seconds(instruction, traffic, chip) -> float:
    """Seconds of one run on a `chips.Chip`, of what is no TPU by its bandwidth alone; traffic: the `traffic.Traffic` of its module."""
    if chip.platform != "tpu":
        return traffic.touched(instruction) / chip.bandwidth
    least, floor = LEAST * cycle(chip), traffic.bytes(instruction) / chip.bandwidth
    if instruction.estimated_cycles:
        return max(floor, least, SHARE * instruction.estimated_cycles * cycle(chip))
    if instruction.opcode == "sort":
        return max(least, SORT * traffic.touched(instruction) / chip.bandwidth)
    body = list(traffic.leaves(instruction))
    gathers = any(i.opcode == "gather" for i in body)
    moved = traffic.result(instruction) if gathers else traffic.touched(instruction)
    return max(least, floor, RELAYOUT * moved / chip.bandwidth, _elements(body, traffic) * cycle(chip))


def _elements(body, traffic):
    """Cycles of what moves element by element."""
    total = 0.0
    for i in body:
        if i.opcode == "gather" and math.prod(_numbers(i, "slice_sizes")) == 1:
            total += GATHER * math.prod(hlo.shape(i.type)[1])
        elif i.opcode == "scatter":
            sizes = hlo.shape(traffic.type_of(i.operands[-1]))[1]
            window = math.prod(sizes[n] for n in _numbers(i, "update_window_dims"))  # a row is moved as a whole
            total += SCATTER * math.prod(sizes) / window
    return total


def _numbers(instruction, attribute):
    found = re.search(rf"{attribute}=\{{([\d,]*)\}}", instruction.attributes)
    return [int(n) for n in found.group(1).split(",") if n] if found else []

"""How long a Pallas kernel takes where the compiler's schedule does not tell: its cost estimate at the efficiency of its schedule on a v4.

A kernel's FLOPs are those of its `pl.CostEstimate`, heads in whole lanes, static masks applied; packed documents count as one causal
document per row, since how they lie is known at run time only: an upper bound. EFFICIENCY is FLOPs / (peak x schedule), from the rows of
docs/benchmarks/v4_schedule.json, the mean over the shapes there (tests/plan/test_kernel_time.py computes it again). Attention is slower
the fewer keys a query sees: peak x schedule / FLOPs = ATTENTION[0] + ATTENTION[1] / keys, through the schedules of calls with segment ids
of 2,048 and 4,096 tokens. Other chips are assumed to reach the same share of their peak.
"""
import json
import re

from effmodels.plan import hlo

EFFICIENCY = {
    "retention_forward": 0.45,
    "retention_backward": 0.73,
    "grouped_matmul": 0.86,
    "grouped_matmul_dlhs": 0.86,
    "grouped_matmul_drhs": 0.80,
    "linear_cross_entropy": 0.88,
    "linear_cross_entropy_dlogits": 0.91,
}
ATTENTION = {"flash_attention_forward": (1.13, 725.0), "flash_attention_backward": (1.07, 840.0)}
_PRODUCTS = {"flash_attention_forward": 2, "flash_attention_backward": 5}  # matrix products per visible pair
_LANES = 128
OTHERS = 0.5  # a kernel that the table does not have


def name(instruction) -> str:
    """The name a kernel was given, without what differentiation added: "transpose_jvp_retention_backward__.1" is retention_backward."""
    path = re.search(r'op_name="[^"]*?(\w+)\)*/pallas_call', instruction.attributes)
    known = [kernel for kernel in (*EFFICIENCY, *ATTENTION) if kernel in instruction.name or (path and kernel in path.group(1))]
    return max(known, key=len) if known else path.group(1) if path else instruction.base_name


def estimate(instruction) -> dict:
    """{"flops", "bytes_accessed", "transcendentals"} of a kernel's custom call; empty where its author gave none."""
    found = re.search(r'"cost_estimate":(\{[^}]*\})', instruction.attributes)
    return {key: float(value) for key, value in json.loads(found.group(1)).items()} if found else {}


def seconds(instruction, chip, traffic: float, operands=()) -> tuple[float, str]:
    """(seconds of one run, basis). traffic: bytes of operands and results in HBM, for a kernel without an estimate of its own.

    operands: their HLO types, of attention; without them a query is taken to see 2,048 keys.
    """
    cost = estimate(instruction)
    if not cost:
        return traffic / chip.bandwidth, "unpriced"
    compute = cost["flops"] / (chip.flops * _efficiency(name(instruction), cost["flops"], operands))
    return max(compute, cost["bytes_accessed"] / chip.bandwidth), "kernel table"


def _efficiency(kernel, flops, operands):
    if kernel not in ATTENTION:
        return EFFICIENCY.get(kernel, OTHERS)
    best, per_key = ATTENTION[kernel]
    return 1 / (best + per_key / _keys(kernel, flops, operands))


def _keys(kernel, flops, operands):
    """Keys that a query sees on average; the first operand of three dims with elements that are no integers is the query."""
    shapes = (hlo.shape(text) for text in operands if not text.startswith("("))
    query = next((dims for dtype, dims in shapes if dtype in ("bf16", "f32") and len(dims) == 3), None)
    if query is None:
        return 2048.0
    rows, tokens, width = query
    return max(1.0, flops / (2 * _PRODUCTS[kernel] * rows * tokens * -(-width // _LANES) * _LANES))

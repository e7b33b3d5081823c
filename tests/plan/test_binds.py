"""Where the seconds of a step go, on plans made by hand."""
import dataclasses

import pytest

from effmodels.plan.records import Operation
from effmodels.plan.report import binds
from tests.plan import plans

PEAK, BANDWIDTH = 275e12, 1.228e12
OPERATIONS = (
    Operation("m", "matmul", 2, 3e-3, "cost model", flops=2e-3 * PEAK, bytes=2.5e-3 * BANDWIDTH, layer="mlp", phase="recomputed"),
    Operation("k", "kernel", 1, 5e-3, "schedule", flops=4e-3 * PEAK, layer="attention", phase="forward"),
    Operation("c", "memory", 4, 1e-3, "cost model", bytes=0.75e-3 * BANDWIDTH, layer="mlp", phase="forward"),
    Operation("g", "collective", 3, 4e-3, "wire model", 1e-3, bytes=1e6, axes=("fsdp",), collective="all-gather", layer="mlp",
              phase="forward"),  # fmt: skip
    Operation("r", "collective", 1, 2e-3, "wire model", bytes=5e6, axes=("data",), collective="all-reduce", phase="backward"),
)
TOTAL = 6e-3 + 5e-3 + 4e-3 + 3e-3


def plan(**fields):
    return dataclasses.replace(plans.large(), operations=OPERATIONS, **fields)


def test_every_second_is_in_one_share():
    found = {(s.what, *s.axes): s for s in binds.shares(plan())}
    want = {
        (binds.AT_PEAK,): 4e-3 + 4e-3, (binds.HBM,): 1e-3 + 3e-3, (binds.MATMUL,): 1e-3, (binds.KERNEL,): 1e-3, (binds.OTHER,): 1e-3,
        (binds.EXPOSED, "fsdp"): 3e-3,
    }  # fmt: skip
    assert {key: s.seconds for key, s in found.items()} == pytest.approx(want)
    assert sum(s.share for s in found.values()) == pytest.approx(1) and sum(want.values()) == pytest.approx(TOTAL)
    assert found[binds.AT_PEAK,].recomputed == pytest.approx(4e-3) and found[binds.EXPOSED, "fsdp"].collective == "all-gather"
    assert [s.seconds for s in binds.shares(plan())] == sorted((s.seconds for s in found.values()), reverse=True)


def test_idle_slots_take_their_part_of_everything():
    found = {s.what: s.share for s in binds.shares(plan(bubble=0.2, imbalance=0.05))}
    assert found[binds.BUBBLE] == 0.2 and found[binds.IMBALANCE] == 0.05
    assert sum(found.values()) == pytest.approx(1) and found[binds.AT_PEAK] == pytest.approx(0.75 * 8e-3 / TOTAL)


def test_rates_of_a_chip_are_looked_up_where_the_plan_has_none():
    assert binds.shares(plan(peak_flops=0.0, bandwidth=0.0)) == binds.shares(plan())


def test_costliest_and_layers():
    assert [o.name for o in binds.costliest(plan(), 3)] == ["m", "k", "c"]
    mlp, attention, unknown = binds.layers(plan())
    assert (mlp.layer, attention.layer, unknown.layer, unknown.seconds) == ("mlp", "attention", "", 0)
    assert mlp.seconds == pytest.approx(13e-3) and mlp.share == pytest.approx(13e-3 / TOTAL)
    assert mlp.phases == pytest.approx({"recomputed": 6e-3, "forward": 7e-3})
    assert mlp.kinds == pytest.approx({"matmul": 6e-3, "memory": 4e-3, "collective": 3e-3})
    assert (mlp.flops, mlp.hbm_bytes, mlp.sent_bytes) == pytest.approx((4e-3 * PEAK, 8e-3 * BANDWIDTH, 3e6))
    assert mlp.wire_seconds == pytest.approx(12e-3)

"""The tables: sums over phases and layers against loops, collectives grouped and named hidden or exposed, figures with units."""
import dataclasses
import re

import pytest

from effmodels.plan import records, units
from effmodels.plan.report import answer, rows
from tests.plan import plans


def column(table, name):
    i = table.columns.index(name)
    return [row[i] for row in table.rows]


def test_layers():
    """attention: 80 layers of (4.5 + 1.2) ms, forward, recomputed, twice backward: 456 + 456 + 912 ms."""
    plan = plans.large()
    table = rows.layers(plan)
    row = dict(zip(table.columns, next(row for row in table.rows if row[0] == "attention")))
    assert (row["forward"], row["recomputed"], row["backward"], row["update"]) == ("456 ms", "456 ms", "912 ms", "-")
    assert row["all"] == "1.82 s" and row["of step"] == units.percent(1.824 / plan.seconds) and row["waiting"] == "-"
    flops = sum(o.calls * o.flops for o in plan.operations if o.layer == "attention")
    assert row["of peak"] == units.percent(flops / 1.824 / 275e12)
    mlp = dict(zip(table.columns, next(row for row in table.rows if row[0] == "mlp")))
    sent = sum(o.calls * o.bytes for o in plan.operations if o.kind == "collective" and o.layer == "mlp")
    exposed = sum(o.calls * o.exposed for o in plan.operations if o.kind == "collective" and o.layer == "mlp")
    assert mlp["sent"] == units.size(sent) and mlp["waiting"] == units.time(exposed)
    assert table.rows[0][0] == "mlp"  # costliest first


def test_layers_without_phases():
    table = rows.layers(plans.decode())
    assert "other" in table.columns and "forward" not in table.columns


def test_collectives():
    """One row per kind, axis, phase and size; two instructions alike share a row; their states."""
    twin = plans.wire("all-gather", "fsdp", 80, 4e-3, 0.4e-3, 188e6, phase="forward", source="effmodels/layers/linear.py:9")
    free = plans.wire("send", "data", 1, 0.0, 0.0, 1e6, basis="unpriced")
    table = rows.collectives(plans.large(operations=(*plans.operations(), twin, free)))
    assert len(table.rows) == 8
    gather = next(row for row in table.rows if row[0] == "all-gather" and row[2] == "forward")
    fields = dict(zip(table.columns, gather))
    assert (
        fields["calls"] == "160" and fields["wire time"] == "640 ms" and fields["exposed"] == "64.0 ms" and fields["state"] == "90 % hidden"
    )
    assert fields["sent, a call"] == units.size(188e6) and fields["sent"] == units.size(160 * 188e6)
    states = {row[0]: row[5] for row in table.rows}
    assert states["all-reduce"] == "exposed" and states["reduce-scatter"] == "hidden" and states["send"] == "no price"
    assert table.rows[0][0] == "all-reduce"  # waited for longest


def test_costliest():
    plan = plans.large()
    table = rows.costliest(plan)
    assert len(table.rows) == 10 and column(table, "operation")[0] == "fusion.mlp" and column(table, "all calls")[0] == "1.44 s"
    assert column(table, "source")[0] == "effmodels/layers/mlp.py:31" and column(table, "of peak")[0] == "88.9 %"


def test_lines_of_source():
    """The three phases of the same line are one row; what has no source is in none."""
    plan = plans.large()
    table = rows.lines(plan)
    seconds = sum(o.total for o in plan.operations if o.source == "effmodels/layers/mlp.py:31")
    first = dict(zip(table.columns, table.rows[0]))
    assert first["source"] == "effmodels/layers/mlp.py:31" and first["calls"] == "240" and first["all calls"] == units.time(seconds)
    assert len(table.rows) == 3 and "-" not in column(table, "source")


def test_states_at_the_edges():
    """Sums in floating point leave a rest."""
    shared = plans.wire("all-gather", "seq", 1, 0.1, 0.3, 1e6, shared=0.3)
    table = rows.collectives(plans.large(operations=(shared,)))
    fields = dict(zip(table.columns, *table.rows))
    assert [fields[name] for name in ("state", "wire time", "in flight", "exposed")] == ["25 % hidden", "100 ms", "400 ms", "300 ms"]
    nearly = [plans.wire("all-gather", "fsdp", 3, 0.1, 0.1 - 1e-15, 1e6), plans.wire("all-reduce", "data", 3, 0.1, 1e-15, 1e6)]
    assert column(rows.collectives(plans.large(operations=tuple(nearly))), "state") == ["exposed", "hidden"]


@pytest.mark.parametrize("make", plans.ALL)
def test_text_is_aligned(make):
    plan = make()
    text = answer.tables(plan)
    if not plan.operations:
        return
    for table, block in zip(rows.tables(plan), text.split("\n\n")):
        lines = block.split("\n")
        if table.rows:
            assert lines[2].strip().replace("  ", "").strip("-") == ""
            ends = {len(line) for line in lines[1 : 3 + len(table.rows)]}
            assert len(ends) == 1, block  # the last column is a figure, flush right


def test_no_operations_no_times():
    assert answer.tables(plans.memory_only()).startswith("No times: only memory was asked for")
    text = answer.tables(plans.too_large())
    assert text.startswith("Largest buffers") and re.search(r"optimizer: float32\[80, 8192, 344\] mu +5.00 GiB +14.6 %", text)
    assert text.splitlines()[-1].startswith("No times: the program does not fit")


def test_compare():
    a, b = plans.large(), plans.large(operations=plans.operations(scale=0.9), mesh={"fsdp": 1024})
    lines = {line[2:].split("  ")[0]: line.split() for line in answer.compare(a, b).split("\n")}
    assert lines["step time"][2:4] == ["5.63", "s"] and lines["step time"][-2:] == [f"{100 * (b.seconds / a.seconds - 1):+.1f}", "%"]
    assert lines["MFU"][-2:] == [f"{100 * (b.mfu - a.mfu):+.1f}", "points"]
    assert lines["memory: all"][-1] == "same" and lines["time: kernels below peak"][-1] == "same"
    assert lines["time: matmuls below peak"][-2:] == ["-90.0", "%"]
    assert "fsdp=1024" in answer.compare(a, b).split("\n")[1] and "Take care" not in answer.compare(a, b)


def test_compare_large_changes():
    twice = plans.large(memory=plans.memory(parameters=0.48, optimizer=0.24))
    lines = {line[2:].split("  ")[0]: line.split() for line in answer.compare(plans.large(), twice).split("\n")}
    assert lines["memory: parameters"][-2:] == ["x", "2.00"] and lines["memory: optimizer state"][-2:] == ["-50.0", "%"]


@pytest.mark.parametrize("make", plans.ALL)
def test_compare_takes_any_two(make):
    text = answer.compare(plans.large(), make())
    assert "Take care: the two differ in" in text or make in (plans.large, plans.too_large)
    assert answer.compare(make(), plans.large())


def test_plans_go_to_json_and_back():
    """Old files lack the newer fields."""
    for make in plans.ALL:
        assert records.from_json(records.to_json(make())) == make()
    fields = records.to_json(plans.large())
    del fields["band"], fields["peak_flops"], fields["bandwidth"]
    assert records.from_json(fields) == dataclasses.replace(plans.large(), band=(), peak_flops=0.0, bandwidth=0.0)


@pytest.mark.parametrize(
    "shown,want",
    [
        (units.digits(0.0123456), "0.0123"), (units.digits(9.999), "10.0"), (units.digits(12345), "12,300"), (units.digits(0), "0"),
        (units.size(0), "0 B"), (units.size(1023), "1,020 B"), (units.size(2**20), "1.00 MiB"), (units.size(30.75 * 2**30), "30.8 GiB"),
        (units.size(2**30 - 1), "1.00 GiB"), (units.time(0.0099999), "10.0 ms"), (units.time(4.6e-6), "4.60 us"),
        (units.time(0.99999), "1.00 s"), (units.time(180), "3.00 minutes"), (units.time(86400 * 41), "41.0 days"),
        (units.time(2e-9), "0.00200 us"), (units.count(8.23e17, "FLOP"), "823 PFLOP"), (units.count(12, "B/s"), "12.0 B/s"),
        (units.number(1.4e12), "1.40 trillion"), (units.number(999.9e3), "1.00 million"), (units.number(364.2), "364"),
        (units.percent(0.5476), "54.8 %"), (units.percent(0.0001), "< 0.1 %"), (units.percent(0), "0.0 %"),
        (units.span(3.9, 4.5), "3.90 to 4.50 s"), (units.span(100, 150), "1.67 to 2.50 minutes"),
    ],
)  # fmt: skip
def test_units(shown, want):
    assert shown == want

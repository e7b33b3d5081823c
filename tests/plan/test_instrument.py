"""The instrument from end to end: programs compiled by libtpu, their schedules read, cycles within known bounds."""
import dataclasses
import json

import numpy as np
import pytest

from effmodels.plan import hlo, topology
from effmodels.plan.schedule import dump, instrument, tables
from effmodels.plan.schedule.bundles import NotUnderstood

CASES = "tests.plan.cases:"


@pytest.mark.aot
def test_splash_attention():
    """Its tables are constants and are fed by themselves; 639,787 cycles were measured once, by other means, on libtpu 0.0.52."""
    (kernel,) = instrument.measure(CASES + "splash").kernels
    assert kernel.source == "bundles" and kernel.undecided == {}
    assert abs((kernel.cycles - kernel.matmul_wait) / 639_787 - 1) < 0.02
    assert 0.01 < kernel.matmul_wait / kernel.cycles < 0.05 and kernel.mxu < kernel.hot.mxu < 0.65
    assert {loop.trips for loop in kernel.loops} == {(129, 129)}  # 8 heads x 4 x 4 blocks on each core, and the pipeline's two
    assert 0.5 < kernel.hot.slots["MXU"] < 0.65 and kernel.used["VLOAD:FILL"] > 0
    scores = 16 * 4096 * (4096 + 1024) / 2  # blocks on the diagonal are computed whole
    assert 8 < kernel.valu_per_register(scores, hot=True) <= kernel.valu_per_register(scores) < 16


@pytest.mark.aot
def test_matmul():
    """8192^3 at 97.5 % of a v4's peak: XLA feeds each matrix unit every 16 bundles, so that hardly one waits."""
    report = instrument.measure(CASES + "matmul")
    (product,) = report.ops
    assert abs(report.microseconds / 4106 - 1) < 0.005 and report.calibrated
    needed = 2 * 8192**3 / (8 * 2 * 128 * 128)  # cycles of all units; a few rows at the borders are fed twice
    assert product.mxu == pytest.approx(needed / product.cycles, rel=3e-3)
    assert 0.97 < product.mxu < product.hot.mxu <= 1 and product.matmul_wait < 0.005 * product.cycles


@pytest.mark.aot
def test_tables_that_the_device_computes():
    """lax.ragged_dot computes its table of tiles in a kernel of its own; it is simulated, and its result fed to the next."""
    report = instrument.measure(CASES + "ragged_dot")
    metadata, product = report.kernels
    ideal = 2 * 8192 * 1024 * 4096 / 262_144
    assert 1.2 * ideal < product.cycles < 2 * ideal  # its tiles of 1280 columns do not divide 4096
    assert product.loops[0].trips == (129, 129) and metadata.cycles < 0.1 * product.cycles


@pytest.mark.aot
def test_grid_bounds_and_branches_from_tables():
    """Four steps: the grid's bound is computed from an argument that is known. Only one core works: no axis is parallel."""
    (kernel,) = instrument.measure(CASES + "visits", {"visited": [3, 1]}).kernels
    assert kernel.loops[0].trips == (5, 0)
    (longer,) = instrument.measure(CASES + "visits", {"visited": [3, 4]}).kernels
    assert longer.loops[0].trips == (8, 0)


@pytest.mark.aot
def test_tables_that_differ_between_the_iterations_of_a_scan():
    """The mean over runs of 1, 2 and 3 steps, each with a table of its own."""
    report = instrument.measure(CASES + "visits_in_a_scan")
    (kernel,) = report.kernels
    assert kernel.calls == 3 and kernel.undecided == {}
    assert kernel.dma_bytes == 2 * 4096 * (1 + 2 + 3) / 3 + 4 * 128 * 4  # blocks in and out, and the table


@pytest.mark.aot
def test_unknown_tables_are_an_error():
    with pytest.raises(instrument.UnknownScalars, match=r"kernel visits.* operand 0 s32\[\].*as arrays.*tables=\{'visits'"):
        instrument.measure(CASES + "visits", {"known": False})
    (kernel,) = instrument.measure(CASES + "visits", {"known": False}, strict=False).kernels
    assert kernel.undecided and "operand 2 s32[3,8]" in kernel.unfed
    table = [[0] * 8, [1] * 8, [0] * 8]
    (kernel,) = instrument.measure(CASES + "visits", {"known": False}, tables={"visits": {0: 6, 1: [6], 2: table}}).kernels
    assert kernel.undecided == {} and kernel.loops[0].trips == (7, 0)


@pytest.mark.aot
def test_the_compilers_message_is_kept():
    with pytest.raises(dump.CompilerError, match="tests.plan.cases:fails for v4.*RESOURCE_EXHAUSTED.*vmem"):
        instrument.measure(CASES + "fails")
    with pytest.raises(dump.CompilerError, match="has no attribute 'nothing'"):
        instrument.measure(CASES + "nothing")


@pytest.mark.aot
@pytest.mark.parametrize("generation", ["v5e", "v5p", "v6e"])
def test_other_generations_report_slots(generation):
    report = instrument.measure(CASES + "splash", {"heads": 4, "length": 2048}, generation=generation)
    (kernel,) = report.kernels
    assert not report.calibrated and "not calibrated" in report.table()
    assert 0.3 < kernel.hot.slots["MXU"] <= 1 and kernel.undecided == {}


@pytest.mark.aot
@pytest.mark.parametrize("generation", ["v4", "v5e", "v5p", "v6e"])
def test_divided_indices_copy_each_block_once(generation):
    """Block i // 6 + 7 (i % 6) of 42: divisions are written out differently on each generation; every block is copied in and out once."""
    (kernel,) = instrument.measure(CASES + "divided", generation=generation).kernels
    assert kernel.dma_bytes == 2 * 42 * 8 * 128 * 4 and kernel.undecided == {}


@pytest.mark.aot
def test_times_by_libtpu_itself():
    """Where libtpu has a simulator of its own: 2048^3 at 95 % of a v5e's peak. Of a kernel with tables it knows nothing.

    A quarter of those cycles are waits for matrix units, and this simulator finds them as well.
    """
    (product,) = instrument.measure(CASES + "matmul", {"size": 2048}, generation="v5e", libtpu_times=True).ops
    ideal = 2 * 2048**3 / 131_072
    assert product.source == "libtpu" and ideal < product.cycles < 1.15 * ideal
    assert max(product.core_cycles) == pytest.approx(product.cycles, rel=0.02) and product.matmul_wait > 0.2 * product.cycles
    (kernel,) = instrument.measure(CASES + "visits", generation="v5e", libtpu_times=True).kernels
    assert kernel.source == "bundles"
    with pytest.raises(ValueError, match="no simulator of its own for v4"):
        instrument.measure(CASES + "matmul", libtpu_times=True)


def test_without_libtpu(monkeypatch):
    monkeypatch.setattr(topology, "has_compiler", lambda: False)
    with pytest.raises(ModuleNotFoundError, match=r"needs libtpu, which is not installed: pip install -e '\.\[plan\]'"):
        instrument.measure(CASES + "matmul")


def test_a_dump_that_is_not_there(tmp_path):
    """A libtpu with other flags or other files is an error, not a time of zero."""
    with pytest.raises(NotUnderstood, match="wrote no bundles"):
        dump.read(tmp_path)


def files(folder, name, bundles="%1 = vnop", slots="1 0"):
    """A dump of one instruction with two bundles."""
    (folder / f"17-{name}-02-schedule-analysis_final_bundles.txt").write_text("")
    text = f"= control target key end\n     0   :  {{ {bundles} }}\n   0x1   :  {{}}\n"
    (folder / f"17-{name}-03-final_bundles.txt").write_text(text)
    (folder / f"17-{name}-01-final_hlo-static-per-bundle-utilization.txt").write_text(
        f"== CAPACITY:\nMXU, VALU\n  4 2\n== UTILIZATION:\n{slots}\n0 0\n"
    )


HLO = """ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0:T(256)} parameter(0)
  %fusion.1 = f32[8]{0:T(256)} fusion(%x), backend_config={"estimated_cycles":"70"}
  %fusion.2 = f32[8]{0:T(256)} fusion(%fusion.1), backend_config={"estimated_cycles":"70"}
  %copy.1 = f32[8]{0:T(256)} copy(%fusion.2), backend_config={"estimated_cycles":"30"}
  ROOT %kernel.1 = f32[8]{0:T(256)} custom-call(%copy.1), custom_call_target="tpu_custom_call"
}
"""


def test_a_program_is_the_sum_of_its_instructions(tmp_path):
    """Own bundles, those of a twin, the compiler's estimate where there are none."""
    files(tmp_path, "fusion.1")
    files(tmp_path, "kernel.1", slots="4 2")
    (tmp_path / "17-TLP-00-deduplication-map.txt").write_text("key:fusion.1\nordinal:1\nequivalent_hlos[size=2]:\n  fusion.1\n  fusion.2\n")
    costs = instrument.profile(HLO, dump.read(tmp_path), "v4")
    assert [(c.name, c.source, c.cycles) for c in costs] == [
        ("fusion.1", "bundles", 2), ("fusion.2", "bundles", 2), ("copy.1", "estimate", 30), ("kernel.1", "bundles", 2),
    ]  # fmt: skip
    assert costs[-1].is_kernel and costs[-1].slots == {"MXU": 0.5, "VALU": 0.5} and costs[-1].used == {"MXU": 8, "VALU": 4}


def test_a_loop_over_data_falls_back_to_the_estimate(tmp_path):
    """A gather's path hangs on its indices. A kernel's must not: that is an error with advice."""
    files(tmp_path, "fusion.1", bundles="%p1_p0 = spop %2  ;;  %3 = vdelay (%p1_p0), 9")
    files(tmp_path, "kernel.1", bundles="%p1_p0 = spop %2  ;;  %3 = vdelay (%p1_p0), 9")
    with pytest.raises(instrument.UnknownScalars, match="kernel kernel.1 runs hangs on.* not known: spop"):
        instrument.profile(HLO, dump.read(tmp_path), "v4")
    costs = instrument.profile(HLO, dump.read(tmp_path), "v4", strict=False)
    assert costs[0].source == "estimate" and costs[0].cycles == 70 and costs[-1].undecided == {"vdelay in bundle 0x0": 2}


LOOPS = """%body (p: f32[8]) -> f32[8] {
  ROOT %fusion.1 = f32[8]{0:T(256)} fusion(%p), backend_config={"estimated_cycles":"70"}
}

%rare (p.1: f32[8]) -> f32[8] {
  ROOT %sort.1 = f32[8]{0:T(256)} sort(%p.1), dimensions={0}
}

%often (p.2: f32[8]) -> f32[8] {
  ROOT %copy.2 = f32[8]{0:T(256)} copy(%p.2), backend_config={"estimated_cycles":"40"}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0:T(256)} parameter(0)
  %while.1 = f32[8]{0:T(256)} while(%x), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %conditional.1 = f32[8]{0:T(256)} conditional(%x, %x, %x), branch_computations={%rare, %often}
  ROOT %sort.2 = f32[8]{0:T(256)} sort(%conditional.1), dimensions={0}
}
"""


def test_loops_branches_and_what_has_no_price(tmp_path):
    """A loop's body counts as often as it runs, a conditional as its costlier branch; what nobody knows is named, not zero in silence."""
    files(tmp_path, "fusion.1")
    costs = instrument.profile(LOOPS, dump.read(tmp_path), "v4")
    assert [(c.name, c.calls, c.cycles, c.source) for c in costs] == [
        ("fusion.1", 5, 2, "bundles"), ("copy.2", 1, 40, "estimate"), ("sort.2", 1, 0, "unpriced"),
    ]  # fmt: skip
    report = instrument.Report("t", "v4", True, 1050.0, "", "", 0, 0, tuple(costs))
    assert report.cycles == 50 and report.unpriced == ("sort.2",) and "without a price: sort.2" in report.table()


KERNELS = """ENTRY %main (x: f32[8]) -> f32[8] {
  %t = s32[2]{0:T(128)} parameter(0)
  %x = f32[8]{0:T(256)} parameter(1)
  %one.12 = f32[8]{0:T(256)} custom-call(%t, %x), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/one/pallas_call"}
  %one.3 = f32[8]{0:T(256)} custom-call(%t, %x), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/one/pallas_call"}
  ROOT %two.4 = f32[8]{0:T(256)} custom-call(%t, %x), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/two/pallas_call"}
}
"""


def test_kernels_are_found_again_by_name_and_order():
    def call(name, *table):
        return tables.KernelCall(name, ((2,), (8,)), ({0: np.array(table)},))

    def found(*calls, **given):
        constants = instrument.matched(hlo.parse(KERNELS), calls, given)
        return {name: [run[0].tolist() for run in runs] for name, runs in constants.items()}

    assert found(call("one", 1, 2), call("two", 5, 6), call("one", 3, 4)) == {"one.3": [[1, 2]], "one.12": [[3, 4]], "two.4": [[5, 6]]}
    assert found(call("one", 1, 2)) == {"one.3": [[1, 2]], "one.12": [[1, 2]]}, "the same tables for all"
    assert found(call("one", 1, 2), call("one", 3, 4), call("one", 5, 6)) == {}, "which is which is not known"
    assert found(one={"0": [7, 8]}) == {"one.3": [[7, 8]], "one.12": [[7, 8]]}


COPIED = """ENTRY %main (t: s32[4]) -> f32[8] {
  %t = s32[4]{0:T(128)S(3)} parameter(0)
  %copy-start.1 = (s32[4]{0:T(128)}, s32[4]{0:T(128)S(3)}, u32[]{:S(2)}) copy-start(%t)
  %copy-done.1 = s32[4]{0:T(128)} copy-done(%copy-start.1)
  ROOT %kernel.1 = f32[8]{0:T(256)} custom-call(%copy-done.1), custom_call_target="tpu_custom_call"
}
"""


def test_a_table_that_is_copied_between_memories_stays_known():
    """The backward pass of lax.ragged_dot reads its tables of tiles from such copies."""
    module = hlo.parse(COPIED)
    (run,) = instrument._Known(module, [np.array([5, 6, 7, 8])], {}).runs(module.instructions()["kernel.1"])
    assert run[0][:4].tolist() == [5, 6, 7, 8]


def test_a_kernel_without_bundles_is_an_error(tmp_path):
    files(tmp_path, "fusion.1")
    with pytest.raises(NotUnderstood, match="no bundles for kernel kernel.1"):
        instrument.profile(HLO, dump.read(tmp_path), "v4")


def test_a_report_survives_json(tmp_path):
    files(tmp_path, "fusion.1")
    files(tmp_path, "kernel.1")
    costs = tuple(instrument.profile(HLO, dump.read(tmp_path), "v4"))
    report = instrument.Report("t", "v4", True, 1050.0, "0.0", "0.0", 1, 2, costs)
    again = instrument._report(json.loads(json.dumps(dataclasses.asdict(report))))
    assert again == report and again.cycles == 2 + 70 + 30 + 2
    assert "kernel.1" in again.table()

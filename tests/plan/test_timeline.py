"""Programs written by hand: seconds, trips of loops, and which part of a collective the chip waits for."""
import pytest

from effmodels.plan.compiled import timeline
from tests.plan.programs import BANDWIDTH, ICI, PEAK, computation, cycles, matmul, module, torus

HOP = 1e-6
ARGUMENTS = "%x = bf16[1024,1024]{1,0} parameter(1)\n%w = bf16[1024,1024]{1,0} parameter(2)\n"
RING = "source_target_pairs={{0,1},{1,2},{2,3},{3,0}}"
SENT = 2 * 1024**2  # bytes of one [1024, 1024] bfloat16 array
WIRE = SENT / ICI + HOP  # along one link


@pytest.fixture(scope="module")
def mesh():
    return torus(4, 4, 4, data=16, fsdp=4)  # fsdp: a ring along z


def run(body, mesh, others="", **options):
    return timeline.operations(module(ARGUMENTS + body, others), mesh, "v4", **options)


def by_name(found):
    return {o.name: o for o in found}


def test_a_chain_of_matmuls_takes_the_compilers_estimate_and_at_least_the_roofline(mesh):
    found = run(f"{matmul('a', 'x', 'w', 20)}\n{matmul('b', 'a', 'w', 1)}", mesh)
    assert [(o.name, o.kind, o.calls, o.basis) for o in found] == [(n, "matmul", 1, "cost model") for n in "ab"]
    assert [o.flops for o in found] == [2 * 1024**3] * 2 and [o.bytes for o in found] == [3 * SENT] * 2
    assert found[0].seconds == pytest.approx(20e-6) and found[1].seconds == pytest.approx(2 * 1024**3 / PEAK)
    assert sum(o.total for o in found) == sum(o.seconds for o in found)


def test_a_ragged_exchange_sends_what_its_buffers_hold(mesh):
    """Its arrays have room for more rows than even loads need; an ordinary all-to-all sends everything."""
    body = "%a = bf16[1024,1024]{1,0} KIND(%x, %w), replica_groups=[16,4]<=[64]"
    for kind, share in (("ragged-all-to-all", 0.25), ("all-to-all", 1.0)):
        full, quarter = (run(body.replace("KIND", kind), mesh, filled=filled)[0] for filled in ((1.0, 1.0), (1.0, 0.25)))
        assert quarter.collective == kind and quarter.bytes == pytest.approx(share * full.bytes)
        assert (quarter.exposed < 0.5 * full.exposed) == (share < 1)


def test_nested_loops_multiply(mesh):
    condition = computation("cond", "%n = s32[] constant(3)\n%q = s32[] parameter(0)\nROOT %r = pred[] compare(%q, %n), direction=LT")
    inner = computation("inner", f"{ARGUMENTS}{matmul('deep', 'x', 'w', 10)}")
    outer = computation("outer", f"{ARGUMENTS}{matmul('once', 'x', 'w', 20)}\n"
                                 "%t = (s32[]) tuple(%x)\n%i = (s32[]) while(%t), condition=%cond, body=%inner")  # fmt: skip
    body = '%t0 = (s32[]) tuple(%x)\n%o = (s32[]) while(%t0), condition=%cond, body=%outer, backend_config={"known_trip_count":{"n":"5"}}'
    found = by_name(run(body, mesh, condition + inner + outer))
    assert (found["once"].calls, found["deep"].calls) == (5, 15)
    assert sum(o.total for o in found.values()) == pytest.approx(5 * 20e-6 + 15 * 10e-6)


@pytest.mark.parametrize("between, exposed", [(100, 0.0), (20, WIRE - 20e-6), (None, WIRE)])
def test_an_async_permute_hides_behind_what_runs_before_its_done(between, exposed, mesh):
    work = matmul("a", "x", "w", between) if between else ""
    body = f"%s = (bf16[1024,1024]{{1,0}}, bf16[1024,1024]{{1,0}}) collective-permute-start(%x), {RING}\n{work}\n" \
           "%d = bf16[1024,1024]{1,0} collective-permute-done(%s)"  # fmt: skip
    found = by_name(run(body, mesh))["s"]
    assert (found.kind, found.collective, found.axes, found.bytes) == ("collective", "collective-permute", ("fsdp",), SENT)
    assert found.seconds == pytest.approx(WIRE) and found.exposed == pytest.approx(exposed, abs=1e-12)
    assert found.total == found.exposed and found.basis == "wire model"


@pytest.mark.parametrize("second, waits", [("{{0,1},{1,2},{2,3},{3,0}}", 2 * WIRE), ("{{1,0},{2,1},{3,2},{0,3}}", WIRE)])
def test_two_in_flight_share_the_links_of_one_direction_only(second, waits, mesh):
    start = "(bf16[1024,1024]{1,0}, bf16[1024,1024]{1,0}) collective-permute-start"
    body = f"%s = {start}(%x), {RING}\n%u = {start}(%w), source_target_pairs={second}\n" \
           "%d = bf16[1024,1024]{1,0} collective-permute-done(%s)\n%e = bf16[1024,1024]{1,0} collective-permute-done(%u)"  # fmt: skip
    found = by_name(run(body, mesh))
    assert found["s"].exposed + found["u"].exposed == pytest.approx(waits)
    for o in found.values():
        assert (o.seconds, o.flight) == pytest.approx((WIRE, waits))


@pytest.mark.parametrize("between", [0, 10])
def test_a_short_transfer_does_not_wait_for_a_long_one(between, mesh):
    """At half its speed it takes twice as long; what the long one lost, it needs later."""
    long, short = "(bf16[1024,1024]{1,0}, bf16[1024,1024]{1,0})", "(bf16[64,1024]{1,0}, bf16[64,1024]{1,0})"
    body = f"%y = bf16[64,1024]{{1,0}} parameter(3)\n%s = {long} collective-permute-start(%x), {RING}\n" \
           f"{matmul('a', 'x', 'w', between) if between else ''}\n%u = {short} collective-permute-start(%y), {RING}\n" \
           "%e = bf16[64,1024]{1,0} collective-permute-done(%u)\n%d = bf16[1024,1024]{1,0} collective-permute-done(%s)"  # fmt: skip
    found = by_name(run(body, mesh))
    brief = SENT / 16 / ICI + HOP
    assert (found["u"].seconds, found["u"].flight, found["u"].exposed) == pytest.approx((brief, 2 * brief, 2 * brief))
    assert found["u"].hidden == pytest.approx(0, abs=1e-9)
    rest = WIRE + brief - between * 1e-6 - 2 * brief
    assert (found["s"].flight, found["s"].exposed) == pytest.approx((WIRE + brief, rest))
    assert found["s"].hidden == pytest.approx(1 - rest / (WIRE + brief))


def test_a_transfer_that_nobody_awaits_is_hidden(mesh):
    start = "(bf16[1024,1024]{1,0}, bf16[1024,1024]{1,0}) collective-permute-start"
    found = run(f"%s = {start}(%x), {RING}\n%u = {start}(%w), {RING}", mesh)
    assert [(o.flight, o.exposed, o.hidden) for o in found] == [(pytest.approx(2 * WIRE), 0.0, 1.0)] * 2


def test_a_blocking_all_gather_is_exposed_whole_and_takes_both_directions_of_its_ring(mesh):
    body = f"%g = bf16[1024,1024]{{1,0}} all-gather(%x), replica_groups=[16,4]<=[64], dimensions={{0}}\n{matmul('a', 'x', 'w', 500)}"
    found = by_name(run(body, mesh))["g"]
    assert found.bytes == 3 / 4 * SENT and found.exposed == found.seconds == pytest.approx(3 / 4 * SENT / (2 * ICI) + 2 * HOP)


@pytest.mark.parametrize("between, exposed", [(500, 0.0), (8, 3 / 4 * SENT / (2 * ICI) + 2 * HOP - 8e-6)])
def test_a_gather_fused_with_other_work_is_one_gather_beside_that_work(between, exposed, mesh):
    """As XLA writes it for a v5e: a fusion starts it, another holds it and a matmul, a third ends it; each of them repeats the gather."""
    gather = ('%g = bf16[1024,1024]{1,0} all-gather(%y), channel_id=4, replica_groups=[16,4]<=[64], dimensions={0}, '
              'frontend_attributes={chain_id="0"}')  # fmt: skip
    ends = "".join(
        computation(f"fused_{name}", f'%y = bf16[256,1024]{{1,0}} parameter(0)\n{gather}\n'
                    f'%c = bf16[1024,1024]{{1,0}} custom-call(%y, %g), custom_call_target="AsyncCollective{name}"')
        for name in ("Start", "Done")
    )  # fmt: skip
    carrier = computation("async_collective_fusion.1", "%y = bf16[1024,1024]{1,0} parameter(0)\n%v = bf16[1024,1024]{1,0} parameter(1)\n"
                          f"%m = bf16[1024,1024]{{1,0}} convolution(%y, %v), dim_labels=bf_io->bf\n{gather}")  # fmt: skip
    work = f"%a = bf16[1024,1024]{{1,0}} fusion(%x, %w), kind=kOutput, calls=%async_collective_fusion.1, {cycles(between * 1050)}"
    body = f"%s = bf16[1024,1024]{{1,0}} fusion(%x), kind=kCustom, calls=%fused_Start\n{work}\n" \
           "%d = bf16[1024,1024]{1,0} fusion(%s), kind=kCustom, calls=%fused_Done"  # fmt: skip
    found = by_name(run(body, mesh, ends + carrier))
    assert list(found) == ["s", "a"] and found["s"].collective == "all-gather" and found["s"].bytes == 3 / 4 * SENT
    assert found["s"].exposed == pytest.approx(exposed, abs=1e-12)
    assert (found["a"].kind, found["a"].flops, found["a"].seconds) == ("matmul", 2 * 1024**3, pytest.approx(between * 1e-6))


def test_a_reduce_scatter_is_found_in_its_fusion(mesh):
    inner = computation("all-reduce-scatter.1", "%y = bf16[1024,1024]{1,0} parameter(0)\n"
                        "%r = bf16[1024,1024]{1,0} all-reduce(%y), replica_groups=[16,4]<=[64], to_apply=%add")  # fmt: skip
    (found,) = run("%f = bf16[256,1024]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1", mesh, inner)
    assert (found.collective, found.bytes, found.exposed) == ("reduce-scatter", 3 / 4 * SENT, found.seconds)


def test_copies_wait_for_what_other_work_leaves_of_hbm(mesh):
    """A copy of 2 MiB takes 1.7 us: hidden behind arithmetic, not behind work that keeps HBM busy itself."""
    body = "%s = (bf16[1024,1024]{1,0}, bf16[1024,1024]{1,0:T(8,128)S(3)}, u32[]) copy-start(%x)\n" \
           "%a = bf16[1024,1024]{1,0} OPERATION\n%d = bf16[1024,1024]{1,0:T(8,128)S(3)} copy-done(%s)"  # fmt: skip
    seconds = SENT / BANDWIDTH
    arithmetic = run(body.replace("OPERATION", f"convolution(%x, %w), dim_labels=bf_io->bf, {cycles(100_000)}"), mesh)
    moving = run(body.replace("OPERATION", f"add(%x, %w), {cycles(1)}"), mesh)
    assert [o.name for o in arithmetic] == ["a"]
    assert [(o.name, o.kind) for o in moving] == [("a", "memory"), ("s", "memory")]
    assert moving[0].seconds == pytest.approx(3 * seconds) and moving[1].seconds == pytest.approx(seconds)


def test_a_conditional_costs_its_costlier_branch(mesh):
    branches = "".join(computation(name, f"{ARGUMENTS}{matmul(name + '1', 'x', 'w', us)}") for name, us in (("short", 10), ("long", 30)))
    body = "%k = s32[] parameter(3)\n%c = bf16[1024,1024]{1,0} conditional(%k, %x, %x), branch_computations={%short, %long}"
    assert [o.name for o in run(body, mesh, branches)] == ["long1"]


def test_transfers_between_slices():
    """Two slices, all-reduce of 2 MiB a chip: through a quarter of the host's 25 GB/s, hidden behind what runs before recv-done."""
    attributes = 'is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="r",_xla_megascale_transfer_type="ALL_REDUCE"}'
    body = f"%s = (bf16[1024,1024]{{1,0}}, u32[], token[]) send(%x), {attributes}\n" \
           f"%r = (bf16[1024,1024]{{1,0}}, u32[], token[]) recv(%x), {attributes}\n{matmul('a', 'x', 'w', 100)}\n" \
           "%d = token[] send-done(%s)\n%e = (bf16[1024,1024]{1,0}, token[]) recv-done(%r)"  # fmt: skip
    found = by_name(run(body, torus(2, 2, slices=2, data=2, fsdp=4)))["s"]
    assert (found.collective, found.axes, found.bytes) == ("all-reduce", ("data",), SENT)
    assert found.seconds == pytest.approx(SENT / (25e9 / 4) + 5e-5) and found.exposed == pytest.approx(found.seconds - 100e-6)


def test_kernels_are_priced_by_their_own_estimate_and_by_what_the_caller_knows(mesh):
    kernel = '%k = bf16[1024,1024]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", ' \
             'metadata={op_name="jit(f)/jvp(linear_cross_entropy)/pallas_call"}'  # fmt: skip
    cost = '"cost_estimate":{"flops":"88000000000","transcendentals":"0","bytes_accessed":"1"}'
    estimate = f', backend_config={{"custom_call_config":{{{cost}}}}}'
    (known,), (given,), (unknown,) = (
        run(kernel + estimate, mesh), run(kernel, mesh, kernel_seconds={"linear_cross_entropy": 1e-3}), run(kernel, mesh))
    assert (known.kind, known.basis, known.flops) == ("kernel", "kernel table", 88e9)
    assert known.seconds == pytest.approx(88e9 / (0.88 * PEAK))
    assert (given.seconds, given.basis) == (1e-3, "schedule")
    assert unknown.basis == "unpriced" and unknown.seconds == pytest.approx(2 * SENT / BANDWIDTH)


def test_merged_operations_keep_every_sum(mesh):
    body = "\n".join(matmul(f"m{i}", "x", "w", 1000 if i == 5 else 9) for i in range(12))
    found = run(body, mesh)
    kept = timeline.merged(found, 0.02)
    assert [o.name for o in kept] == ["m0 ...", "m5", "m6 ..."]
    for field in ("seconds", "flops", "bytes"):
        assert sum(getattr(o, field) for o in kept) == pytest.approx(sum(getattr(o, field) for o in found))

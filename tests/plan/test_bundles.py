"""The reader of bundles and the simulator, on programs small enough to be counted by hand."""
import dataclasses

import pytest

from effmodels.plan.schedule import bundles, cores, simulate, usage
from effmodels.plan.schedule.bundles import NotUnderstood

HEAD = "= control target key start\nLB: loop body\n= control target key end\n\n"
CORE = cores.Core(
    delay_slots=1, granule=512, bytes_per_cycle=512.0, latency=100, megahertz=1000.0, cores=1, calibrated=True, matrix_units=2
)


def program(*lines):
    """A Program from the bodies of its bundles: "ops /* comment after the bundle */"."""
    text = HEAD
    for index, line in enumerate(lines):
        body, mark, comment = line.partition("@ ")
        text += f"{index:#6x} {'LB: >' if 'LB' in comment else '  :  '} {{ {body} }}" + (f" /* {comment} */" if mark else "") + "\n"
    return bundles.program(text.replace("   0x0 ", "     0 "))


def run(*lines, core=CORE, number=0, **options):
    return simulate.run(program(*lines), core, number, **options)


LOOP = (
    "%s1_s0 = smov 0 /* copy for cssa */",
    "%s2_s0 = sphi %s1_s0, %s3_s0 /* phi copy */  ;;  %s3_s0 = sadd.s32 1, %s2_s0 @ LB Start region 7",
    "%p4_p0 = scmp.ge.s32.totalorder %s3_s0, 5 /* loop exit test */",
    "%9 = sbr.rel (!%p4_p0) target = $region7",
    "%v5_v1 = vadd.f32 %v4_v0, %v4_v0 @ End region 7",  # the delay slot
    "",
)


def test_loop_with_a_delay_slot():
    """Five trips through bundles 1 to 4: the phi takes the loop's value, the bundle after the branch runs each time."""
    result = run(*LOOP)
    assert result.executed == [1, 5, 5, 5, 5, 1]
    assert result.loops == {(1, 4): 4}
    assert result.cycles == result.issued == 22
    assert result.undecided == result.unknown_loads == {}


def test_more_delay_slots():
    lines = (*LOOP[:4], "%8 = vnop", "%8 = vnop", "%8 = vnop", "%8 = vnop", "")
    assert run(*lines, core=cores.CORES["v5p"]).executed == [1, 5, 5, 5, 5, 5, 5, 5, 1]


def test_definitions_in_a_bundle_are_seen_in_it_and_phis_are_not():
    """%s3 uses the old %s2 although %s5, in the same register, is defined in the same bundle; %p4 uses the new %s5."""
    result = run(
        "%s1_s0 = smov 1",
        "%s2_s0 = sphi %s1_s0, %s5_s0  ;;  %s3_s1 = sadd.s32 10, %s2_s0  ;;  %s5_s0 = sadd.s32 1, %s2_s0"
        "  ;;  %p4_p0 = scmp.lt.s32.totalorder %s5_s0, 3 @ LB Start region 2",
        "%9 = sst [smem:[#allocation1 + %s2_s0]] %s3_s1",
        "%8 = sbr.rel (%p4_p0) target = $region2",
        "",
        "%s6_s2 = sld [smem:[#allocation1 + $0x2]]",
        "%7 = vdelay %s6_s2",
    )
    assert result.executed[1] == 2
    assert result.cycles == result.issued + 11  # the store saw register s0 after the bundle (2), and 10 + its value before it (1)


def test_guards_choose_and_keep():
    """A guarded move takes its other value or keeps what was there; a guarded store does nothing."""
    result = run(
        "%s1_s0 = smov 3  ;;  %s2_s1 = smov 4",
        "%p3_p0 = scmp.eq.s32.totalorder %s1_s0, %s2_s1",
        "%s4_s1 = smov (%p3_p0, %s2_s1), 100  ;;  %s5_s2 = smov (!%p3_p0, %s1_s0), 7  ;;  %9 = sst [smem:[#allocation1]] %s1_s0",
        "%9 = sst [smem:[#allocation1]] (%p3_p0), %s5_s2",
        "%s6_s3 = sld [smem:[#allocation1]]  ;;  %7 = vdelay %s4_s1",
        "%7 = vdelay %s5_s2",
        "%7 = vdelay %s6_s3  ;;  %9 = vdelay (%p3_p0), 1000",
    )
    assert result.cycles == 7 + 4 + 7 + 3


@pytest.mark.parametrize(
    "op, want",
    [
        ("sadd.s32 4294967295, 6", 5),  # -1 + 6
        ("ssub.s32 9, 4", 5),
        ("smul.u32 3, 7", 21),
        ("sand.u32 12, 6", 4),
        ("sor.u32 12, 6", 14),
        ("sxor.u32 12, 6", 10),
        ("sshll.u32 3, 4", 48),
        ("sshrl.u32 4294967295, 28", 15),
        ("smin.u32 3, 4294967295", 3),
        ("smax.s32 3, 4294967295", 3),
        ("scalar_lea.vmem 5, 6", 11),
        ("scalar_select /*predicate=*/%p1_p0, /*on_true=*/8, /*on_false=*/9", 8),
        ("int_to_ptr.hbm [resolvable:$true] 17", 17),
    ],
)
def test_scalar_operations(op, want):
    result = run("%p1_p0 = scmp.lt.s32.totalorder 4294967295, 0", f"%s2_s0 = {op}", "%7 = vdelay %s2_s0")
    assert result.cycles == 3 + want


@pytest.mark.parametrize("results, want", [("kDiv", 7), ("kRem", 2), ("kDivAndRem", 7)])
def test_divisions_hand_over_their_results(results, want):
    """44 / 6: one result, or the quotient and then the remainder."""
    pops = ["%s1_s0 = spop.drf %9", "%7 = vdelay %s1_s0", "%s2_s1 = spop.drf %9", "%7 = vdelay %s2_s1"]
    assert run(f"%9 = sdivrem.u32 44, 6 /* {results} */", *pops).cycles == 5 + want + (2 if results == "kDivAndRem" else 0)
    with pytest.raises(NotUnderstood, match="which results"):
        run("%9 = sdivrem.u32 44, 6")


def test_halves_of_products_and_carries():
    """Divisions by constants are written out with these; 2863311531 is 2^33 / 3, rounded up."""
    result = run("%s1_s0 = smulhi.u32 2863311531, 33", "%7 = vdelay %s1_s0", "%p2_p0 = sc.u32 4294967295, 1", "%7 = vdelay (%p2_p0), 100")
    assert result.cycles == 4 + 22 + 100


def test_signed_shift_and_comparisons():
    result = run(
        "%s1_s0 = sshra.s32 4294967280, 2",  # -16 / 4
        "%p2_p0 = scmp.eq.s32.totalorder %s1_s0, 4294967292  ;;  %p3_p1 = scmp.gt.u32.totalorder %s1_s0, 5",
        "%p4_p2 = pnand %p2_p0, %p3_p1",
        "%p5_p3 = pneg %p4_p2",
        "%7 = vdelay (%p5_p3), 50",
    )
    assert result.cycles == 55


def test_a_copy_is_waited_for():
    """Four granules of 512 bytes at 512 bytes a cycle, begun in cycle 1: transferred in cycle 5, the flag 100 cycles later."""
    result = run(
        "%5 = dma.hbm_to_vmem [thread:$0] /*hbm=*/%s1_s0, /*size_in_granules=*/4, /*vmem=*/%s2_s1, /*dst_syncflagno=*/[#allocation2]",
        "%6 = dma.done.wait [#allocation2], 4",
        "",
    )
    assert result.dma_bytes == 2048
    assert result.cycles == 106 and result.dma_wait == 103


def test_copies_share_one_channel_and_are_waited_for_in_order():
    copy = "%5 = dma.hbm_to_vmem /*hbm=*/%s1_s0, /*size_in_granules=*/{}, /*vmem=*/%s2_s1, /*dst_syncflagno=*/{}"
    result = run(
        copy.format(50, "[#allocation2]"),  # channel busy from 1 to 51
        copy.format(30, "[#allocation2 + $0x1]"),  # to 81
        "%6 = dma.done.wait [#allocation2], 50",  # 151
        "%6 = dma.done.wait [#allocation2 + $0x1], 30",  # 181
    )
    assert result.cycles == 181 and result.unmatched_waits == 0


def test_one_copy_waited_for_in_parts():
    """Both waits are for the same copy; the second finds it done."""
    copy = "%5 = dma.hbm_to_vmem /*hbm=*/%s1_s0, /*size_in_granules=*/50, /*vmem=*/%s2_s1, /*dst_syncflagno=*/[#allocation2]"
    result = run(copy, "%6 = dma.done.wait [#allocation2], 20", "%6 = dma.done.wait [#allocation2], 30")
    assert result.cycles == 1 + 50 + 100 + 1 and result.unmatched_waits == 0


def test_a_wait_without_a_copy_is_counted():
    assert run("%6 = dma.done.wait [#allocation2], 50").unmatched_waits == 1


def test_a_matrix_unit_takes_in_one_row_a_cycle():
    """16 rows of bfloat16 keep unit 0 busy until cycle 16, where bundle 3 may feed it 8 of float32: bundle 4 waits until cycle 24."""
    lines = (
        "%1 = vmatmul.bf16.gmra.mxu0 %v1_v1",
        "",
        "%2 = vmatmul.bf16.gmra.mxu1 %v1_v1",  # another unit, which is free
        "%3 = vmatmul.hi.f32.gmra.mxu0 %v1_v1",
        "%4 = vmatmul.msk.bf16.dwg.msra.gmra.mxu0 (!%p0_p1), %v1_v1",
    )
    result = run(*lines)
    assert result.matmul_waits == {3: 13, 4: 7} and result.cycles == 25 and result.issued == 5
    assert program(*lines).matmuls == {0: ((0, 16),), 2: ((1, 16),), 3: ((0, 8),), 4: ((0, 16),)}
    not_modelled = run(*lines, core=dataclasses.replace(CORE, matrix_units=0))
    assert not_modelled.cycles == 5 and not_modelled.matmul_waits == {}


def test_two_units_fed_by_one_bundle_wait_for_the_later():
    pair = "%1 = vmatmul.bf16.gmra.mxu0 %v1_v1  ;;  %2 = vmatmul.bf16.gmra.mxu1 %v1_v1"
    assert run("%1 = vmatmul.bf16.gmra.mxu0 %v1_v1", "", pair, pair).matmul_waits == {2: 14, 3: 15}


def test_waits_for_a_matrix_unit_in_a_loop():
    """Five trips of four bundles, each of which feeds unit 0 for 8 cycles: four trips wait 4 cycles."""
    lines = (*LOOP[:4], "%8 = vmatmul.f32.gmra.mxu0 %v1_v1", "")
    result = run(*lines)
    assert result.executed == [1, 5, 5, 5, 5, 1] and result.matmul_waits == {4: 16} and result.cycles == 22 + 16


TABLE = (
    "%s1_s0 = inlined_call_operand.hbm [shape: s32[4], index: 0, kind: input, shape index: {}] /* operand 0 */",
    "%5 = dma.hbm_to_smem /*hbm=*/%s1_s0, /*size_in_granules=*/1, /*smem=*/[#allocation3], /*dst_syncflagno=*/[#allocation2]",
    "%s2_s1 = sld [smem:[#allocation3 + $0x2]]",
    "%p3_p0 = scmp.eq.s32.totalorder %s2_s1, 30",
    "%9 = sbr.rel (%p3_p0) target = $region4",
    "",
    "%7 = vdelay 1000",
    "@ Start/End empty region 4",
)


def test_a_table_given_decides_a_branch():
    assert run(*TABLE, operands={0: [10, 20, 30, 40]}).cycles == 7  # jumps over bundle 6
    assert run(*TABLE, operands={0: [10, 20, 31, 40]}).cycles == 1008


def test_a_table_in_another_memory_and_in_other_units():
    """XLA may keep a table in CMEM; v5e's programs shift the addresses they are given to granules of 32 bytes."""
    cmem = [line.replace("hbm", "cmem") for line in TABLE]
    assert run(*cmem, operands={0: [10, 20, 30, 40]}).cycles == 7
    shifted = [TABLE[0], "%s8_s2 = sshll.u32 %s1_s0, 4", TABLE[1].replace("%s1_s0", "%s8_s2"), *TABLE[2:]]
    v5e = cores.CORES["v5e"]
    assert run(*shifted, core=v5e, operands={0: [10, 20, 30, 40]}).undecided == {}
    assert run(*shifted, core=v5e).unfed == ("operand 0 s32[4]",)


def test_an_unknown_table_is_reported():
    """The branch is not taken, and that it was a guess is on record, with the table it hung on."""
    result = run(*TABLE)
    assert result.executed[6] == 1
    assert result.undecided == {"sbr.rel in bundle 0x4": 1}
    assert result.unfed == ("operand 0 s32[4]",) and result.unknown_loads == {"allocation3": 1}


def test_an_unknown_value_that_decides_nothing_is_harmless():
    result = run("%s1_s0 = sld [smem:[#allocation3]]", "%s2_s1 = sadd.s32 %s1_s0, 1", "%s3_s2 = spop %4", "%p4_p0 = por %p5_p1, %p5_p1")
    assert result.undecided == {} and result.unknown_loads == {"allocation3": 1}


def test_integers_as_predicates():
    known = ("%p1_p0 = smov 1", "%p2_p1 = pmov 0", "%p3_p2 = pand %p1_p0, %p2_p1")
    result = run(*known, "%7 = vdelay (!%p3_p2), 10", "%7 = vdelay (%p1_p0), 5")
    assert result.cycles == 20


def test_three_valued_predicates():
    """Unknown or true is true; unknown and true is unknown."""
    known = "%p1_p0 = scmp.eq.s32.totalorder 1, 1  ;;  %s2_s0 = sld [smem:[#allocation3]]"
    result = run(known, "%p3_p1 = scmp.eq.s32.totalorder %s2_s0, 1", "%p4_p2 = por %p1_p0, %p3_p1", "%7 = vdelay (%p4_p2), 10")
    assert result.cycles == 14 and result.undecided == {}
    result = run(known, "%p3_p1 = scmp.eq.s32.totalorder %s2_s0, 1", "%p4_p2 = pand %p1_p0, %p3_p1", "%7 = vdelay (%p4_p2), 10")
    assert result.undecided == {"vdelay in bundle 0x3": 1}


def test_a_store_to_an_unknown_place_spoils_its_table_only():
    result = run(
        "%9 = sst [smem:[#allocation1]] 5  ;;  %8 = sst [smem:[#allocation2]] 6",
        "%s1_s0 = sld [smem:[#allocation3]]",
        "%9 = sst [smem:[#allocation1 + %s1_s0]] 7",
        "%s2_s1 = sld [smem:[#allocation1]]  ;;  %s3_s2 = sld [smem:[#allocation2]]",
        "%9 = vdelay %s3_s2",
        "%9 = vdelay %s2_s1",
    )
    assert result.cycles == 12 and result.undecided == {"vdelay": 1}


def test_scalars_without_memory_are_their_value():
    line = "%s1_s0 = inlined_call_operand.<no memory space> [shape: s32[], index: 2, kind: input, may-alias: {2,3}] /* operand 2 */"
    assert run(line, "%7 = vdelay %s1_s0", operands={2: [33]}).cycles == 35
    assert run(line, "%7 = vdelay %s1_s0").unfed == ("operand 2 s32[]",)


@pytest.mark.parametrize("comment", ["core id", "megacore core id", "megacore core id :: core id"])
def test_core_id(comment):
    lines = (f"%s1_s0 = sld [smem:[#allocation0]] /* {comment} */", "%7 = vdelay %s1_s0")
    assert run(*lines, number=1).cycles == 3


def test_results_that_the_scalar_unit_writes():
    result = run(
        "%s1_s0 = inlined_call_operand.hbm [shape: s32[4], index: 1, kind: output, shape index: {0}]",
        "%9 = sst [smem:[#allocation3 + $0x1]] 77",
        "%5 = dma.smem_to_hbm /*smem=*/[#allocation3], /*size_in_granules=*/1, /*hbm=*/%s1_s0, /*dst_syncflagno=*/[#allocation2]",
    )
    assert result.results == {1: {1: 77}}


def test_nested_comments_and_the_exit():
    """A check's comment quotes an operation with comments of its own; a branch to the exit has no marked region."""
    result = run(
        "%4 = shalt.err (!%p1_p0) /* BoundsCheck 0 for %16 = dma.hbm_to_smem /*hbm=*/%s0, /*smem=*/[#a3] /* {nested} ;; */\nhlo: x */",
        "%9 = sbr.rel target = $region4",
        "",
        "%7 = vdelay 1000",
        "@ exit bundle: %x = custom-call()",
    )
    assert result.cycles == 4


def test_an_endless_program_is_an_error():
    with pytest.raises(simulate.DidNotEnd, match="within 100 steps"):
        run("@ Start region 1", "%9 = sbr.rel target = $region1", "", limit=100)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "legend"),
        (HEAD, "no bundles"),
        (HEAD + "     0   :  { %s1 = smov 0 }\n   0x2   :  { %s1 = smov 0 }\n", "bundle 1 is numbered 0x2"),
        (HEAD + "     0   :  { ?? }\n", "not an operation"),
        (HEAD + "     0   :  { %1 = sbr.rel target = $region9 }\n", "start nowhere"),
        (HEAD + "     0   :  { %1 = sst [vmem:[#allocation1]] 5 }\n", "address"),
        (HEAD + "     0   :  { %s1_s0 = smov 1 /* open }\n", "comment does not end"),
        (HEAD + "     0   :  { %1 = vmatmul.gmra.mxu0 %v1 }\n", "how many rows"),
        (HEAD + "     0   :  { %1 = vmatmul.bf16.gmra %v1 }\n", "which unit"),
    ],
)
def test_what_is_not_understood_is_said(text, message):
    with pytest.raises(NotUnderstood, match=message):
        bundles.program(text)


def test_phis_of_two_registers_are_not_understood():
    with pytest.raises(NotUnderstood, match="not one register"):
        run("%s1_s0 = sphi %s2_s1, %s3_s0")


SLOTS = "== CAPACITY:\nMXU, VALU, VLOAD:FILL\n    4     2     1\n== UTILIZATION:\n" + "".join(f"{i} 1 0\n" for i in range(4))


def test_slots_weighted_by_how_often_bundles_run():
    slots = bundles.slots(SLOTS, 4)
    assert slots.names == ("MXU", "VALU", "VLOAD:FILL") and slots.capacity == (4, 2, 1)
    executed = [1, 5, 5, 1]
    assert usage.slots_used(slots, executed) == {"MXU": 5 + 10 + 3, "VALU": 12, "VLOAD:FILL": 0}
    assert usage.slot_shares(slots, executed) == {"MXU": 18 / 48, "VALU": 0.5, "VLOAD:FILL": 0.0}
    assert usage.hottest(executed) == (1, 3)
    assert usage.slot_shares(slots, executed, 1, 3)["MXU"] == 15 / 40
    with pytest.raises(NotUnderstood, match="the program has 5 bundles"):
        bundles.slots(SLOTS, 5)

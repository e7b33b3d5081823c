"""The reader of optimized HLO text: order of execution, loops, kernels, and how small tables lie in memory."""
import numpy as np
import pytest

from effmodels.plan import hlo

TEXT = """HloModule jit_f, is_scheduled=true, entry_computation_layout={(s32[8]{0:T(128)})->f32[8,128]{1,0:T(8,128)}}

%body.1 (p: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %p = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%p), index=1
  ROOT %fusion.2 = f32[8,128]{1,0:T(8,128)} fusion(%x), kind=kLoop, calls=%fused, backend_config={"window_config":{"estimated_cycles":"50"}}
}

%condition.1 (p.1: (s32[], f32[8,128])) -> pred[] {
  %p.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %limit = s32[]{:T(128)} constant(12)
  ROOT %less = pred[]{:T(512)} compare(%p.1, %limit), direction=LT
}

ENTRY %main.3 (sizes: s32[8]) -> f32[8,128] {
  %sizes = s32[8]{0:T(128)} parameter(0), metadata={op_name="sizes"}
  %kernel.7 = (f32[8,128]{1,0:T(8,128)}, s32[3]{0:T(128)}) custom-call(%sizes, /*index=1*/%sizes), custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"a\\": 1}"
}}, metadata={op_name="jit(f)/kernel/pallas_call"}
  %part = f32[8,128]{1,0:T(8,128)} get-tuple-element(%kernel.7), index=0
  ROOT %while.1 = f32[8,128]{1,0:T(8,128)} while(%part), condition=%condition.1, body=%body.1
}
"""


def test_computations_in_order_of_execution():
    module = hlo.parse(TEXT)
    assert module.entry == "main.3" and [i.name for i in module.computations["main.3"]] == ["sizes", "kernel.7", "part", "while.1"]
    loop = module.computations["main.3"][-1]
    assert hlo.called(loop, "body") == "body.1" and hlo.trip_count(module, loop) == 12


def test_branches_of_a_conditional():
    conditional = hlo.Instruction("c", "f32[]", "conditional", ("p",), ", branch_computations={%a.1, %b}")
    assert hlo.branches(conditional) == ["a.1", "b"]
    conditional = hlo.Instruction("c", "f32[]", "conditional", ("p",), ", true_computation=%yes, false_computation=%no")
    assert hlo.branches(conditional) == ["yes", "no"]


def test_what_is_read_of_an_instruction():
    """Attributes of kernels hold line breaks, and lines that begin with braces."""
    instructions = hlo.parse(TEXT).instructions()
    kernel = instructions["kernel.7"]
    assert kernel.is_kernel and kernel.base_name == "kernel" and kernel.operands == ("sizes", "sizes")
    assert kernel.type.startswith("(f32[8,128]") and "jit(f)/kernel/pallas_call" in kernel.attributes
    assert instructions["fusion.2"].estimated_cycles == 50 and kernel.estimated_cycles == 0
    assert hlo.shape(instructions["x"].type) == ("f32", (8, 128))


def test_known_trip_count_comes_first():
    module = hlo.parse(TEXT.replace("body=%body.1", 'body=%body.1, backend_config={"known_trip_count":{"n":"7"}}'))
    assert hlo.trip_count(module, module.instructions()["while.1"]) == 7


def test_a_loop_of_unknown_length_is_an_error():
    module = hlo.parse(TEXT.replace("constant(12)", "parameter(1)"))
    with pytest.raises(ValueError, match="how often loop while.1 runs"):
        hlo.trip_count(module, module.instructions()["while.1"])


def test_a_row_of_integers_is_its_words():
    table = np.array([3, -1, 5], np.int32)
    assert hlo.words(table, "s32[3]{0:T(128)}").tolist() == [3, 2**32 - 1, 5] + [0] * 125
    assert hlo.words(np.int32(9), "s32[]{:T(128)}")[0] == 9
    assert hlo.words(table, "s32[3]").tolist() == [3, 2**32 - 1, 5]


def test_rows_are_padded_to_lanes():
    """Element (i, j) of a table in tiles of 4 x 128 is word 128 i + j of its tile."""
    words = hlo.words(np.arange(24, dtype=np.int32).reshape(3, 8), "s32[3,8]{1,0:T(4,128)}")
    assert len(words) == 4 * 128 and words[2 * 128 + 5] == 21
    words = hlo.words(np.arange(5 * 300, dtype=np.int32).reshape(5, 300), "s32[5,300]{1,0:T(4,128)}")
    assert words[(1 * 3 + 2) * 512 + 0 * 128 + 10] == 4 * 300 + 266  # tile (1, 2), row 0, column 10


def test_bytes_of_four_rows_share_a_word():
    table = np.arange(16, dtype=np.int8).reshape(1, 4, 4)
    words = hlo.words(table, "s8[1,4,4]{2,1,0:T(4,128)(4,1)}")
    assert len(words) == 128 and words[2] == 2 | 6 << 8 | 10 << 16 | 14 << 24


def test_column_major_tables():
    assert hlo.words(np.array([[1, 2], [3, 4]], np.int32), "s32[2,2]{0,1}").tolist() == [1, 3, 2, 4]

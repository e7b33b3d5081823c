"""Layer, phase and source from what XLA keeps of the program's making."""
import dataclasses

import pytest

from effmodels.plan import hlo
from effmodels.plan.compiled.origin import Origins
from tests.plan.programs import module

# Frames: 1 train step; 2 block in 1; 3 attention in 2; 4 norm in 3; 5 the optimizer in 1; 6 norm in 2; 7 sums of micro-batches in 1;
# 8 slices in 1.
TABLES = """
FileNames
1 "/here/effmodels/train/step.py"
2 "/here/effmodels/models/blocks.py"
3 "/here/effmodels/mixers/attention.py"
4 "/here/effmodels/layers/norms.py"
5 "/env/lib/optax/_src/update.py"
6 "/env/lib/jax/_src/lax.py"

FunctionNames
1 "make_step.<locals>.train_step"
2 "Block._run"
3 "Attention.__call__"
4 "RMSNorm.__call__"
5 "apply_updates"
6 "make_step.<locals>.micro_step.<locals>.<lambda>"
7 "sliced"

FileLocations
1 {file_name_id=1 function_name_id=1 line=10 end_line=10 column=1 end_column=9}
2 {file_name_id=2 function_name_id=2 line=20 end_line=20 column=1 end_column=9}
3 {file_name_id=3 function_name_id=3 line=30 end_line=30 column=1 end_column=9}
4 {file_name_id=4 function_name_id=4 line=40 end_line=40 column=1 end_column=9}
5 {file_name_id=5 function_name_id=5 line=50 end_line=50 column=1 end_column=9}
6 {file_name_id=1 function_name_id=6 line=60 end_line=60 column=1 end_column=9}
7 {file_name_id=6 function_name_id=7 line=70 end_line=70 column=1 end_column=9}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=3}
4 {file_location_id=4 parent_frame_id=4}
5 {file_location_id=5 parent_frame_id=2}
6 {file_location_id=4 parent_frame_id=3}
7 {file_location_id=6 parent_frame_id=2}
8 {file_location_id=7 parent_frame_id=2}

"""


def origins(body):
    text = module(body).replace("\n\n", "\n" + TABLES, 1)
    parsed = hlo.parse(text)
    known = Origins(text, parsed)
    return {i.name: dataclasses.astuple(known.of(i)) for i in parsed.computations[parsed.entry]}


@pytest.mark.parametrize("path, frame, origin", [
    ("jvp()/dot_general", 3, ("attention", "forward", "effmodels/mixers/attention.py:30")),
    ("jvp()/mul", 4, ("attention", "forward", "effmodels/layers/norms.py:40")),  # its own norm of queries
    ("transpose(jvp())/mul", 6, ("norm", "backward", "effmodels/layers/norms.py:40")),
    ("transpose(jvp())/while/body/checkpoint/rematted_computation/dot", 3, ("attention", "recomputed", "effmodels/mixers/attention.py:30")),
    ("add", 5, ("optimizer", "update", "effmodels/train/step.py:10")),
    ("while/body/add", 7, ("", "backward", "effmodels/train/step.py:60")),
])  # fmt: skip
def test_layer_phase_and_source(path, frame, origin):
    body = f'%a = f32[8]{{0}} negate(%p), metadata={{op_name="jit(train_step)/{path}" stack_frame_id={frame}}}'
    assert origins(body)["a"] == origin


def test_what_the_compiler_added_takes_after_its_neighbours():
    """A copy after what it copies; the gather of a weight, traced outside its layer, after the layer that uses it."""
    found = origins("""
        %w = f32[8]{0} parameter(1)
        %s = f32[8]{0} slice(%w), metadata={op_name="jit(train_step)/jvp()/squeeze" stack_frame_id=8}
        %g = f32[8]{0} all-gather(%s), dimensions={0}
        %a = f32[8]{0} multiply(%g, %g), metadata={op_name="jit(train_step)/jvp()/dot" stack_frame_id=3}
        %c = f32[8]{0} copy(%a)
    """)  # fmt: skip
    assert found["c"] == found["a"] == ("attention", "forward", "effmodels/mixers/attention.py:30")
    assert found["s"] == ("attention", "forward", "effmodels/train/step.py:10")
    assert found["g"][:2] == ("attention", "forward")


def test_older_metadata_names_file_and_line():
    body = '%a = f32[8]{0} negate(%p), metadata={op_name="jit(f)/neg" source_file="/x/effmodels/mixers/retention.py" source_line=7}'
    assert origins(body)["a"] == ("retention", "forward", "effmodels/mixers/retention.py:7")


def test_nothing_is_known_of_a_bare_program():
    assert origins("%a = f32[8]{0} negate(%p)")["a"] == ("", "", "")

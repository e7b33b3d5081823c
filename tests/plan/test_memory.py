"""Memory by category, the largest buffers, and the compiler's words when a program does not fit."""
import pytest

from effmodels.plan.compiled import heap, memory
from effmodels.plan.compiled.heap import Buffer
from effmodels.plan.compiling import program

GIB = 2**30
COMPILED = {
    "bytes": {"parameters": 4 * GIB, "optimizer": 8 * GIB, "buffers": 0, "batch": GIB},
    "accumulator": 2 * GIB,
    "accumulates": True,
    "parameter_shapes": [[6, 256]],
    "arrays": [["parameters", "embed", 3 * GIB, [6, 256], "float32"], ["optimizer", "adamw mu embed", 3 * GIB, [6, 256], "float32"]],
}
SAID = {"argument": 13 * GIB, "output": 12 * GIB, "alias": 12 * GIB, "temp": 10 * GIB, "generated_code": 7}


@pytest.mark.parametrize(
    "message, needed, available",
    [
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO temporaries (34.22G)"
            " exceeds available HBM (30.75G). HLO module: jit_step.",
            34.22 * GIB, 30.75 * GIB,
        ),
        ("Ran out of memory in memory space hbm. Used 1.5T of 95.73G hbm. Exceeded hbm capacity", 1.5 * 1024 * GIB, 95.73 * GIB),
    ],
)  # fmt: skip
def test_the_compilers_message(message, needed, available):
    assert memory.given_up(message) == (int(needed), int(available))


def test_other_messages_say_nothing():
    assert memory.given_up("RESOURCE_EXHAUSTED: Allocation (size=33554432) would exceed memory (size=16777216)") is None


def buffers():
    kept = Buffer(3 * GIB, "bf16[4,8]{1,0}", "dot_general", "effmodels/layers/linear.py:1", "mlp", written={"forward"}, read={"backward"})
    return [
        kept,
        Buffer(2 * GIB, "f32[6,256]{1,0}", "add", written={"backward", "forward"}, read={"update"}),
        Buffer(GIB, "bf16[6,256]{1,0}", "convert", written={"forward"}, read={"backward"}),
        Buffer(GIB, "f32[9]{0}", "exp", written={"recomputed"}, read={"backward"}),
        Buffer(GIB, "f32[9]{0}", "exp", written={"recomputed"}, read={"backward"}),
    ]


def test_every_byte_is_in_one_category(monkeypatch):
    monkeypatch.setattr(heap, "fullest", lambda text: buffers())
    whole, largest = memory.memory(COMPILED, [({"name": "train_step", "memory": SAID}, "")], 30 * GIB)
    assert (whole.gradients, whole.activations, whole.temporaries) == (2 * GIB, 3 * GIB, 5 * GIB)
    assert whole.total == SAID["argument"] + SAID["temp"] + SAID["generated_code"] and whole.fits
    assert [size for _, size in largest] == [3 * GIB, 3 * GIB, 3 * GIB, 2 * GIB, 2 * GIB]
    names = [what for what, _ in largest]
    assert "kept for the backward pass: bf16[4,8] dot_general (mlp, effmodels/layers/linear.py:1)" in names
    assert "2 x temporary: f32[9] exp" in names and "parameters: float32[6, 256] embed" in names


def test_the_total_is_what_the_compiler_reports_of_hbm(monkeypatch):
    """Two of the ten GiB of temporaries lie in another memory of the chip; activations are what is left of them when there are fewer."""
    monkeypatch.setattr(heap, "fullest", lambda text: buffers())
    whole, _ = memory.memory(COMPILED, [({"name": "train_step", "memory": SAID | {"hbm": 21 * GIB}}, "")], 30 * GIB)
    assert (whole.gradients, whole.activations, whole.temporaries) == (2 * GIB, 3 * GIB, 3 * GIB) and whole.total == 21 * GIB + 7
    whole, _ = memory.memory(COMPILED, [({"name": "train_step", "memory": SAID | {"hbm": 17 * GIB}}, "")], 30 * GIB)
    assert (whole.gradients, whole.activations, whole.temporaries) == (2 * GIB, 2 * GIB, 0) and whole.total == 17 * GIB + 7


def test_the_compilers_report_is_read(tmp_path):
    text = "Memory Space: default (color=0)\nTotal bytes: 4110841344 (3.83GiB)\n 1; 2\n\nMemory Space: hbm (color=3)\nTotal bytes: 7 (7B)\n"
    name = "module_3514.jit_train_step.cl_933746096.after_optimizations-memory-usage-report.txt"
    assert program._reported(tmp_path, "train_step") == 0
    (tmp_path / name).write_text(text)
    assert program._reported(tmp_path, "train_step") == 4110841344 and program._reported(tmp_path, "micro_step") == 0


def test_results_that_take_no_arguments_place_count(monkeypatch):
    monkeypatch.setattr(heap, "fullest", lambda text: [])
    whole, _ = memory.memory(COMPILED, [({"name": "train_step", "memory": SAID | {"alias": 5 * GIB}}, "")], 0)
    assert whole.temporaries == 17 * GIB and whole.fits  # nobody knows what is available


def test_a_step_of_two_programs_holds_the_optimiser_meanwhile(monkeypatch):
    """The arguments of micro_step are parameters, batch and sums: 4 + 1 + 2 GiB; the optimiser's 8 GiB stay where they are."""
    monkeypatch.setattr(heap, "fullest", lambda text: buffers()[:1])
    micro = {"name": "micro_step", "memory": SAID | {"argument": 7 * GIB, "output": 2 * GIB, "alias": 2 * GIB}}
    apply = {"name": "apply_step", "memory": SAID | {"argument": 14 * GIB, "temp": GIB}}
    whole, _ = memory.memory(COMPILED, [(micro, ""), (apply, "")], 30 * GIB)
    assert (whole.optimizer, whole.gradients, whole.activations, whole.temporaries) == (8 * GIB, 2 * GIB, 3 * GIB, 7 * GIB)
    assert whole.total == (4 + 8 + 1 + 2 + 10) * GIB + 7


@pytest.mark.parametrize("text", [None, "the program"])
def test_a_program_that_does_not_fit_has_the_size_that_the_compiler_says(monkeypatch, text):
    monkeypatch.setattr(heap, "fullest", lambda text: buffers())
    whole, largest = memory.without_program(COMPILED, 40 * GIB, 30 * GIB, text)
    assert whole.total == 40 * GIB and not whole.fits and whole.gradients == 2 * GIB
    assert whole.activations == (3 * GIB if text else 0) and len(largest) == (5 if text else 2)

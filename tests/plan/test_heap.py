"""Buffers alive at the fullest moment of programs whose answer is known."""
import jax
import jax.numpy as jnp
import pytest

from effmodels.plan.compiled import heap, memory

MB = 2**20
FORWARD, BACKWARD = "jit(f)/jvp(g)/", "jit(f)/transpose(jvp(g))/"


def program(*lines, header=""):
    return f"HloModule jit_f, is_scheduled=true{header}\n\nENTRY %main (p: f32[512,512]) -> f32[512,512] {{\n" + "".join(
        f"  {line}\n" for line in ('%p = f32[512,512]{1,0} parameter(0)', *lines)
    ) + "}\n"


def test_a_chain_holds_two_and_a_long_life_three():
    chain = program(
        "%a = f32[512,512]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
        "%b = f32[512,512]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
        "ROOT %c = f32[512,512]{1,0} dot(%b, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
    )
    assert [b.size for b in heap.fullest(chain)] == [MB, MB]
    longer = chain.replace("ROOT %c = f32[512,512]{1,0} dot(%b, %b)", "ROOT %c = f32[512,512]{1,0} dot(%b, %a)")
    assert sum(b.size for b in heap.fullest(longer)) == 3 * MB


def test_a_fusion_overwrites_an_operand_that_dies():
    fused = program(
        "%a = f32[512,512]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
        "%b = f32[512,512]{1,0} add(%a, %a)",
        "ROOT %c = f32[512,512]{1,0} add(%b, %b)",
    )
    assert sum(b.size for b in heap.fullest(fused)) == MB


def test_what_lies_on_the_chip_is_nothing_and_tiles_are_full():
    assert heap.padded_bytes("f32[512,512]{1,0:T(8,128)}") == MB
    assert heap.padded_bytes("f32[4,16]{1,0:T(8,128)}") == 8 * 128 * 4
    assert heap.padded_bytes("f32[16,4]{0,1:T(8,128)}") == 8 * 128 * 4  # the first dim is the fastest
    assert heap.padded_bytes("bf16[3,9,130]{2,1,0:T(8,128)(2,1)}") == 3 * 16 * 256 * 2
    assert heap.padded_bytes("f32[512,512]{1,0:T(8,128)S(1)}") == 0
    assert heap.padded_bytes("(f32[512,512]{1,0}, s32[2]{0})") == MB + 8
    assert heap.padded_bytes("f32[]") == 4


def test_a_result_that_takes_an_arguments_place_is_no_buffer():
    text = program("ROOT %a = (f32[512,512]{1,0}) tuple(%b)").replace(
        "  ROOT", "  %b = f32[512,512]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={0}\n  ROOT"
    )
    assert sum(b.size for b in heap.fullest(text)) == MB
    assert heap.fullest(text.replace("is_scheduled=true", "is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias) }")) == []


L, D = 6, 256


@pytest.fixture(scope="module")
def scanned():
    """The gradient of L layers by scan on a CPU: the forward loop stacks what the backward loop reads."""

    def loss(w_LDD, x_BD):
        return jnp.sum(jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x_BD, w_LDD)[0])

    f = lambda w, x: jax.tree.map(lambda p, g: p - 0.1 * g, w, jax.grad(loss)(w, x))  # noqa: E731
    w, x = jax.ShapeDtypeStruct((L, D, D), jnp.float32), jax.ShapeDtypeStruct((4 * D, D), jnp.float32)
    return jax.jit(f).lower(w, x).compile()


def test_stacks_of_a_scan_are_activations_and_its_sums_gradients(scanned):
    buffers = heap.fullest(scanned.as_text())
    activations, gradients, _ = memory.split(buffers, [[L, D, D]])
    stack, parameter = L * 4 * D * D * 4, L * D * D * 4
    # What the backward pass of sin(x @ w) needs: x, and cos of x @ w (or what it is made of).
    assert (activations, gradients) == (2 * stack, parameter)


def test_the_sum_is_what_the_compiler_says(scanned):
    said = scanned.memory_analysis()
    found = sum(b.size for b in heap.fullest(scanned.as_text()))
    outputs = said.output_size_in_bytes - said.alias_size_in_bytes
    assert abs(found - (said.temp_size_in_bytes + outputs)) < 0.15 * found

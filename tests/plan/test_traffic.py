"""FLOPs and bytes of instructions written by hand, and of what the CPU compiler makes of matrix products."""
import pytest

from effmodels.plan import hlo
from effmodels.plan.compiled.traffic import Traffic
from tests.plan.programs import computation, module


def last(body, others=""):
    parsed = hlo.parse(module(body, others))
    return Traffic(parsed), parsed.computations[parsed.entry][-1]


def counted(size, window, out, stride, low, lhs_dilate, rhs_dilate):
    """The definition: outputs times taps whose input element exists."""
    total = 0
    for o in range(out):
        for tap in range(window):
            at = o * stride + tap * rhs_dilate - low
            total += at % lhs_dilate == 0 and 0 <= at // lhs_dilate < size
    return total


def test_a_matrix_product():
    traffic, convolution = last("%x = bf16[128,96]{1,0} parameter(1)\n%w = bf16[96,64]{1,0} parameter(2)\n"
                                "%c = f32[128,64]{1,0} convolution(%x, %w), dim_labels=bf_io->bf")  # fmt: skip
    assert traffic.flops(convolution) == 2 * 128 * 96 * 64 and traffic.bytes(convolution) == 2 * 96 * (128 + 64) + 4 * 128 * 64


@pytest.mark.parametrize("size, window, stride, low, high, lhs_dilate, rhs_dilate", [
    (1, 8, 1, 7, 7, 1, 1),  # heads of a projection: window of the heads, one input
    (8, 8, 1, 0, 0, 1, 1),  # contracted heads
    (6, 6, 5, 0, 0, 6, 1),  # a batch dim: each output meets one tap
    (7, 3, 2, 1, 1, 1, 2),
    (5, 4, 1, 2, 3, 2, 1),
])  # fmt: skip
def test_windows_count_what_meets(size, window, stride, low, high, lhs_dilate, rhs_dilate):
    spread, reach = (size - 1) * lhs_dilate + 1, (window - 1) * rhs_dilate + 1
    out = (spread + low + high - reach) // stride + 1
    text = f"size={window} stride={stride} pad={low}_{high} lhs_dilate={lhs_dilate} rhs_dilate={rhs_dilate}"
    body = f"%x = bf16[{size},32,16]{{2,1,0}} parameter(1)\n%w = bf16[16,{window},24]{{2,1,0}} parameter(2)\n" \
           f"%c = f32[{out},32,24]{{2,1,0}} convolution(%x, %w), window={{{text}}}, dim_labels=0bf_i0o->0bf"  # fmt: skip
    traffic, convolution = last(body)
    pairs = counted(size, window, out, stride, low, lhs_dilate, rhs_dilate)
    assert traffic.flops(convolution) == 2 * 32 * 24 * 16 * pairs > 0


def test_dots_and_fusions_of_fusions():
    inner = computation("deep", "%a = f32[32,64]{1,0} parameter(0)\n%b = f32[64,16]{1,0} parameter(1)\n"
                        "ROOT %d = f32[32,16]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}")  # fmt: skip
    outer = computation("shallow", "%e = f32[32,64]{1,0} parameter(0)\n%g = f32[64,16]{1,0} parameter(1)\n"
                        "%h = f32[32,16]{1,0} fusion(%e, %g), kind=kOutput, calls=%deep\nROOT %n = f32[32,16]{1,0} negate(%h)")  # fmt: skip
    traffic, fusion = last("%x = f32[32,64]{1,0} parameter(1)\n%w = f32[64,16]{1,0} parameter(2)\n"
                           "%f = f32[32,16]{1,0} fusion(%x, %w), kind=kOutput, calls=%shallow", inner + outer)  # fmt: skip
    assert traffic.flops(fusion) == 2 * 32 * 16 * 64
    assert traffic.bytes(fusion) == 4 * (32 * 64 + 64 * 16 + 32 * 16)


def test_slices_updates_and_memory_on_the_chip():
    body = computation("part", """
        %s = f32[16,64,128]{2,1,0} parameter(0)
        %u = f32[1,64,128]{2,1,0} parameter(1)
        %k = s32[] parameter(2)
        %v = f32[1,64,128]{2,1,0} dynamic-slice(%s, %k, %k, %k), dynamic_slice_sizes={1,64,128}
        %t = f32[1,64,128]{2,1,0} add(%v, %u)
        ROOT %r = f32[16,64,128]{2,1,0} dynamic-update-slice(%s, %t, %k, %k, %k)""".strip())  # fmt: skip
    operands = "%x = f32[16,64,128]{2,1,0} parameter(1)\n%y = f32[1,64,128]{2,1,0SPACE} parameter(2)\n%i = s32[] parameter(3)\n"
    call = operands + "%f = f32[16,64,128]{2,1,0} fusion(%x, %y, %i), kind=kLoop, calls=%part"
    part = 4 * 64 * 128
    traffic, fusion = last(call.replace("SPACE", ""), body)
    assert traffic.bytes(fusion) == 3 * part + 4  # read the slice and the update, write the slice; the index
    traffic, fusion = last(call.replace("SPACE", ":T(8,128)S(3)"), body)
    assert traffic.bytes(fusion) == 2 * part + 4


@pytest.mark.parametrize("text, size", [
    ("f32[100,200]{1,0}", 80_000), ("f32[100,200]{1,0:T(8,128)}", 104 * 256 * 4), ("f32[100,200]{0,1:T(8,128)}", 200 * 128 * 4),
    ("bf16[3,5]{1,0:T(8,128)(2,1)S(3)}", 8 * 128 * 2), ("s32[5]{0:T(128)}", 512), ("pred[]", 1), ("s4[8]{0}", 4),
])  # fmt: skip
def test_arrays_lie_in_whole_tiles(text, size):
    assert hlo.physical_bytes(text) == size


@pytest.mark.core
def test_what_a_compiler_makes_of_an_einsum():
    import jax
    import jax.numpy as jnp

    x, w = jax.ShapeDtypeStruct((6, 40, 24), jnp.float32), jax.ShapeDtypeStruct((6, 24, 56), jnp.float32)
    text = jax.jit(lambda x, w: jnp.tanh(jnp.einsum("bij,bjk->bik", x, w))).lower(x, w).compile().as_text()
    parsed = hlo.parse(text)
    traffic = Traffic(parsed)
    total = sum(traffic.flops(i) for body in parsed.computations.values() for i in body if i.opcode in ("dot", "convolution"))
    assert total == 2 * 6 * 40 * 24 * 56

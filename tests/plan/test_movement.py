"""What moves bytes only: the compiler's estimate at its share, and what it says nothing about by bytes and elements."""
import pytest

from effmodels.plan import chips, hlo
from effmodels.plan.compiled import movement
from effmodels.plan.compiled.traffic import Traffic
from tests.plan.programs import BANDWIDTH, computation, cycles, module

CYCLE = 1 / 1050e6
TABLE = "%x = f32[4096,1024]{1,0} parameter(1)\n%i = s32[2048,1]{1,0} parameter(2)\n"


def seconds(body, others="", chip="v4"):
    parsed = hlo.parse(module(body, others))
    return movement.seconds(parsed.computations[parsed.entry][-1], Traffic(parsed), chips.get(chip))


def test_half_of_the_estimate_but_no_less_than_the_bandwidth():
    call = TABLE + "%a = f32[4096,1024]{1,0} add(%x, %x), "
    assert seconds(call + cycles(10**6)) == pytest.approx(movement.SHARE * 10**6 * CYCLE)
    assert seconds(call + cycles(10)) == pytest.approx(3 * 4 * 4096 * 1024 / BANDWIDTH)
    tiny = "%x = f32[8]{0} parameter(1)\n%a = f32[8]{0} add(%x, %x), "
    assert seconds(tiny + cycles(10)) == pytest.approx(movement.LEAST * CYCLE)


def test_changes_of_layout_and_sorts():
    size = 4 * 4096 * 1024
    assert seconds(TABLE + "%r = f32[1024,4096]{1,0} reshape(%x)") == pytest.approx(movement.RELAYOUT * 2 * size / BANDWIDTH)
    on_chip = TABLE.replace("1,0} parameter(1)", "1,0:T(8,128)S(3)} parameter(1)")
    assert seconds(on_chip + "%r = f32[1024,4096]{1,0:T(8,128)S(3)} reshape(%x)") == pytest.approx(movement.RELAYOUT * 2 * size / BANDWIDTH)
    assert seconds(TABLE + "%s = f32[4096,1024]{1,0} sort(%x), dimensions={0}") == pytest.approx(movement.SORT * 2 * size / BANDWIDTH)


def test_an_update_in_place_moves_what_it_writes():
    """However large the array that it writes into."""
    body = TABLE + "%k = s32[] constant(0)\n%u = f32[1024,1024]{1,0} parameter(3)\n" \
           "%d = f32[4096,1024]{1,0} dynamic-update-slice(%x, %u, %k, %k)"  # fmt: skip
    assert seconds(body) == pytest.approx(movement.RELAYOUT * 2 * 4 * 1024**2 / BANDWIDTH)
    assert seconds(body.replace("[1024,1024]", "[1,8]")) == pytest.approx(movement.LEAST * CYCLE)


def test_gathers_of_rows_and_of_elements_also_in_fusions():
    rows = seconds(TABLE + "%g = f32[2048,1024]{1,0} gather(%x, %i), offset_dims={1}, slice_sizes={1,1024}")
    assert rows == pytest.approx(movement.RELAYOUT * 4 * 2048 * 1024 / BANDWIDTH)
    inner = computation("deep", TABLE.replace("parameter(1)", "parameter(0)").replace("parameter(2)", "parameter(1)") +
                        "ROOT %g = f32[2048]{0} gather(%x, %i), offset_dims={}, slice_sizes={1,1}")  # fmt: skip
    found = seconds(TABLE + "%f = f32[2048]{0} fusion(%x, %i), kind=kCustom, calls=%deep", inner)
    assert found == pytest.approx(movement.GATHER * 2048 * CYCLE)


@pytest.mark.parametrize("window, number", [("", 2048 * 1024), ("1", 2048)])
def test_scatters_count_windows(window, number):
    body = TABLE + "%u = f32[2048,1024]{1,0} parameter(3)\n" \
           f"%s = f32[4096,1024]{{1,0}} scatter(%x, %i, %u), update_window_dims={{{window}}}"  # fmt: skip
    moved = 4 * (2 * 4096 * 1024 + 2048 * 1024) + 4 * 2048
    assert seconds(body) == pytest.approx(max(movement.SCATTER * number * CYCLE, movement.RELAYOUT * moved / BANDWIDTH), rel=0.02)
    if not window:
        assert seconds(body) == pytest.approx(movement.SCATTER * number * CYCLE)


def test_no_factors_where_none_were_measured():
    cpu = chips.measured("cpu", 1e11, 1e10)
    parsed = hlo.parse(module(TABLE + "%r = f32[1024,4096]{1,0} reshape(%x)"))
    assert movement.seconds(parsed.computations[parsed.entry][-1], Traffic(parsed), cpu) == pytest.approx(2 * 4 * 4096 * 1024 / 1e10)

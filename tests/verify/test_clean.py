"""No false alarm: right code passes for every draw of parameters and batch; and the report that a person gets."""
import jax
import pytest

from effmodels.verify import CHECKS, verify
from effmodels.verify.case import Case
from effmodels.verify.run import run_check
from tests.verify.cases import EXPERTS_ONLY, tiny

MIXED = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.slow
def test_every_check_passes():
    lines = []
    report = verify(tiny(MIXED, dropout=0.1, **EXPERTS_ONLY), log=lines.append)
    assert report.passed, report.table()
    assert [o.check for o in report.outcomes] == list(CHECKS) and not any(o.skipped for o in report.outcomes)
    assert report.setting["mesh"]["tensor"] == 2 and report.setting["parameters"] > 0
    assert len(lines) == 1 + len(CHECKS) and all(f"{name} " in line for name, line in zip(CHECKS, lines[1:]))
    rows = [r for o in report.outcomes for r in o.rows if o.check != "bf16"]
    assert all(r.value <= 0.5 * r.bound for r in rows), report.table()  # room to every bound


@pytest.mark.slow
def test_hundred_draws_without_a_false_alarm():
    """The programs are compiled once; every draw of parameters, documents and tokens runs all checks that read the batch."""
    case, alarms, replayed = Case(tiny(MIXED), jax.devices()), [], 0
    for seed in range(100):
        case.draw(seed)
        for name in ("mesh", "update", "packed", "remat", "accumulation", "forms", "bf16"):
            outcome = run_check(case, name, lambda _: None)
            if not outcome.passed:
                alarms.append((seed, name, [r for r in outcome.rows if not r.passed]))
        replayed += case.replayed
    assert not alarms, alarms[:5]
    print(f"100 draws, {replayed} tokens replayed for ties")

"""Times by the schedule that the TPU compiler makes, each contestant compiled in its own process (`effmodels.plan.schedule.instrument`)."""
import dataclasses

import jax
import numpy as np

from effmodels.plan.schedule import instrument
from experiments.kernels import cases, contestants


def measure(case, contestant, generation):
    """Cycles of the whole program on one chip, and how its costliest kernel uses the units; raises what the compiler raises.

    Milliseconds on v4 only: elsewhere the cycles were not compared with any timing.
    """
    arguments = {"contestant": contestant, "case": dataclasses.asdict(case)}
    report = instrument.measure("experiments.kernels.static:program", arguments, generation=generation)
    result = {"cycles": round(report.cycles), "temporary_bytes": report.temp_bytes}
    if report.calibrated:
        result["milliseconds"] = report.microseconds / 1e3
        # Without what surrounds the kernels: transposes of operands that in a model join the operation before.
        result["kernels_milliseconds"] = sum(k.calls * k.cycles for k in report.kernels) / report.megahertz / 1e3
    if report.kernels:
        main = max(report.kernels, key=lambda k: k.calls * k.cycles)
        result |= {
            "mxu_share": None if main.mxu is None else round(main.mxu, 3),
            "mxu_share_hottest": None if main.mxu is None else round(main.hot.mxu, 3),
            "kernels": {k.name: [k.calls, round(k.cycles)] for k in report.kernels},
            "trips": [list(loop.trips) for loop in main.loops[:1]],
        }
    return result


def program(contestant, case):
    """(f, arguments) in the child process. Group sizes are given by value: control flow hangs on them."""
    case = cases.Case(**{**case, "shape": tuple(map(tuple, case["shape"]))})
    f, arguments = contestants.build(contestant, case)
    if case.op == "grouped_matmul":
        arguments = [*arguments[:2], cases.group_sizes(**dict(case.shape))]
    return f, [x if isinstance(x, np.ndarray) else jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arguments]

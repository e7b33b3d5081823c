"""FLOPs that a traced program executes, loops multiplied: those of its matmuls, and what its kernels say of themselves.

A multiply-add is two. What recomputation adds is in the traced program, and so is counted. Sharded parts are counted once per device.
"""
import math

from jax.interpreters import partial_eval


def flops(jaxpr) -> tuple[float, int]:
    """(FLOPs of all devices, number of loops whose length is not known, counted once) of a jaxpr or ClosedJaxpr.

    What no result depends on is left out, as the compiler does: a gradient rule that calls `jax.vjp` traces its forward pass too.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return _count(partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0])


def _count(jaxpr):
    total, unknown = 0.0, 0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        if name in _MATMULS:
            total += _MATMULS[name](equation)
        elif name == "pallas_call":
            total += _kernel(equation)
        else:
            times, bodies = _inner(name, params)
            counts = [_count(body) for body in bodies]
            unknown += sum(count for _, count in counts) + (name == "while" and any(f for f, _ in counts))
            found = [f for f, _ in counts]
            total += times * (max(found, default=0.0) if name == "cond" else sum(found))
    return total, unknown


def _inner(name, params):
    """(how often, jaxprs) of an equation that calls others."""
    if name == "scan":
        return params["length"], [params["jaxpr"]]
    if name == "while":
        return 1, [params["body_jaxpr"]]
    if name == "cond":
        return 1, list(params["branches"])
    if name == "shard_map":
        return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"]), [params["jaxpr"]]
    return 1, [value for key in ("jaxpr", "call_jaxpr", "fun_jaxpr", "call") if hasattr(value := params.get(key), "eqns")]


def _dot(equation):
    (contracted, _), _ = equation.params["dimension_numbers"]
    lhs = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(lhs[i] for i in contracted)


def _ragged(equation):
    """Every row meets one group: rows x the summed dim x the columns, of whichever operand is ragged."""
    lhs, rhs = (v.aval.shape for v in equation.invars[:2])
    dims = equation.params["ragged_dot_dimension_numbers"]
    (contracted, other), _ = dims.dot_dimension_numbers
    columns = math.prod(n for i, n in enumerate(rhs) if i not in (*other, *dims.rhs_group_dimensions))
    return 2.0 * math.prod(lhs) * columns


def _convolution(equation):
    kernel, out = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
    features = equation.params["dimension_numbers"].rhs_spec[0]
    return 2.0 * math.prod(out) * math.prod(n for i, n in enumerate(kernel) if i != features)


_MATMULS = {"dot_general": _dot, "ragged_dot_general": _ragged, "ragged_dot": _ragged, "conv_general_dilated": _convolution}


def _kernel(equation):
    estimate = equation.params.get("cost_estimate")
    return float(estimate.flops) if estimate is not None else 0.0

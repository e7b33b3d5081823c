"""Values of the small arguments of kernels (tables of blocks, group sizes, grid bounds) that are known before a program runs.

A kernel's path through its grid may hang on tables that it is given in scalar memory. Where they follow from constants and from arguments
given by value, they are computed here on the CPU, by evaluating the traced program as far as its known values reach.
"""
import dataclasses

import jax
import numpy as np

_LIMIT = 1 << 22  # values of one array; larger ones are never tables
_ITERATIONS = 256  # of a scan; in longer ones only what does not change is known
_CALLS = ("jaxpr", "call_jaxpr", "fun_jaxpr", "call")  # where calls (jit, remat, custom rules, shard_map) keep what they call


@dataclasses.dataclass(frozen=True)
class KernelCall:
    """One `pallas_call` of a program: its operands' shapes, and {operand: value} of those that are known, each time that it runs.

    A call in a scan runs as often as the scan; one in a loop of unknown length has one entry, of what no iteration changes.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    runs: tuple[dict[int, np.ndarray], ...]

    @property
    def values(self):
        """Those of the only run."""
        (values,) = self.runs
        return values


def kernel_calls(jaxpr, arguments) -> list[KernelCall]:
    """The calls of kernels in a jaxpr in program order; `arguments`: its flat arguments, known ones as arrays, others anything else."""
    calls = []
    known = [np.asarray(a) if isinstance(a, (np.ndarray, jax.Array, int, float, bool, np.generic)) else None for a in arguments]
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        _evaluate(jaxpr, known, calls)
    return calls


def _evaluate(jaxpr, arguments, calls):
    constants, jaxpr = getattr(jaxpr, "consts", ()), getattr(jaxpr, "jaxpr", jaxpr)
    values = dict(zip(jaxpr.constvars, (_array(c) for c in constants)))
    values |= dict(zip(jaxpr.invars, arguments))

    def read(atom):
        return _array(atom.val) if hasattr(atom, "val") else values.get(atom)

    for equation in jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        outputs = _apply(equation, inputs, calls)
        values |= dict(zip(equation.outvars, outputs))
    return [read(atom) for atom in jaxpr.outvars]


def _array(value):
    try:
        return np.asarray(value)
    except TypeError:  # a random key
        return None


def _apply(equation, inputs, calls):
    """Outputs of one equation; None for what is not known."""
    name, params, unknown = equation.primitive.name, equation.params, [None] * len(equation.outvars)
    if name == "pallas_call":
        calls.append(_kernel_call(equation, inputs))
        return unknown
    if name in ("scan", "while", "cond"):
        return _visit_control_flow(name, equation, inputs, calls)
    inner = next((params[key] for key in _CALLS if key in params), None)
    if inner is not None:
        missing = len(getattr(inner, "jaxpr", inner).invars) - len(inputs)
        return _evaluate(inner, inputs, calls) if missing == 0 else unknown
    if name == "sharding_constraint":
        return inputs
    return _bind(equation, inputs)


def _visit_control_flow(name, equation, inputs, calls):
    """Finds the kernels inside."""
    params, found = equation.params, []
    if name == "cond":
        for branch in params["branches"]:
            _evaluate(branch, inputs[1:], found)
        outputs = [None] * len(equation.outvars)
    elif name == "scan":
        outputs = _scan(equation, inputs, found)
    else:
        first, fixed = params["cond_nconsts"], params["body_nconsts"]
        _evaluate(params["body_jaxpr"], inputs[first: first + fixed] + [None] * (len(inputs) - first - fixed), found)
        outputs = [None] * len(equation.outvars)
    calls += found
    return outputs if found else _bind(equation, inputs)


def _scan(equation, inputs, calls):
    """Outputs of a scan; its kernels are evaluated in every iteration, so that tables that hang on a counter are known."""
    params = equation.params
    body = getattr(params["jaxpr"], "jaxpr", params["jaxpr"])  # (fixed, carried, a slice of each scanned) -> (carried, a slice of each)
    number = _same_rank(equation.outvars, body.outvars)
    fixed = _same_rank(equation.invars, body.invars) - number
    carried, scanned = inputs[fixed: fixed + number], inputs[fixed + number:]
    unknown = [None] * (len(equation.outvars) - number)
    _evaluate(params["jaxpr"], inputs[:fixed] + [None] * (len(inputs) - fixed), calls)
    if not calls or params["length"] > _ITERATIONS:
        return [None] * number + unknown
    runs = [[] for _ in calls]
    for i in range(params["length"])[:: -1 if params["reverse"] else 1]:
        found = []
        slices = [None if x is None else x[i] for x in scanned]
        carried = _evaluate(params["jaxpr"], inputs[:fixed] + carried + slices, found)[:number]
        for all_runs, call in zip(runs, found):
            all_runs += call.runs
    calls[:] = [dataclasses.replace(call, runs=tuple(each)) for call, each in zip(calls, runs) if each]
    return carried + unknown


def _same_rank(outside, inside):
    return sum(a.aval.ndim == b.aval.ndim for a, b in zip(outside, inside))


def _bind(equation, inputs):
    """The equation computed, or unknowns if an input is unknown."""
    unknown = [None] * len(equation.outvars)
    if any(i is None for i in inputs) or equation.effects or any(getattr(v.aval, "size", _LIMIT + 1) > _LIMIT for v in equation.outvars):
        return unknown
    try:
        outputs = equation.primitive.bind(*inputs, **equation.params)
    except Exception:  # whatever cannot be computed here is not known; a kernel that needs it says so
        return unknown
    return [_array(o) for o in (outputs if equation.primitive.multiple_results else [outputs])]


def _kernel_call(equation, inputs):
    name = equation.params.get("name") or getattr(equation.params.get("name_and_src_info"), "name", "")
    shapes = tuple(tuple(v.aval.shape) for v in equation.invars)
    values = {i: v for i, v in enumerate(inputs) if v is not None and v.dtype.kind in "biu"}
    return KernelCall(name, shapes, (values,))

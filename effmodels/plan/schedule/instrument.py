"""How long a program takes on one TPU chip, and what its units do meanwhile, from the compiler's schedule alone.

    report = instrument.measure("some.module:function", {"heads": 16}, generation="v4")
    print(report.table())

The function returns (f, arguments): what to compile, and its arguments as arrays or ShapeDtypeStructs. Give the arguments that decide which
blocks are visited (group sizes, segment ids) as arrays: tables that follow from them are computed and fed to the simulated scalar unit.

Cycles are those of `simulate`: on v4 within 15 % of published timings, always low (no launch overhead, no contention). On other generations
they were not compared with any timing: there only the shares of issue slots are to be trusted, and `calibrated` is False.
"""
import dataclasses
import importlib
import importlib.metadata
import json
import re
import sys

import numpy as np

from effmodels.plan import hlo, topology
from effmodels.plan.schedule import bundles, dump, simulate, usage
from effmodels.plan.schedule.bundles import NotUnderstood
from effmodels.plan.schedule.cores import CORES
from effmodels.plan.schedule.use import Hot, Loop, OpCost, Report


class UnknownScalars(ValueError):
    """A kernel's path hangs on scalars whose values were not given."""


def measure(
    target: str, arguments: dict | None = None, *, generation="v4", tables: dict | None = None, strict=True, libtpu_times=False
) -> Report:
    """Compiles `module:function`(**arguments) in a process of its own and returns the Report of its schedule.

    arguments: JSON. tables: {kernel name: {operand index: nested list}}, values of operands that this finds no other way.
    strict=False reports a kernel whose path hangs on unknown scalars (its `undecided`) instead of raising UnknownScalars.
    libtpu_times: where no tables matter, cycles by libtpu's own simulator, which v4 lacks: about a minute for a million cycles.
    """
    if libtpu_times and generation == "v4":
        raise ValueError("libtpu has no simulator of its own for v4; leave libtpu_times out.")
    request = {"target": target, "arguments": arguments or {}, "generation": generation, "tables": tables or {}, "strict": strict}
    answer = dump.in_child("effmodels.plan.schedule.instrument", request, libtpu_times=libtpu_times)
    if "error" in answer:
        kinds = {"NotUnderstood": NotUnderstood, "UnknownScalars": UnknownScalars}
        raise kinds.get(answer["error"], dump.CompilerError)(answer["message"])
    return _report(answer)


def _report(answer):
    """A Report from its JSON."""

    def op(fields):
        hot, loops = fields["hot"], fields["loops"]
        lists = {name: tuple(fields[name]) for name in ("core_cycles", "issued", "unfed")}
        loops = tuple(Loop(**{**loop, "trips": tuple(loop["trips"])}) for loop in loops)
        return OpCost(**{**fields, **lists, "hot": Hot(**hot) if hot else None, "loops": loops})

    return Report(**{**answer, "ops": tuple(op(fields) for fields in answer["ops"])})


# In the child.


def profile(text, dumped, generation, *, arguments=(), constants=None, strict=True):
    """Costs of every instruction of an HLO text in order of execution; of a conditional, those of its costlier branch.

    arguments: those of the program, None where not known; constants: {kernel: [{operand: array} of each run]}. strict=False: a kernel whose
    path hangs on unknown scalars has them in `undecided`, and code that is not understood the compiler's estimate.
    """
    module = hlo.parse(text)
    return _Profile(module, dumped, CORES[generation], _Known(module, arguments, constants or {}), strict).costs(module.entry, 1)


# Whatever is not free and has neither bundles nor an estimate is listed as unpriced.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id"}


def _free(instruction):
    """Names for values, copies that run beside the rest, single scalars."""
    beside = instruction.opcode.endswith(("-start", "-done"))
    return instruction.opcode in _FREE or beside or re.match(r"\w+\[[1,]*\]", instruction.type) is not None


class _Known:
    """Words of small tables by instruction: given ones, and those that the scalar unit of a kernel computed."""

    def __init__(self, module, arguments, constants):
        self.instructions, self.constants, self.results = module.instructions(), constants, {}
        for instruction in module.computations[module.entry]:
            if instruction.opcode == "parameter":
                value = arguments[instruction.number] if instruction.number < len(arguments) else None
                if value is not None and np.asarray(value).dtype.kind in "biu":
                    self.results[instruction.name, 0] = hlo.words(np.asarray(value), instruction.type)

    def runs(self, instruction):
        """{operand: words} of each time that a kernel runs; of one time where all are the same."""
        words = {i: found for i, name in enumerate(instruction.operands) if (found := self._result(name)) is not None}
        types = [self.instructions[name].type for name in instruction.operands]
        runs = self.constants.get(instruction.name, [{}])
        return [words | {i: hlo.words(np.asarray(array), types[i]) for i, array in run.items()} for run in runs]

    def _result(self, name):
        instruction = self.instructions.get(name)
        while instruction is not None and instruction.opcode in ("bitcast", "copy", "copy-start", "copy-done"):
            name = instruction.operands[0]
            instruction = self.instructions.get(name)
        if instruction is not None and instruction.opcode == "get-tuple-element":
            index = int(instruction.attributes.split("index=")[1].split(",")[0])
            return self.results.get((instruction.operands[0], index))
        return self.results.get((name, 0))

    def keep(self, instruction, results):
        """Remembers what a kernel's scalar unit wrote to its results (its operands' indices go on into its results')."""
        first = len(instruction.operands)
        for index, words in results.items():
            if index >= first and words:
                table = np.zeros(max(words) + 1, np.uint32)
                table[list(words)] = list(words.values())
                self.results[instruction.name, index - first] = table


class _Profile:
    def __init__(self, module, dumped, core, known, strict):
        self.module, self.dumped, self.core, self.known, self.strict = module, dumped, core, known, strict
        self.done = {}  # (file, operands' words) -> cost, results

    def costs(self, computation, calls):
        found = []
        for instruction in self.module.computations[computation]:
            if instruction.opcode == "while":
                times = hlo.trip_count(self.module, instruction)
                found += self.costs(hlo.called(instruction, "body"), calls * times) if times else []
            elif instruction.opcode == "call":
                found += self.costs(hlo.called(instruction, "to_apply"), calls)
            elif instruction.opcode == "conditional":
                branches = [self.costs(name, calls) for name in hlo.branches(instruction)]
                found += max(branches, key=lambda costs: sum(c.calls * c.cycles for c in costs))
            elif self.dumped.of(instruction.name) or not _free(instruction):
                found.append(self.cost(instruction, calls))
        return found

    def cost(self, instruction, calls):
        estimate, files = float(instruction.estimated_cycles), self.dumped.of(instruction.name)
        kind = "kernel" if instruction.is_kernel else instruction.opcode
        fields = {"name": instruction.name, "opcode": kind, "calls": calls, "estimate": estimate}
        guess = OpCost(**fields, source="estimate" if estimate else "unpriced", cycles=estimate)
        if files is None:
            if instruction.is_kernel and self.strict:
                raise NotUnderstood(f"the compiler wrote no bundles for kernel {instruction.name}.")
            return guess
        runs = self.known.runs(instruction) if instruction.is_kernel else [{}]
        keys = [tuple((i, w.tobytes()) for i, w in sorted(operands.items())) for operands in runs]
        distinct = list({key: operands for key, operands in zip(keys, runs)}.items())
        weights = [keys.count(key) for key, _ in distinct]
        key = (files[0], tuple((key, weight) for (key, _), weight in zip(distinct, weights)))
        if key not in self.done:
            try:
                self.done[key] = _simulated(files, self.core, [operands for _, operands in distinct], weights)
            except NotUnderstood:
                if self.strict:
                    raise
                self.done[key] = None
        if self.done[key] is None:
            return guess
        cost, results = self.done[key]
        self.known.keep(instruction, results)
        if cost.undecided and instruction.is_kernel and self.strict:
            raise UnknownScalars(_advice(instruction, cost))
        if cost.undecided and not instruction.is_kernel and estimate:
            return guess  # a loop over data, such as a gather
        timed = self.dumped.timed.get(files[0])
        if timed and not any(runs) and not cost.unfed:  # libtpu's own simulator does not know tables
            fields |= {"source": "libtpu", "cycles": timed}
        return dataclasses.replace(cost, **fields)


def _advice(instruction, cost):
    what = ", ".join(cost.unfed or cost.unknown_loads or cost.unknown_ops)
    number, first = sum(cost.undecided.values()), next(iter(cost.undecided))
    return (
        f"what kernel {instruction.name} runs hangs on scalars that are not known: {what} ({number} decisions, the first: {first}). "
        f"Give the arguments that they follow from as arrays, or tables={{{instruction.base_name!r}: {{operand index: values}}}}."
    )


def _simulated(files, core, tables, weights):
    """(OpCost without a name, what the scalar unit wrote) of one program; of one that runs with several tables the mean, by weight."""
    program = bundles.program(files[0].read_text(errors="replace"))
    slots = bundles.slots(files[1].read_text(), len(program.bundles))
    runs = [[simulate.run(program, core, number, operands) for number in range(core.cores)] for operands in tables]
    slower = [max(cores, key=lambda run: run.cycles) for cores in runs]
    total, every = sum(weights), [run for cores in runs for run in cores]
    weighted = [(weight, run) for weight, cores in zip(weights, runs) for run in cores]
    executed = sum(weight * np.array(run.executed) for weight, run in weighted).tolist()
    waits = _summed({at: weight * wait for at, wait in run.matmul_waits.items()} for weight, run in weighted)

    def mean(values):
        return sum(weight * value for weight, value in zip(weights, values)) / total

    def per_core(field):
        return tuple(mean(getattr(run, field) for run in one_core) for one_core in zip(*runs))

    cycles = mean(run.cycles for run in slower)
    cost = OpCost(
        name="",
        opcode="",
        calls=1,
        source="bundles",
        cycles=cycles,
        bundles=len(program.bundles),
        core_cycles=per_core("cycles"),
        issued=per_core("issued"),
        dma_wait=mean(run.dma_wait for run in slower),
        dma_bytes=mean(sum(run.dma_bytes for run in cores) for cores in runs),
        matmul_wait=mean(sum(run.matmul_waits.values()) for run in slower),
        mxu=_mxu(program, core, executed, total * core.cores * cycles),
        slots=usage.slot_shares(slots, executed),
        used=_used(slots, executed, total),
        hot=_hot(program, core, slots, executed, total, waits),
        loops=_loops(runs[0]),
        unknown_loads=_summed(run.unknown_loads for run in every),
        unknown_ops=_summed(run.unknown_ops for run in every),
        undecided=_summed(run.undecided for run in every),
        unfed=tuple(dict.fromkeys(name for run in every for name in run.unfed)),
    )
    return cost, _summed((run.results for run in runs[0]), merge=lambda a, b: a | b, zero=dict) if len(runs) == 1 else {}


def _used(slots, executed, total, *span):
    return {name: number / total for name, number in usage.slots_used(slots, executed, *span).items()}


def _hot(program, core, slots, executed, total, waits):
    first, last = usage.hottest(executed)
    wait = sum(waits.get(at, 0.0) for at in range(first, last))
    return Hot(
        first=first,
        last=last,
        executions=executed[first] / total,
        share=sum(executed[first:last]) / sum(executed),
        matmul_wait=wait / total,
        mxu=_mxu(program, core, executed, sum(executed[first:last]) + wait, first, last),
        slots=usage.slot_shares(slots, executed, first, last),
        used=_used(slots, executed, total, first, last),
    )


def _mxu(program, core, executed, cycles, first=0, last=None):
    """Share of the time of all matrix units, of `cycles` each, in which the bundles from first to last - 1 feed them."""
    if not core.matrix_units:
        return None
    span = range(first, len(executed) if last is None else last)
    rows = sum(executed[at] * rows for at, fed in program.matmuls.items() if at in span for _, rows in fed)
    return rows / (core.matrix_units * cycles) if cycles else 0.0


def _loops(cores):
    """The loops with most trips, of one run."""
    trips = {span: tuple(run.loops.get(span, 0) for run in cores) for run in cores for span in run.loops}
    return tuple(Loop(*span, trips[span]) for span in sorted(trips, key=lambda span: -max(trips[span]))[:8])


def _summed(counts, merge=lambda a, b: a + b, zero=int):
    total = {}
    for each in counts:
        for name, count in each.items():
            total[name] = merge(total.get(name, zero()), count)
    return total


def matched(module, calls, given):
    """{HLO kernel: [{operand: array} of each run]}: the kernels traced (`tables.KernelCall`s) found again in the compiled program.

    Kernels with the same operand shapes but different tables are told apart by name, then by order; if their numbers differ, not at all.
    `given` are tables by the kernel's name.
    """
    constants, types = {}, module.instructions()
    kernels = sorted((i for i in types.values() if i.is_kernel), key=_number)
    groups = {}
    nameless = [call for call in calls if not any(_named(instruction, call) for instruction in kernels)]
    for instruction in kernels:
        named = [call for call in calls if _named(instruction, call)] or nameless
        alike = [call for call in named if call.shapes == _shapes(instruction, types)]
        groups.setdefault(tuple(id(call) for call in alike), (alike, []))[1].append(instruction)
    for traced, compiled in groups.values():
        same = traced and all(_same_values(call, traced[0]) for call in traced)
        if same or len(compiled) == len(traced):
            constants |= {i.name: [dict(run) for run in traced[0 if same else number].runs] for number, i in enumerate(compiled)}
    for instruction in kernels:
        for index, values in given.get(instruction.base_name, given.get(instruction.name, {})).items():
            dtype, shape = hlo.shape(types[instruction.operands[int(index)]].type)
            for run in constants.setdefault(instruction.name, [{}]):
                run[int(index)] = np.asarray(values).reshape(shape)
    return constants


def _named(instruction, call):
    """Whether the path of the instruction in the program has the kernel's name, as in "jit(f)/transpose(jvp(name))/pallas_call"."""
    path = re.search(r'op_name="([^"]*)"', instruction.attributes)
    return bool(call.name and path and re.search(rf"\b{re.escape(call.name)}\b", path.group(1)))


def _number(instruction):
    digits = instruction.name.rsplit(".", 1)[-1]
    return (instruction.base_name, int(digits) if digits.isdigit() else 0)


def _shapes(instruction, types):
    """Shapes of the operands; None for one that is not an array."""
    texts = [types[name].type if name in types else "(" for name in instruction.operands]
    return tuple(None if text.startswith("(") else hlo.shape(text)[1] for text in texts)


def _same_values(a, b):
    return len(a.runs) == len(b.runs) and all(
        x.keys() == y.keys() and all(np.array_equal(x[i], y[i]) for i in x) for x, y in zip(a.runs, b.runs)
    )


def _child(request):
    topology.quiet_environment()
    import jax

    from effmodels.plan.schedule import tables

    module, _, function = request["target"].partition(":")
    f, shapes = getattr(importlib.import_module(module), function)(**request["arguments"])
    traced, compiled = topology.trace_and_compile_for(request["generation"], f, *shapes, keep_unused=True)
    text, memory, core = compiled.as_text(), compiled.memory_analysis(), CORES[request["generation"]]
    arguments = [a if isinstance(a, (np.ndarray, jax.Array)) else None for a in jax.tree.leaves(shapes)]
    constants = matched(hlo.parse(text), tables.kernel_calls(traced.jaxpr, arguments), request["tables"])
    dumped = dump.read(request["dump"])
    costs = profile(text, dumped, request["generation"], arguments=arguments, constants=constants, strict=request["strict"])
    report = Report(
        target=request["target"],
        generation=request["generation"],
        calibrated=core.calibrated,
        megahertz=core.megahertz,
        jax=jax.__version__,
        libtpu=importlib.metadata.version("libtpu"),
        argument_bytes=memory.argument_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        ops=tuple(costs),
    )
    return dataclasses.asdict(report)


def main(request_file, result_file):
    with open(request_file) as f:
        request = json.load(f)
    try:
        answer = _child(request)
    except (NotUnderstood, UnknownScalars) as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    except Exception as error:  # raised again by the parent
        answer = {"error": "CompilerError", "message": f"{request['target']} for {request['generation']}: {type(error).__name__}: {error}"}
    with open(result_file, "w") as f:
        json.dump(answer, f)


if __name__ == "__main__":
    main(*sys.argv[1:])

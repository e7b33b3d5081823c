"""Memory by category from a compiled program, and its largest buffers.

What a chip holds between steps (parameters, optimiser, buffers, batch) is exact, from the shardings. The compiler reports how many bytes of
HBM it needs in all: `memory_analysis()` adds what lies in other memories of the chip to its temporaries, up to 128 MiB on v4. What they are
is read off the program (`heap`): of the buffers alive at the fullest moment, gradients are those of a parameter's shape that the backward
pass writes; activations are those that the forward pass wrote, the backward pass reads, and that have no parameter's shape. The rest (also
parameters in the compute dtype, padding, fragmentation) counts as temporaries.
"""
import collections
import re

from effmodels.plan.compiled import heap
from effmodels.plan.records import Memory

LARGEST = 5
_SIZE = r"([\d.]+)([KMGT]?)"
_GIVEN_UP = re.compile(rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)|Used {_SIZE} of {_SIZE} hbm", re.I)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def memory(compiled, programs, available):
    """(`Memory`, largest buffers as (what, bytes)) of a compiled step; programs: [(record of the program, its HLO text)].

    A step of several programs needs what the largest needs, and what the others use stays where it is meanwhile.
    """
    found = [_of_program(compiled, record, text, available) for record, text in programs]
    return max(found, key=lambda pair: pair[0].total)


def _of_program(compiled, record, text, available):
    held, said = compiled["bytes"], record["memory"]
    # Between the programs of one step the accumulator stays; inside a single one it is among what the compiler allocates.
    accumulator = compiled["accumulator"] if record["name"] in ("micro_step", "apply_step") else 0
    activations, gradients, rows = split(heap.fullest(text), compiled["parameter_shapes"])
    needed = said["temp"] + max(0, said["output"] - said["alias"])
    if said.get("hbm"):
        needed = max(0, said["hbm"] - said["argument"])
    gradients = min(gradients, needed)
    activations = min(activations, needed - gradients)
    padding = max(0, said["argument"] - sum(held.values()) - accumulator)
    whole = Memory(
        available=available,
        **{name: held.get(name, 0) for name in ("parameters", "optimizer", "buffers", "batch")},
        gradients=accumulator + gradients,
        activations=held.get("activations", 0) + activations,
        temporaries=needed - gradients - activations + padding,
        program=said["generated_code"],
    )
    return whole, largest(compiled["arrays"], rows)


def without_program(compiled, needed, available, text=None):
    """(`Memory`, largest buffers) of a step that the compiler gave up on, saying that it needs so many bytes (None: it did not say).

    text: the program before it was scheduled, as far as it came.
    """
    held, accumulator = compiled["bytes"], compiled["accumulator"] if compiled["accumulates"] else 0
    resident = sum(held.values()) + accumulator
    activations, gradients, rows = split(heap.fullest(text), compiled["parameter_shapes"]) if text else (0, 0, [])
    rest = max(0, (needed or 0) - resident)
    activations = min(activations, rest)
    whole = Memory(
        available=available,
        **{name: held.get(name, 0) for name in ("parameters", "optimizer", "buffers", "batch")},
        gradients=accumulator,
        activations=held.get("activations", 0) + activations,
        temporaries=rest - activations,
    )
    return whole, largest(compiled["arrays"], rows)


def split(buffers, parameter_shapes):
    """(bytes of activations, bytes of gradients, [(what, bytes)]) of the buffers alive at the fullest moment."""
    shapes, activations, gradients, rows = {tuple(s) for s in parameter_shapes}, 0, 0, []
    for b in buffers:
        of_parameter = b.shape in shapes
        if of_parameter and "backward" in b.written:
            gradients, kind = gradients + b.size, "gradient"
        elif not of_parameter and "forward" in b.written and b.read & {"backward", "recomputed"}:
            activations, kind = activations + b.size, "kept for the backward pass"
        else:
            kind = "copy of a parameter" if of_parameter else "temporary"
        where = ", ".join(part for part in (b.layer, b.source) if part)
        rows.append((f"{kind}: {b.type.split('{')[0]} {b.name}{f' ({where})' if where else ''}", b.size))
    return activations, gradients, rows


def largest(arrays, rows, number=LARGEST):
    """The largest of what a chip holds and of what lives at the fullest moment; equal ones are one line."""
    held = [(f"{kind}: {dtype}{shape} {name}", size) for kind, name, size, shape, dtype in arrays]
    counted = collections.Counter()
    for what, size in (*held, *rows):
        counted[what, size] += 1
    merged = [(f"{count} x {what}" if count > 1 else what, count * size) for (what, size), count in counted.items()]
    return tuple(sorted(merged, key=lambda row: -row[1])[:number])


def given_up(message):
    """(bytes needed, bytes available) of the compiler's message that a program does not fit; None where it does not say."""
    found = _GIVEN_UP.search(message)
    if not found:
        return None
    number, unit, limit, limit_unit = [g for g in found.groups() if g is not None]
    return int(float(number) * _UNITS[unit.upper()]), int(float(limit) * _UNITS[limit_unit.upper()])

"""Reading the compiled program: the optimized HLO text of a TPU executable, whose order is the order of execution.

Only what the schedule needs: instructions, operands, layouts of small tables, how often loops run, and XLA's own cost estimates.
"""
import dataclasses
import math
import re

import numpy as np


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    type: str  # with layout; of a tuple: in parentheses
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    number: int = 0  # of a parameter: which; of an integer constant: its value

    @property
    def estimated_cycles(self) -> int:
        """XLA's own cost model; 0 where it says nothing (kernels have none)."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(found.group(1)) if found else 0

    @property
    def is_kernel(self):
        return self.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in self.attributes

    @property
    def base_name(self):
        """Without the number that makes it unique."""
        return re.sub(r"(\.\d+)+$", "", self.name)


@dataclasses.dataclass(frozen=True)
class Module:
    computations: dict[str, tuple[Instruction, ...]]
    entry: str

    def instructions(self) -> dict[str, Instruction]:
        return {i.name: i for body in self.computations.values() for i in body}


_START = re.compile(r"^(ENTRY )?%?([\w.\-<>]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-<>]+) = ")


def parse(text: str) -> Module:
    """The Module of `compiled.as_text()`."""
    computations, entry, name, body, lines = {}, None, None, [], []

    def flush():
        if lines:
            body.append(_instruction("\n".join(lines)))
            lines.clear()

    for line in text.splitlines():
        start = _START.match(line) if name is None else None
        if start:
            name, body = start.group(2), []
            entry = name if start.group(1) else entry
        elif name is not None and line.rstrip() == "}":
            flush()
            computations[name], name = tuple(body), None
        elif name is not None:
            if _INSTRUCTION.match(line):
                flush()
            lines.append(line)  # attributes of kernels may hold line breaks
    if entry is None:
        raise ValueError("the HLO text has no ENTRY computation.")
    return Module(computations, entry)


def _instruction(text):
    head = _INSTRUCTION.match(text)
    rest = text[head.end():]
    end = _first(rest, " ")
    opcode = re.match(r"([\w\-]+)\(", rest[end + 1:])
    if not opcode:
        raise ValueError(f"not an HLO instruction: {text[:120]!r}")
    rest, type_text = rest[end + 1 + opcode.end():], rest[:end]
    end = _first(rest, ")")
    operands = tuple(re.findall(r"%([\w.\-<>]+)", rest[:end]))
    number = int(rest[:end]) if opcode.group(1) in ("parameter", "constant") and rest[:end].isdigit() else 0
    return Instruction(head.group(1), type_text, opcode.group(1), operands, rest[end + 1:], number)


def _first(text, wanted):
    """Where a letter first stands outside brackets."""
    depth = 0
    for i, letter in enumerate(text):
        if letter == wanted and depth == 0:
            return i
        depth += letter in "([{" or -(letter in ")]}")
    return len(text)


def called(instruction: Instruction, attribute: str) -> str:
    """Name of the computation that an instruction calls as `attribute`."""
    found = re.search(rf"\b{attribute}=%?([\w.\-<>]+)", instruction.attributes)
    if not found:
        raise ValueError(f"{instruction.opcode} {instruction.name} has no {attribute}.")
    return found.group(1)


def branches(instruction: Instruction) -> list[str]:
    """Computations of a conditional."""
    listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
    if listed:
        return re.findall(r"%?([\w.\-<>]+)", listed.group(1))
    return [called(instruction, "true_computation"), called(instruction, "false_computation")]


def trip_count(module: Module, loop: Instruction) -> int:
    """XLA's known trip count of a while loop, else the largest constant its condition compares with."""
    known = re.search(r'known_trip_count":?\s*\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known.group(1))
    condition = module.computations.get(called(loop, "condition"), ())
    constants = [i.number for i in condition if i.opcode == "constant" and i.number]
    if not constants:
        raise ValueError(f"how often loop {loop.name} runs is not in the HLO.")
    return max(constants)


_TYPE = re.compile(r"^(\w+)\[([\d,]*)\](?:\{([\d,]*)(?::((?:T|\()[^S}]*)?.*)?\})?")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "f32": 4, "bf16": 2, "f16": 2}
_OTHER_BYTES = {"f64": 8, "s64": 8, "u64": 8, "c64": 8, "c128": 16, "s4": 0.5, "u4": 0.5, "token": 0}


def width(dtype: str) -> float:
    """Bytes of an element of an HLO type; one where it is not known, such as the float8 types."""
    return BYTES.get(dtype, _OTHER_BYTES.get(dtype, 1))


def shape(type_text: str) -> tuple[str, tuple[int, ...]]:
    """(dtype, shape) of an array type."""
    found = _TYPE.match(type_text)
    if not found:
        raise ValueError(f"not an array type: {type_text[:80]!r}")
    return found.group(1), tuple(int(n) for n in found.group(2).split(",") if n)


def physical_bytes(type_text: str) -> float:
    """Bytes that an array of this type takes in memory, padded to whole tiles."""
    found = _TYPE.match(type_text)
    if not found:
        raise ValueError(f"not an array type: {type_text[:80]!r}")
    sizes = [int(n) for n in found.group(2).split(",") if n]
    order = [int(n) for n in (found.group(3) or "").split(",") if n] or list(range(len(sizes)))[::-1]
    tile = re.match(r"T?\(([\d,]+)\)", found.group(4) or "")
    if tile and sizes:
        for dim, n in zip(order, (int(n) for n in reversed(tile.group(1).split(",")))):
            sizes[dim] = -(-sizes[dim] // n) * n
    return math.prod(sizes) * width(found.group(1))


def words(array: np.ndarray, type_text: str) -> np.ndarray:
    """The 32-bit words of an array as they lie in memory in the layout of `type_text`, tiles and padding included."""
    found = _TYPE.match(type_text)
    if not found or found.group(1) not in BYTES:
        raise ValueError(f"no layout for a table of type {type_text[:80]!r}")
    order = [int(n) for n in (found.group(3) or "").split(",") if n] or list(range(array.ndim))[::-1]
    tiles = [tuple(int(n) for n in tile.split(",")) for tile in re.findall(r"\(([\d,]+)\)", found.group(4) or "")]
    size = BYTES[found.group(1)]
    flat = np.ascontiguousarray(np.transpose(np.atleast_1d(array), order[::-1] if array.ndim else (0,)))
    flat = flat.astype({1: np.int8, 2: np.int16, 4: np.int32}[size], casting="unsafe") if flat.dtype.kind in "biu" else flat
    for tile in tiles:
        flat = _tiled(flat, tile)
    data = flat.tobytes()
    return np.frombuffer(data + b"\0" * (-len(data) % 4), np.uint32)


def _tiled(array, tile):
    """The last dims split by the tile, tiles first: [..., n, m] -> [..., n/a, m/b, a, b]."""
    if array.ndim < len(tile):
        array = array.reshape((1,) * (len(tile) - array.ndim) + array.shape)
    lead = array.ndim - len(tile)
    sizes = array.shape[lead:]
    array = np.pad(array, [(0, 0)] * lead + [(0, -n % t) for n, t in zip(sizes, tile)])
    split = [x for n, t in zip(array.shape[lead:], tile) for x in (n // t, t)]
    array = array.reshape(array.shape[:lead] + tuple(split))
    outer, inner = range(lead, lead + 2 * len(tile), 2), range(lead + 1, lead + 2 * len(tile), 2)
    return np.ascontiguousarray(array.transpose(*range(lead), *outer, *inner))

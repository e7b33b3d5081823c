"""Which buffers of a compiled program are alive at its fullest moment: the compiler tells only how many bytes they are in all.

The program's order is the order of execution. A loop works in place on what it is given, an update in place on what it updates, a fusion
on an operand of its own type that nobody needs later; everything else gets a buffer from its instruction to its last user. What lies in
memory on the chip counts as nothing. Tiles are padded as the layout says.
"""
import dataclasses
import math
import re

from effmodels.plan import hlo
from effmodels.plan.compiled import traffic
from effmodels.plan.compiled.origin import Origins

_RENAMES = ("bitcast", "opt-barrier", "optimization-barrier", "add-dependency", "domain", "get-tuple-element")
_NOTHING = ("constant", "after-all", "partition-id", "replica-id")


@dataclasses.dataclass
class Buffer:
    """One piece of memory. written, read: phases of the instructions that do so; argument: number of the program's argument, or None."""

    size: int
    type: str
    name: str
    source: str = ""
    layer: str = ""
    argument: int | None = None
    written: set = dataclasses.field(default_factory=set)
    read: set = dataclasses.field(default_factory=set)

    @property
    def shape(self):
        return hlo.shape(self.type)[1]


def fullest(hlo_text) -> list[Buffer]:
    """The Buffers alive at the fullest moment of the program, largest first; its arguments are not among them."""
    module = hlo.parse(hlo_text)
    heap = _Heap(module, Origins(hlo_text, module), _aliases(hlo_text))
    return sorted(heap.run_entry(), key=lambda b: -b.size)


def padded_bytes(type_text) -> int:
    """Bytes of an array type in HBM with its tiles filled up; of a tuple, those of its parts; 0 for what lies elsewhere."""
    return sum(_padded(part) for part in re.findall(r"\w+\[[\d,]*\](?:\{[^{}]*\})?", type_text) if traffic.on_hbm(part))


def _padded(type_text):
    dtype, dims = hlo.shape(type_text)
    layout = re.search(r"\{([\d,]*)(?::.*?T\(([\d,]+)\))?", type_text)
    if layout and layout.group(2) and dims:
        order = [int(n) for n in layout.group(1).split(",") if n]
        tile = [int(n) for n in layout.group(2).split(",")]
        dims = list(dims)
        for k, size in zip(order, reversed(tile)):  # the fastest dim first
            dims[k] = -(-dims[k] // size) * size
    return math.ceil(math.prod(dims) * hlo.width(dtype))


def _aliases(text):
    """{path of the result as a tuple: number of the argument whose buffer it takes}."""
    header = text.split("\n", 1)[0]
    found = re.search(r"input_output_alias=\{(.*?)\s\}", header)
    pairs = re.findall(r"\{([\d, ]*)\}: \((\d+),", found.group(1)) if found else []
    return {tuple(int(n) for n in path.replace(" ", "").split(",") if n): int(number) for path, number in pairs}


class _Heap:
    def __init__(self, module, origins, aliases):
        self.module, self.origins, self.aliases = module, origins, aliases

    def run_entry(self):
        entry = self.module.computations[self.module.entry]
        arguments = {}
        for i in entry:
            if i.opcode == "parameter":
                arguments[i.number] = self._new(i, i.type, argument=i.number)
        outputs = {path[0]: arguments[number] for path, number in self.aliases.items() if len(path) == 1 and number in arguments}
        return self._run(entry, [arguments[n] for n in sorted(arguments)], outputs)[1]

    def _run(self, body, parameters, outputs):
        """(bytes, buffers) of the fullest moment. parameters: buffers (or tuples of them); outputs: {place in the result: its buffer}."""
        values, inside, last = {}, {}, {}
        given = {id(b) for value in parameters for b in _flat(value)}
        placed = self._placed(body, outputs)
        uses = self._last_uses(body)
        made = {}  # instruction -> buffers that it allocates
        for k, i in enumerate(body):
            operands = [values.get(name) for name in i.operands]
            phase = self.origins.of(i).phase
            for buffer in (b for value in operands for b in _flat(value)):
                last[id(buffer)] = k
                if i.opcode not in (*_RENAMES, "tuple", "while"):
                    buffer.read.add(phase)
            values[i.name], fresh = self._value(i, operands, parameters, placed, lambda name, k=k: uses.get(name, -1) <= k, given)
            if i.opcode == "while":
                inside[k] = self._loop(i, operands[0], phase)
            elif i.opcode == "call":
                inside[k] = self._run(self.module.computations[hlo.called(i, "to_apply")], operands, {})
            elif i.opcode == "conditional":
                runs = [self._run(self.module.computations[b], [v], {}) for b, v in zip(hlo.branches(i), operands[1:])]
                inside[k] = max(runs, key=lambda run: run[0])
            elif i.opcode not in (*_RENAMES, "tuple", "parameter"):
                for buffer in _flat(values[i.name]):
                    buffer.written.add(phase)
            made[k] = [b for b in fresh if id(b) not in given]
        for buffer in _flat(values.get(body[-1].name)):
            last[id(buffer)] = len(body)
        return _peak(len(body), made, last, inside)

    def _value(self, i, operands, parameters, placed, dies, given):
        """(value, buffers newly allocated) of an instruction."""
        if i.opcode == "parameter":
            return (parameters[i.number] if i.number < len(parameters) else None), []
        if i.opcode == "tuple":
            return tuple(operands), []
        if i.opcode == "get-tuple-element":
            index = int(re.search(r"index=(\d+)", i.attributes).group(1))
            return (operands[0][index] if isinstance(operands[0], tuple) else operands[0]), []
        if i.opcode in _RENAMES or i.opcode == "while" or i.opcode.endswith(("-done", "-update")):
            return (operands[0] if operands else None), []
        if i.opcode in _NOTHING:
            return None, []
        if i.opcode.endswith("-start"):
            buffer = self._new(i, _moved(i))
            return buffer, [buffer]
        types = _parts(i.type)
        if i.type.startswith("("):
            value = tuple(self._result(i, n, t, operands, placed, dies, given) for n, t in enumerate(types))
        else:
            value = self._result(i, 0, i.type, operands, placed, dies, given)
        known = {id(b) for operand in operands for b in _flat(operand)} | {id(b) for b in placed.values()}
        return value, [b for b in _flat(value) if id(b) not in known]

    def _result(self, i, place, type_text, operands, placed, dies, given):
        return placed.get((i.name, place)) or self._shared(i, type_text, operands, dies, given) or self._new(i, type_text)

    def _shared(self, i, type_text, operands, dies, given):
        """The buffer of an operand of the same type that this instruction may overwrite."""
        if i.opcode in ("custom-call", "copy", "transpose", "convolution", "dot") or padded_bytes(type_text) == 0:
            return None
        for name, operand in zip(i.operands, operands):
            if isinstance(operand, Buffer) and operand.type == type_text and id(operand) not in given and dies(name):
                return operand
        return None

    def _loop(self, i, value, phase):
        """The fullest moment of a while loop's body, beyond what it is given; marks what it writes and reads."""
        body = self.module.computations[hlo.called(i, "body")]
        root, by_name = body[-1], {j.name: j for j in body}
        outputs = dict(enumerate(value)) if isinstance(value, tuple) else {}
        kept = set()  # what the body hands on as it got it
        for n, name in enumerate(root.operands):
            j = _through(by_name.get(name), by_name, ("bitcast", "copy"))
            if j is not None and j.opcode == "get-tuple-element" and by_name.get(j.operands[0], j).opcode == "parameter":
                if int(re.search(r"index=(\d+)", j.attributes).group(1)) == n:
                    kept.add(n)
        for n, buffer in outputs.items():
            for b in _flat(buffer):
                (b.read if n in kept else b.written).add(phase)
        return self._run(body, [value], {n: b for n, b in outputs.items() if n not in kept})

    def _placed(self, body, outputs):
        """{(instruction, place in its result): buffer} of the instructions that write the result of this computation."""
        root, by_name, placed = body[-1], {i.name: i for i in body}, {}
        for n, name in enumerate(root.operands if root.opcode == "tuple" else ()):
            buffer = outputs.get(n)
            if not isinstance(buffer, Buffer):
                continue
            i, place = by_name.get(name), 0
            while i is not None and i.opcode in ("bitcast", "get-tuple-element"):
                if i.opcode == "get-tuple-element":
                    place = int(re.search(r"index=(\d+)", i.attributes).group(1))
                i = by_name.get(i.operands[0])
            if i is not None and i.opcode not in ("parameter", "while", "tuple", *_NOTHING):
                placed[i.name, place] = buffer
        return placed

    def _last_uses(self, body):
        """{instruction: index of its last user}, through those that only rename it."""
        last, by_name = {}, {i.name: i for i in body}
        for k, i in enumerate(body):
            for name in i.operands:
                while name in by_name:
                    last[name] = max(last.get(name, -1), k)
                    if by_name[name].opcode not in _RENAMES or not by_name[name].operands:
                        break
                    name = by_name[name].operands[0]
        # Forwards again: what is renamed lives as long as its new names.
        for i in reversed(body):
            if i.opcode in (*_RENAMES, "tuple") or i.opcode.endswith("-done"):
                for name in i.operands:
                    last[name] = max(last.get(name, -1), last.get(i.name, -1))
        return last

    def _new(self, i, type_text, argument=None):
        origin = self.origins.of(i)
        path = re.search(r'op_name="([^"]*)"', i.attributes)
        name = path.group(1).rsplit("/", 1)[-1] if path else i.base_name
        return Buffer(padded_bytes(type_text), type_text, name, origin.source, origin.layer, argument)


def _peak(length, made, last, inside):
    """(bytes, buffers) of the moment with most; inside: {index: the same of a computation that runs then}."""
    alive, total, best = {}, 0, (0, [])
    ends = {}
    for k in range(length):
        for b in made[k]:
            if id(b) not in alive:
                alive[id(b)] = b
                total += b.size
                ends.setdefault(last.get(id(b), k), []).append(b)
        inner, buffers = inside.get(k, (0, []))
        if total + inner > best[0]:
            best = (total + inner, [*alive.values(), *buffers])
        for b in ends.pop(k, ()):
            if alive.pop(id(b), None) is not None:
                total -= b.size
    return best


def _flat(value):
    """The buffers of a value."""
    if isinstance(value, Buffer):
        return [value]
    return [b for part in value for b in _flat(part)] if isinstance(value, tuple) else []


def _through(instruction, by_name, opcodes):
    while instruction is not None and instruction.opcode in opcodes:
        instruction = by_name.get(instruction.operands[0])
    return instruction


def _parts(type_text):
    return re.findall(r"\w+\[[\d,]*\](?:\{[^{}]*\})?", type_text)


def _moved(start):
    """The type of what the start of an asynchronous operation allocates: a copy's target stands first, other results last but for flags."""
    parts = [p for p in _parts(start.type) if not re.match(r"[us]32\[\]", p)] or [start.type]
    return parts[0] if start.opcode == "copy-start" else parts[-1]

"""What one instruction of a compiled program does: FLOPs of its matrix products, and the bytes that it moves to and from HBM.

Fusions are looked into: a parameter of which only slices are read counts as those slices, an update in place as what it writes, and what
lies in memory on the chip (a memory space other than 0 in its layout) as nothing. Arrays count as they lie, padded to whole tiles.
"""
import math
import re

import numpy as np

from effmodels.plan import hlo

_SLICES = ("dynamic-slice", "slice", "gather")
_RENAMES = ("bitcast", "reshape", "get-tuple-element")


class Traffic:
    """`flops(instruction)` and `bytes(instruction)` for the instructions of one module."""

    def __init__(self, module):
        self.module, self.instructions = module, module.instructions()

    def flops(self, instruction) -> float:
        """Of dots and convolutions, 2 per multiply-add; only pairs of elements that meet count, none of padding or dilation."""
        if instruction.opcode == "convolution":
            return _convolution(instruction, *(self.instructions[name].type for name in instruction.operands[:2]))
        if instruction.opcode == "dot":
            lhs = hlo.shape(self.instructions[instruction.operands[0]].type)[1]
            contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes).group(1)
            depth = math.prod(lhs[int(n)] for n in contracted.split(",") if n)
            return 2.0 * math.prod(hlo.shape(instruction.type)[1]) * depth
        if instruction.opcode == "fusion":
            return sum(self.flops(i) for i in self.body(instruction))
        return 0.0

    def bytes(self, instruction) -> float:
        """Read from and written to HBM by one run."""
        if instruction.opcode in ("dynamic-update-slice", "scatter"):
            return 2.0 * hbm_bytes(self.instructions[instruction.operands[-1 if instruction.opcode == "scatter" else 1]].type)
        if instruction.opcode in _SLICES:
            return 2.0 * hbm_bytes(instruction.type)
        if instruction.opcode != "fusion":
            return sum(hbm_bytes(self.type_of(name)) for name in instruction.operands) + hbm_bytes(instruction.type)
        body = self.body(instruction)
        read = sum(min(self._read(body, number), hbm_bytes(self.type_of(name))) for number, name in enumerate(instruction.operands))
        return read + self._written(body, instruction)

    def touched(self, instruction) -> float:
        """Bytes of its operands and results, whichever memory they lie in; of an update in place the update, read and written."""
        if instruction.opcode == "dynamic-update-slice":
            return 2.0 * _bytes(self.type_of(instruction.operands[1]))
        return sum(_bytes(self.type_of(name)) for name in instruction.operands) + self.result(instruction)

    def result(self, instruction) -> float:
        """Bytes of its results, whichever memory they lie in."""
        return _bytes(instruction.type)

    def type_of(self, name):
        """The type of an instruction; "" of a name that is none."""
        return self.instructions[name].type if name in self.instructions else ""

    def leaves(self, instruction):
        """The instruction, or what a fusion of fusions consists of."""
        if instruction.opcode != "fusion":
            yield instruction
        else:
            for i in self.body(instruction):
                yield from self.leaves(i)

    def body(self, fusion):
        """The instructions of the computation that a fusion calls."""
        return self.module.computations.get(hlo.called(fusion, "calls"), ())

    def _read(self, body, number):
        """Bytes that a fused computation reads of its parameter of this number, were it all in HBM."""
        parameter = next((i for i in body if i.opcode == "parameter" and i.number == number), None)
        if parameter is None:
            return 0.0
        total, whole, names = 0.0, _bytes(parameter.type), {parameter.name}
        for i in body:  # operands come before their users
            uses = [k for k, name in enumerate(i.operands) if name in names]
            if not uses:
                continue
            if i.opcode in _RENAMES:
                names.add(i.name)
            elif i.opcode in _SLICES and uses == [0]:
                total += _bytes(i.type)
            elif i.opcode == "fusion":
                total += sum(self._read(self.body(i), k) for k in uses)
            elif not (i.opcode == "dynamic-update-slice" and uses == [0]):
                return whole
        return min(total, whole)

    def _written(self, body, fusion):
        by_name = {i.name: i for i in body}
        root = body[-1] if body else None
        if root is None:
            return hbm_bytes(fusion.type)
        parts = [by_name[name] for name in root.operands] if root.opcode == "tuple" else [root]
        types = _parts(fusion.type)
        if len(parts) != len(types):
            return hbm_bytes(fusion.type)
        return sum(self._result(part, by_name) if on_hbm(kind) else 0.0 for part, kind in zip(parts, types))

    def _result(self, instruction, by_name):
        """Bytes of a result: of an update in place only the update."""
        while instruction.opcode in ("bitcast", "copy") and instruction.operands[0] in by_name:
            instruction = by_name[instruction.operands[0]]
        if instruction.opcode == "dynamic-update-slice":
            return _bytes(by_name[instruction.operands[1]].type)
        if instruction.opcode == "fusion":
            inner = {i.name: i for i in self.body(instruction)}
            return self._result(self.body(instruction)[-1], inner) if inner else _bytes(instruction.type)
        return _bytes(instruction.type)


def on_hbm(type_text) -> bool:
    """Whether an array of this type lies in HBM."""
    space = re.search(r"S\((\d+)\)", type_text)
    return space is None or space.group(1) == "0"


def hbm_bytes(type_text) -> float:
    """Bytes of the arrays of a type, a tuple's added up, that lie in HBM."""
    return sum(_bytes(part) for part in _parts(type_text) if on_hbm(part))


def _parts(type_text):
    """The array types of a type, tuples unfolded."""
    return re.findall(r"\w+\[[\d,]*\](?:\{[^{}]*\})?", type_text)


def _bytes(type_text):
    return sum(hlo.physical_bytes(part) for part in _parts(type_text))


def _convolution(instruction, lhs_type, rhs_type):
    lhs, rhs, out = (hlo.shape(t)[1] for t in (lhs_type, rhs_type, instruction.type))
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if not labels:
        raise ValueError(f"convolution {instruction.name} has no dim_labels.")
    lhs_dims, rhs_dims, out_dims = (dict(zip(text, sizes)) for text, sizes in zip(labels.groups(), (lhs, rhs, out)))
    pairs = 1
    for number, window in enumerate(_windows(instruction.attributes)):
        digit = str(number)
        pairs *= _meetings(lhs_dims[digit], rhs_dims[digit], out_dims[digit], **window)
    return 2.0 * out_dims["b"] * out_dims["f"] * rhs_dims["i"] * pairs


def _windows(attributes):
    """Per spatial dim the stride, padding and dilations of `window={...}`."""
    text = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(part.split("=") for part in text.group(1).split()) if text else {}
    number = len(fields["size"].split("x")) if "size" in fields else 0
    split = {name: value.split("x") for name, value in fields.items()}
    for i in range(number):
        yield {
            "stride": int(split.get("stride", ["1"] * number)[i]),
            "low": int(split.get("pad", ["0_0"] * number)[i].split("_")[0]),
            "lhs_dilate": int(split.get("lhs_dilate", ["1"] * number)[i]),
            "rhs_dilate": int(split.get("rhs_dilate", ["1"] * number)[i]),
        }


def _meetings(size, window, out, stride, low, lhs_dilate, rhs_dilate):
    """Pairs (output, tap of the window) along one dim whose input element exists."""
    if window == 1 and low == 0 and stride == 1 and lhs_dilate == 1:
        return out
    total, taps = 0, np.arange(window, dtype=np.int64) * rhs_dilate - low
    for start in range(0, out, 4096):
        at = np.arange(start, min(out, start + 4096), dtype=np.int64)[:, None] * stride + taps
        total += int(((at >= 0) & (at <= (size - 1) * lhs_dilate) & (at % lhs_dilate == 0)).sum())
    return total

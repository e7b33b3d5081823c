"""Where an instruction of a compiled program comes from: kind of layer, phase of the step, line of source.

XLA keeps with most instructions the path of transformations that made them ("jit(train_step)/transpose(jvp())/...") and the stack of Python
frames that traced them. What the compiler added itself (copies, prefetches) takes after what it feeds on, else after what it feeds.
"""
import dataclasses
import re

from effmodels.plan import hlo


@dataclasses.dataclass(frozen=True)
class Origin:
    layer: str = ""  # as in records.Operation
    phase: str = ""
    source: str = ""


# File of a frame (and its function) -> kind of layer. The outermost frame that matches decides: the norm of queries is part of attention.
_LAYERS = tuple(
    (re.compile(pattern), layer)
    for pattern, layer in (
        (r"effmodels/train/optim|/optax/|effmodels/train/step\.py:.*(apply_step|_metrics|_squares)|:Decoder\.update_buffers", "optimizer"),
        (r"effmodels/mixers/(?!base|registry|__init__)(\w+)\.py", None),
        (r"effmodels/channel/(mlp)\.py", None),
        (r"effmodels/channel/(?!base|registry|__init__)|effmodels/parallel/expert\.py|pallas_kernels/grouped_matmul", "moe"),
        (r"pallas_kernels/flash_attention|effmodels/parallel/.*attention", "attention"),
        (r"pallas_kernels/(retention)", None),
        (r"pallas_kernels/linear_cross_entropy|:Decoder\._head_loss", "loss"),
        (r"effmodels/layers/norms\.py", "norm"),
        (r":(Decoder\._embed|embedding\b)", "embed"),
        (r":Decoder\.logits|effmodels/layers/head\.py", "head"),
    )
)
_OURS = re.compile(r"(?:.*/)?((?:effmodels|pallas_kernels|experiments|tests)/.*)")
_NEIGHBOURS = 4  # instructions that an origin is passed on through


class Origins:
    """`of(instruction)` for the instructions of one program."""

    def __init__(self, text, module):
        self.module, self.instructions, self.frames = module, module.instructions(), _frames(text)
        self.known, self.users = {}, {}
        for instruction in self.instructions.values():
            for operand in instruction.operands:
                self.users.setdefault(operand, []).append(instruction.name)

    def of(self, instruction) -> Origin:
        """Its Origin; fields that nobody knows are empty."""
        if instruction.name not in self.known:
            self.known[instruction.name] = self._found(instruction)
        return self.known[instruction.name]

    def _found(self, instruction):
        feeds, users = (lambda i: i.operands), (lambda i: self.users.get(i.name, ()))
        own = self._own(instruction)
        if own is None:
            own = self._near(instruction, feeds) or self._near(instruction, users) or Origin()
        if not own.layer:  # a weight sliced and gathered before its layer begins
            near = self._near(instruction, users, layer=True) or self._near(instruction, feeds, layer=True) or Origin()
            own = dataclasses.replace(own, layer=near.layer, phase=own.phase or near.phase)
        return own

    def _own(self, instruction):
        path = re.search(r'op_name="([^"]*)"', instruction.attributes)
        stack = self._stack(instruction)
        if path and (stack or "/" in path.group(1)):
            return _origin(path.group(1), stack)
        if instruction.opcode == "fusion":
            inner = self.module.computations.get(hlo.called(instruction, "calls"), ())
            return next((found for i in reversed(inner) if (found := self._own(i))), None)
        return None

    def _stack(self, instruction):
        """Frames as (file, line, function), innermost first."""
        number = re.search(r"stack_frame_id=(\d+)", instruction.attributes)
        if number and int(number.group(1)) in self.frames:
            return self.frames[int(number.group(1))]
        file = re.search(r'source_file="([^"]*)"(?: source_line=(\d+))?', instruction.attributes)
        return ((file.group(1), int(file.group(2) or 0), ""),) if file else ()

    def _near(self, instruction, neighbours, layer=False):
        """The Origin (layer=True: one with a layer) of the nearest instruction in a direction."""
        border = [instruction]
        for _ in range(_NEIGHBOURS):
            border = [self.instructions[name] for i in border for name in neighbours(i) if name in self.instructions][:16]
            found = next((own for i in border if (own := self._own(i)) and (own.layer or not layer)), None)
            if found:
                return found
        return None


def _origin(path, stack):
    layer = next((name for frame in reversed(stack) if (name := _layer(frame))), "")
    if "rematted_computation" in path:
        phase = "recomputed"
    elif "transpose(" in path:
        phase = "backward"
    elif layer == "optimizer":
        phase = "update"
    elif "jvp(" not in path and any(function.endswith("micro_step.<locals>.<lambda>") for _, _, function in stack):
        phase = "backward"  # gradients of micro-batches are added
    else:
        phase = "forward"
    return Origin(layer, phase, _source(stack))


def _layer(frame):
    file, _, function = frame
    for pattern, name in _LAYERS:
        if match := pattern.search(f"{file}:{function}"):
            return name or match.group(1)
    return ""


def _source(stack):
    for file, line, _ in stack:
        if ours := _OURS.fullmatch(file):
            return f"{ours.group(1)}:{line}"
    return f"{stack[0][0].rsplit('/', 1)[-1]}:{stack[0][1]}" if stack else ""


def _frames(text):
    """{stack frame id: its chain of (file, line, function), innermost first} from the tables before the first computation."""
    tables, current = {}, None
    for line in text.splitlines():
        if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            current = tables.setdefault(line, {})
        elif re.match(r"^(ENTRY )?%?[\w.\-<>]+ \(.*\{\s*$", line):
            break
        elif current is not None and (entry := re.match(r"(\d+) (.*)", line)):
            current[int(entry.group(1))] = entry.group(2)
    places = {}
    for number, fields in tables.get("FileLocations", {}).items():
        names = ("file_name_id", "function_name_id", "line")
        file, function, line = (int(re.search(rf"\b{name}=(\d+)", fields).group(1)) for name in names)
        places[number] = tables["FileNames"][file].strip('"'), line, tables["FunctionNames"][function].strip('"')
    frames = {}
    for number, fields in sorted(tables.get("StackFrames", {}).items()):
        place, parent = (int(re.search(rf"\b{name}=(\d+)", fields).group(1)) for name in ("file_location_id", "parent_frame_id"))
        # Parents are counted from 1, with 1 for none.
        frames[number] = (places[place], *frames.get(parent - 1, ()))
    return frames

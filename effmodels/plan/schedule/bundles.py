"""Reading the TPU compiler's final VLIW bundles: the text it dumps for each fusion and each kernel, one bundle of operations a line.

A bundle is what a core issues in one cycle. Only operations of the scalar unit are kept as `Op`s, for they decide what runs next, and
which matrix unit is fed, for it may not be free yet; how many operations of each kind a bundle holds is in a second file, the slots used
per bundle. The format is libtpu's own and undocumented; it was read from libtpu 0.0.42 and 0.0.50. Anything unexpected is a
`NotUnderstood`, never a guess.
"""
import dataclasses
import re

CORE, CHIP = "core id", "logical chip id"  # words that the system, not the program, writes; the dump says so in a comment


class NotUnderstood(ValueError):
    """The compiler's dump is not in the form this reader knows: probably a new libtpu."""


@dataclasses.dataclass(frozen=True)
class Op:
    """`%dest = name (guard) args`. A guard is (predicate, wanted value); when it fails, dest becomes `otherwise` or stays as it was."""

    name: str
    args: tuple[str, ...] = ()
    dest: str | None = None
    guard: tuple[str, bool] | None = None
    otherwise: str | None = None
    address: tuple[str, ...] | None = None  # sld and sst: the terms whose sum is the address
    labels: dict[str, str] = dataclasses.field(default_factory=dict)  # DMA: what each argument is; sdivrem: its "results"
    system: str | None = None  # sld of CORE or CHIP


@dataclasses.dataclass(frozen=True)
class Operand:
    """An argument or result of the program: the scalar that holds its address (or, without memory, its value)."""

    dest: str
    memory: str  # "hbm", "cmem", "vmem", "smem"; "" when the scalar is the value itself
    index: int
    dtype: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Slots:
    """Issue slots: capacity per bundle, and how many each bundle uses; columns named as libtpu names them (MXU, VALU, ...)."""

    names: tuple[str, ...]
    capacity: tuple[int, ...]
    used: tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Program:
    bundles: tuple[tuple[Op, ...], ...]  # scalar operations of each bundle
    regions: dict[str, int]  # name of a branch target -> bundle
    operands: tuple[Operand, ...]
    matmuls: dict[int, tuple[tuple[int, int], ...]]  # bundle -> (matrix unit, rows of 128 that it is fed) of each vmatmul


_LEGEND_END = "= control target key end"
_HEAD = re.compile(r"^ *(0x[0-9a-f]+|0) +(?:[A-Z]{2})? *: *(?:>+ *)?\{", re.M)
_LABEL = re.compile(r"/\*(\w+)=\*/")
_COMMENT = re.compile(r"/\*|\*/")
_REGION = re.compile(r"Start(?:/End empty)? region (\d+)")
_MARK = re.compile(r"<<(region|system|results) ([^>]*)>>")
_RESULTS = ("kDiv", "kRem", "kDivAndRem")  # of a division, in the order in which they are popped
_OP = re.compile(r"^((?:%[\w.]+ = )*)([a-z][\w.\-]*) *(.*)$", re.S)
_MATMUL = re.compile(r"^%\w+ = vmatmul\.([\w.]+)\.mxu(\d+)\b")
_ROWS = {"f32": 8, "bf16": 16}  # in a register of 8 x 128 words
_OPERAND = re.compile(r"inlined_call_operand\.(\w+|<no memory space>) \[shape: (\w+)\[([\d,]*)\][^,]*?, index: (\d+)")
_GUARD = re.compile(r"^\((!?)%(\w+)(?:, ([^)]*))?\) *,? *")


def program(text):
    """The `Program` of the text of a `*-final_bundles.txt`."""
    if _LEGEND_END not in text:
        raise NotUnderstood("no list of bundles: the text lacks the legend that libtpu writes on top.")
    text = _without_comments(_LABEL.sub(r"\1=", text.split(_LEGEND_END, 1)[1]))
    heads = list(_HEAD.finditer(text))
    ends = [h.start() for h in heads[1:]] + [len(text)]
    bundles, regions, operands, matmuls = [], {}, [], {}
    for index, (head, end) in enumerate(zip(heads, ends)):
        if int(head.group(1), 16) != index:
            raise NotUnderstood(f"bundle {index} is numbered {head.group(1)}.")
        body = text[head.end(): end]
        for region in re.findall(r"<<region (\d+)>>", body):
            regions.setdefault(region, index)
        last = body.rfind("}")
        if last < 0:
            raise NotUnderstood(f"bundle {index} does not end.")
        parts = [part.strip() for part in re.sub(r"<<region \d+>>", "", body[:last]).split(";;")]
        operands += [found for part in parts if (found := _operand(part))]
        if fed := tuple(_matmul(part, index) for part in parts if " = vmatmul" in part):
            matmuls[index] = fed
        bundles.append(tuple(op for part in parts if part and (op := _op(part, index))))
    if not bundles:
        raise NotUnderstood("no bundles.")
    unmarked = {op.args[0] for ops in bundles for op in ops if op.name.startswith("sbr")} - set(regions)
    if unmarked:  # libtpu does not mark the region of the exit
        if len(unmarked) > 1 or "<<exit>>" not in text[heads[-1].start():]:
            raise NotUnderstood(f"branches to regions {sorted(unmarked)}, which start nowhere.")
        regions[unmarked.pop()] = len(bundles) - 1
    return Program(tuple(bundles), regions, tuple(operands), matmuls)


def slots(text, count):
    """`Slots` from the text of a `*-final_hlo-static-per-bundle-utilization.txt` of a program of `count` bundles."""
    lines = text.splitlines()
    if len(lines) < 4 or "UTILIZATION" not in lines[3]:
        raise NotUnderstood("the file of slots per bundle has no table.")
    names = tuple(name.strip() for name in lines[1].split(","))
    capacity = tuple(int(x) for x in lines[2].split())
    used = tuple(tuple(int(x) for x in line.split()) for line in lines[4:] if line.strip())
    if len(capacity) != len(names) or len(used) != count or any(len(row) != len(names) for row in used):
        raise NotUnderstood(f"slots of {len(used)} bundles in {len(names)} columns; the program has {count} bundles.")
    return Slots(names, capacity, used)


def _without_comments(text):
    """Comments (they nest) replaced by marks for what only they tell: regions, words that the system writes, results of a division."""
    out, depth, kept, opened = [], 0, 0, 0
    for mark in _COMMENT.finditer(text):
        if mark.group() == "/*":
            if depth == 0:
                out.append(text[kept: mark.start()])
                opened = mark.end()
            depth += 1
        elif depth:
            depth -= 1
            if depth == 0:
                out.append(_marks(text[opened: mark.start()]))
                kept = mark.end()
    if depth:
        raise NotUnderstood("a comment does not end.")
    out.append(text[kept:])
    return "".join(out)


def _marks(comment):
    parts = {part.strip() for part in comment.split("::")}
    if CHIP in parts:
        return f"<<system {CHIP}>>"
    if CORE in parts or f"megacore {CORE}" in parts:
        return f"<<system {CORE}>>"
    if comment.strip() in _RESULTS:
        return f"<<results {comment.strip()}>>"
    regions = " ".join(f"<<region {number}>>" for number in _REGION.findall(comment))
    return regions + ("<<exit>>" if comment.strip().startswith("exit bundle") else "")


def _operand(text):
    found = _OPERAND.search(text)
    if not found:
        return None
    memory, dtype, shape, index = found.groups()
    dest = text.split(" = ", 1)[0].lstrip("%").strip()
    shape = tuple(int(n) for n in shape.split(",") if n)
    return Operand(dest, "" if memory.startswith("<") else memory, int(index), dtype, shape)


def _matmul(text, bundle):
    """(matrix unit, rows) of a vmatmul."""
    found = _MATMUL.match(text)
    rows = [_ROWS[dtype] for dtype in found.group(1).split(".") if dtype in _ROWS] if found else []
    if len(rows) != 1:
        raise NotUnderstood(f"bundle {bundle}: which unit, and how many rows? {text[:80]!r}")
    return int(found.group(2)), rows[0]


def _op(text, bundle):
    """The Op of one operation, or None when it cannot touch scalar state (vector, matrix, fences, checks)."""
    marks = dict(_MARK.findall(text))
    found = _OP.match(_MARK.sub("", text).strip())
    if not found:
        raise NotUnderstood(f"bundle {bundle}: {text[:80]!r} is not an operation.")
    dests, name, rest = found.groups()
    dests = [d for d in re.findall(r"%([\w.]+) = ", dests) if d[0] in "sp" or name.startswith("sdivrem")]
    if name.startswith("inlined_call_operand"):
        return None
    if not dests and not (name in ("sst", "vdelay") or name.startswith(("sbr", "dma."))):
        return None
    if len(dests) > 1 or name.startswith("sbr") and name not in ("sbr", "sbr.rel"):
        raise NotUnderstood(f"bundle {bundle}: {text[:80]!r}.")
    dest, labels, address = dests[0] if dests else None, {}, None
    if name.startswith("dma."):
        rest = re.sub(r"^\[thread:\S+\] *", "", rest)
    if name in ("sld", "sst"):
        terms, rest = _address(rest, bundle)
        address = terms
    guard = otherwise = None
    if guarded := _GUARD.match(rest):
        guard, otherwise, rest = (guarded.group(2), not guarded.group(1)), guarded.group(3), rest[guarded.end():]
    args = tuple(part.strip() for part in _split(rest.lstrip(", ")) if part.strip())
    if name.startswith("sbr"):
        target = re.search(r"\$region(\d+)", rest)
        if not target:
            raise NotUnderstood(f"bundle {bundle}: branch without a target: {text[:80]!r}.")
        args = (target.group(1),)
    if any("=" in part for part in args):
        labels = dict(part.split("=", 1) for part in args if "=" in part)
        args = tuple(part.split("=", 1)[-1] for part in args)
    if name.startswith("sdivrem"):
        if "results" not in marks:
            raise NotUnderstood(f"bundle {bundle}: which results does {text[:80]!r} give?")
        labels = {"results": marks["results"]}
    return Op(name, args, dest, guard, otherwise.strip() if otherwise else None, address, labels, marks.get("system"))


def _address(text, bundle):
    """Terms of `[smem:[#a + %b + $0x4]] rest`, and the rest."""
    found = re.match(r"^\[smem:\[([^\]]*)\]\]? *(.*)$", text, re.S) or re.match(r"^\[smem:([^\[\]]*)\] *(.*)$", text, re.S)
    if not found:
        raise NotUnderstood(f"bundle {bundle}: address {text[:80]!r}.")
    return tuple(term.strip() for term in found.group(1).split(" + ")), found.group(2)


def _split(text):
    """Arguments between commas outside brackets."""
    commas, depth = [-1], 0
    for i, letter in enumerate(text):
        depth += letter in "[(" or -(letter in "])")
        if letter == "," and depth == 0:
            commas.append(i)
    return [text[a + 1: b] for a, b in zip(commas, commas[1:] + [len(text)])]

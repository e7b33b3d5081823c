"""The collectives of a compiled program: which, how often, over which mesh axes, how many bytes each device sends, what runs meanwhile.

Bytes are those that leave one device along a ring of its group of n: all-gather and reduce-scatter (n-1)/n of the whole array, all-reduce
twice that, all-to-all (n-1)/n of what the device holds, a permute all of it.
"""
import dataclasses
import math
import re

import numpy as np

from effmodels.plan import hlo

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "ragged-all-to-all", "all-to-all")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction. axes: the mesh axes that its groups span. times: how often it runs, loops multiplied.

    size: bytes of the whole array (gathered, or before scattering). during: kernels and fusions between its start and its done, in order;
    None if it blocks. groups: device numbers, in the order of mesh.devices; of a permute (source, target) pairs. lanes: link directions
    that the compiler's strategy drives at once; 0 where it does not say.
    """

    kind: str
    name: str
    axes: tuple[str, ...]
    group: int
    size: int
    times: int
    during: tuple[str, ...] | None
    groups: tuple[tuple[int, ...], ...] = dataclasses.field(default=(), repr=False)
    lanes: int = 0

    @property
    def sent(self) -> float:
        """Bytes that one device sends, all repetitions together."""
        share = {"all-reduce": 2 * (self.group - 1) / self.group, "collective-permute": 1.0}.get(self.kind, (self.group - 1) / self.group)
        return self.size * share * self.times


def collectives(compiled_or_text, mesh) -> list[Collective]:
    """All collectives of a compiled program (or its HLO text) over the devices of `mesh`, in the order of execution."""
    text = compiled_or_text if isinstance(compiled_or_text, str) else compiled_or_text.as_text()
    module = hlo.parse(text)
    found = []
    _walk(module, module.entry, 1, mesh, found)
    return found


def sent_by_axes(found) -> dict:
    """{(axes, kind): bytes that one device sends}; what every axis carries in one run of the program."""
    total = {}
    for c in found:
        total[c.axes, c.kind] = total.get((c.axes, c.kind), 0.0) + c.sent
    return total


def _walk(module, name, times, mesh, found):
    open_starts = {}
    for i in module.computations[name]:
        kind, phase = kind_and_phase(i.opcode)
        if phase == "start":
            open_starts[i.name] = (i, kind, [])
        elif phase == "done":
            start = open_starts.pop(i.operands[0], None)
            if start is not None:
                found.append(collective(*start[:2], mesh, times, tuple(start[2])))
        elif kind:
            found.append(collective(i, kind, mesh, times))
        elif transfer := between_slices(i, mesh, times):
            found.append(transfer)
        elif i.opcode == "while":
            _walk(module, hlo.called(i, "body"), times * hlo.trip_count(module, i), mesh, found)
        elif i.opcode == "conditional":
            for branch in hlo.branches(i):
                _walk(module, branch, times, mesh, found)
        elif i.opcode == "call":
            _walk(module, hlo.called(i, "to_apply"), times, mesh, found)
        elif i.opcode in ("fusion", "async-start"):
            found += inside(module, i, mesh, times)
        if i.opcode in ("fusion", "custom-call", "while", "convolution", "dot"):
            for _, _, during in open_starts.values():
                during.append(i.base_name)


def inside(module, instruction, mesh, times=1) -> list[Collective]:
    """The collectives in the computation that a fusion or an async-start calls, as blocking ones."""
    found, name = [], hlo.called(instruction, "calls")
    for i in module.computations.get(name, ()):
        if kind := kind_and_phase(i.opcode)[0]:
            # A TPU reduces and scatters in one fusion around an all-reduce.
            kind = "reduce-scatter" if kind == "all-reduce" and "reduce-scatter" in name else kind
            found.append(collective(i, kind, mesh, times, strategy=instruction.attributes))
    return found


def chain(module, instruction) -> tuple[str, tuple[str, ...]]:
    """("start", "carry" or "done", names) of a fusion that is part of collectives in the background, else ("", ()).

    A TPU that fuses them with other work splits a collective in three: fusions that start and end it, and between them fusions with work of
    their own, which all hold the same collective. names: what the parts of one chain have in common.
    """
    called = hlo.called(instruction, "calls") if instruction.opcode == "fusion" else ""
    body = module.computations.get(called, ())
    names = tuple(
        channel.group(1) + ":" + mark.group(1)
        for i in body
        if kind_and_phase(i.opcode)[0]
        and (channel := re.search(r"channel_id=(\d+)", i.attributes))
        and (mark := re.search(r'chain_id="(\d+)"', i.attributes))
    )
    targets = " ".join(i.attributes for i in body if i.opcode == "custom-call") if names else ""
    for part, target in (("start", '"AsyncCollectiveStart"'), ("done", '"AsyncCollectiveDone"')):
        if target in targets:
            return part, names
    return ("carry", names) if names and called.startswith("async_collective_fusion") else ("", ())


def between_slices(instruction, mesh, times=1) -> Collective | None:
    """What a `send` hands to the network between slices, as a Collective without groups; None for any other instruction."""
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes) if instruction.opcode == "send" else None
    if not kind:
        return None
    kind, size = kind.group(1).lower().replace("_", "-"), _bytes(re.search(r"\w+\[[\d,]*\]", instruction.type).group(0))
    slices = np.array([getattr(d, "slice_index", 0) or 0 for d in mesh.devices.flat]).reshape(mesh.devices.shape)
    number = len(np.unique(slices))
    axes = tuple(name for d, name in enumerate(mesh.axis_names) if (slices != slices.take([0], d)).any())
    return Collective(kind, instruction.name, axes, number, size * number if kind == "all-gather" else size, times, None)


def rendezvous(instruction) -> str:
    """What the two halves of a transfer between slices have in common."""
    name = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', instruction.attributes)
    return name.group(1) if name else ""


def kind_and_phase(opcode):
    """(collective, "start" | "done" | None), or (None, None)."""
    for kind in KINDS:
        for ending, phase in (("", None), ("-start", "start"), ("-done", "done")):
            if opcode == kind + ending:
                return kind, phase
    return None, None


def collective(instruction, kind, mesh, times=1, during=None, strategy="") -> Collective:
    """The Collective of one instruction of a kind in KINDS. strategy: attributes of what holds it, where those name the strategy."""
    pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", instruction.attributes)
    if pairs:
        groups = [[int(a), int(b)] for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs.group(1))]
    else:
        groups = _groups(instruction.attributes, mesh.devices.size)
    arrays = instruction.type if instruction.type[0] == "(" else instruction.type.split("{", 1)[0]
    sizes = [_bytes(t) for t in re.findall(r"\w+\[[\d,]*\]", arrays)]
    n = max(map(len, groups), default=1)
    # Several arrays in one collective are a tuple. The start of an async pair lists operands and results, and flags of a few bytes.
    size = sum(sizes)
    if instruction.opcode == "all-gather-start":
        size = size * n // (n + 1)
    elif instruction.opcode == "reduce-scatter":
        size *= n
    elif instruction.opcode.endswith("-start") and instruction.opcode != "all-reduce-start":
        size = max(sizes)
    lanes = _lanes(instruction.attributes) or _lanes(strategy)
    return Collective(kind, instruction.name, _axes(groups, mesh), n, size, times, during, tuple(map(tuple, groups)), lanes)


def _lanes(attributes):
    """From the compiler's text: the colors of a strategy, or two directions for each dimension of an emitter; 0 where it names neither."""
    if colors := re.search(r"colors:(\d+)", attributes):
        return int(colors.group(1))
    emitter = re.search(r'"emitter":"(\d)D', attributes)
    return 2 * int(emitter.group(1)) if emitter else 0


def _groups(attributes, devices):
    """Lists of device numbers from any of the three notations; all devices where none is given."""
    mesh_form = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?\s*\{([^}]*)\}", attributes)
    if mesh_form:
        sizes = [(a, int(n)) for a, n in re.findall(r"'([^']+)'=(\d+)", mesh_form.group(1))]
        wanted = re.findall(r"'([^']+)'", mesh_form.group(4))
        numbers = np.arange(math.prod(n for _, n in sizes))
        if mesh_form.group(3):
            dims, order = ([int(n) for n in mesh_form.group(g).split(",")] for g in (2, 3))
            numbers = numbers.reshape(dims).transpose(order)
        numbers = numbers.reshape([n for _, n in sizes])
        names = [a for a, _ in sizes]
        inner = [names.index(a) for a in wanted]
        outer = [k for k in range(len(names)) if k not in inner]
        return numbers.transpose(*outer, *inner).reshape(-1, math.prod(sizes[k][1] for k in inner)).tolist()
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        shape, dims = ([int(n) for n in iota.group(g).split(",")] for g in (1, 2))
        numbers = np.arange(math.prod(dims)).reshape(dims)
        if iota.group(3):
            numbers = numbers.transpose([int(n) for n in iota.group(3).split(",")])
        return numbers.reshape(shape).tolist()
    listed = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", attributes)
    groups = [[int(n) for n in g.split(",")] for g in re.findall(r"\{([\d,]+)\}", listed.group(1))] if listed else []
    return groups or [list(range(devices))]


def _axes(groups, mesh):
    """Mesh axes along which the members of a group differ; devices are numbered in the order of mesh.devices."""
    differ = set()
    for group in groups:
        places = np.array(np.unravel_index(group, mesh.devices.shape))
        differ |= {axis for axis, row in zip(mesh.axis_names, places) if len(set(row.tolist())) > 1}
    return tuple(a for a in mesh.axis_names if a in differ)


def _bytes(type_text):
    dtype, shape = hlo.shape(type_text)
    return math.prod(shape) * hlo.width(dtype)

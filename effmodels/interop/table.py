"""A family of models as a table: which tensor of the outside holds which of our arrays, and in what layout.

Nothing here does arithmetic on weights: what differs in the maths is a field of the config (`norm_offset`, `rope_interleaved`, ...).
"""
import dataclasses
import re
from collections.abc import Callable
from typing import Any

from effmodels.interop import layout
from effmodels.interop.errors import InteropError
from effmodels.models import mtp


@dataclasses.dataclass(frozen=True)
class Rule:
    """One tensor name of the outside, "{i}" for the layer and "{e}" for an index of our first dim, and what of ours it holds.

    "{m}" in our name is a module that predicts further tokens; outside, it is that too, or "{i}", a layer behind the last.
    ours: a canonical name (CONTRACTS section 4) or several, whose pieces share the tensor's bracket. spec: a layout per piece, None: alike.
    on: instances of mixers or channel mixers in whose layers the rule holds; (): wherever our arrays are.
    """

    theirs: str
    ours: str | tuple
    spec: str | tuple | None = None
    on: tuple = ()


@dataclasses.dataclass(frozen=True)
class Family:
    """One family. read(Fields) gives the mapping of a ModelConfig, write(Resolved) what config.json says of it.

    prefix: what most tensor names begin with and the files of a bare base model do not. ignore: patterns of tensors that are no
    parameters (buffers that old files hold). sizes(ModelConfig): letters of layouts that our shapes do not tell. seen(mapping, tensor
    names): the mapping with what only the tensors tell. copies(Resolved): {tensor: the one that it repeats}.
    """

    model_type: str
    architecture: str
    rules: tuple
    read: Callable
    write: Callable
    prefix: str = ""
    ignore: tuple = ()
    sizes: Callable | None = None
    seen: Callable | None = None
    copies: Callable | None = None

    def ignores(self, name):
        """Whether a tensor is a known buffer without information."""
        return any(re.fullmatch(pattern, name) for pattern in self.ignore)


@dataclasses.dataclass(frozen=True)
class Piece:
    """One of our arrays, or its `index`-th part along the first dim, as a part of a tensor of the outside."""

    name: str
    index: int | None
    layout: layout.Layout
    sizes: Any
    total: int
    at: int

    def take(self, tensor):
        """Our array as a view of the tensor."""
        return self.layout.take(tensor, self.sizes, self.total, self.at)

    def put(self, tensor, array):
        """Writes our array into the tensor."""
        self.layout.put(tensor, array, self.sizes, self.total, self.at)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of the outside: name, shape and the pieces that it holds."""

    theirs: str
    shape: tuple
    pieces: tuple


def expand(family, shapes, resolved):
    """[Entry] of every tensor that holds a model. shapes: canonical name -> shape; resolved: of `models.resolve`.

    Raises InteropError for an array that the family has no place for, and for a rule that does not fit the shapes.
    """
    entries, covered = [], set()
    base_sizes = family.sizes(resolved) if family.sizes else {}
    for rule in family.rules:
        names = (rule.ours,) if isinstance(rule.ours, str) else rule.ours
        for i in _layers(rule, names, resolved):
            ours = tuple(n.format(i=i, m=i) for n in names)
            present = [n for n in ours if n in shapes]
            if not present:
                continue
            if len(present) < len(ours):
                missing = next(n for n in ours if n not in shapes)
                raise InteropError(f"{family.model_type}: {rule.theirs} holds {', '.join(ours)}, and this model has no {missing}.")
            number = i if "{m}" not in names[0] else i + len(resolved.layers)
            theirs = rule.theirs.replace("{i}", str(number)).replace("{m}", str(i))
            entries += _entries(dataclasses.replace(rule, theirs=theirs), ours, shapes, dict(base_sizes))
            covered |= set(ours)
    homeless = [n for n in shapes if n not in covered]
    if homeless:
        named = ", ".join(homeless[:4]) + _more(homeless, 4)
        raise InteropError(f"{family.model_type} checkpoints have no tensor for {named} of this model.")
    return entries


def _layers(rule, names, resolved):
    """The layers in which a rule may hold; (None,) for one that is not of layers."""
    if "{m}" in names[0]:
        kind = resolved.ahead
        holds = kind is not None and (not rule.on or {kind.mixer.name, kind.channel.name} & set(rule.on))
        return range(mtp.check(resolved.config.mtp).depth) if holds else ()
    if "{i}" not in names[0]:
        return (None,)
    return [i for i, kind in enumerate(resolved.layers) if not rule.on or {kind.mixer.name, kind.channel.name} & set(rule.on)]


def _entries(rule, ours, shapes, sizes):
    """The tensor of one rule and layer, or one per index of our first dim."""
    enumerated = "{e}" in rule.theirs
    parts = [shapes[n][1:] if enumerated else shapes[n] for n in ours]
    specs = (rule.spec,) * len(ours) if rule.spec is None or isinstance(rule.spec, str) else rule.spec
    layouts = [layout.same(len(part)) if spec is None else layout.parse(spec) for part, spec in zip(parts, specs)]
    solved = [_solve(rule, name, lay, part, sizes) for name, lay, part in zip(ours, layouts, parts)]
    places = [lay.place(s) for lay, s in zip(layouts, solved)]
    total = sum(places)
    shape = layouts[0].shape(solved[0], total)
    for index in range(shapes[ours[0]][0]) if enumerated else (None,):
        pieces = tuple(
            Piece(name, index, lay, s, total, sum(places[:k])) for k, (name, lay, s) in enumerate(zip(ours, layouts, solved))
        )  # fmt: skip
        yield Entry(rule.theirs.replace("{e}", str(index)), shape, pieces)


def _solve(rule, name, lay, shape, sizes):
    """The size of every letter; letters in a bracket may differ from piece to piece."""
    own = dict(sizes)
    try:
        for _ in range(2):  # a merged dim may need a letter that a later dim tells
            lay.solve(shape, own)
    except ValueError as error:
        raise InteropError(f"{rule.theirs}: {name} {tuple(shape)} does not fit the table: {error}.") from None
    return own


def _more(names, shown):
    return f" and {len(names) - shown} more" if len(names) > shown else ""

"""How an array of the outside is laid out in ours: renamed dims, nothing but views and copies, so that every bit comes back.

"THEIRS -> OURS": letters are dims, parentheses merge neighbours into one dim, a bracket marks what is concatenated there. With q, k and v
of heads N that lie one after another in each head: three pieces "(N [H]) D -> D N H" share one tensor. "1" is a dim of size one that we
do not have, "[1]" a place of size one.
"""
import dataclasses
import functools
import math
import re

import numpy as np

_TOKEN = re.compile(r"[()\[\]]|[A-Za-z]+|1")


@dataclasses.dataclass(frozen=True)
class Layout:
    """One parsed spec. theirs: per dim the letters and, at most once, a tuple of letters (the bracket); ours: per dim its letters."""

    theirs: tuple
    ours: tuple

    @property
    def bracket(self):
        """The letters of the concatenated place, or None."""
        return next((atom for dim in self.theirs for atom in dim if isinstance(atom, tuple)), None)

    def solve(self, shape, sizes):
        """`sizes` with what our array's shape tells; a merged dim gives one unknown letter. ValueError when the two disagree."""
        sizes["1"] = 1
        if len(shape) != len(self.ours):
            raise ValueError(f"our array has {len(shape)} dims, the layout {len(self.ours)}")
        for size, letters in zip(shape, self.ours):
            unknown = [x for x in letters if x not in sizes]
            known = math.prod(sizes[x] for x in letters if x in sizes)
            if len(unknown) > 1:
                continue
            if size % known or not unknown and size != known:
                raise ValueError(f"a dim of size {size} is {known} times {unknown[0] if unknown else 1}")
            if unknown:
                sizes[unknown[0]] = size // known
        return sizes

    def place(self, sizes):
        """The size of the bracket; 1 without one."""
        return math.prod(sizes[x] for x in self.bracket or ())

    def shape(self, sizes, total):
        """Shape of their tensor, whose bracket holds `total`."""
        return tuple(math.prod(total if isinstance(a, tuple) else sizes[a] for a in dim) for dim in self.theirs)

    def take(self, tensor, sizes, total, at):
        """Our array of their tensor: the part at `at` of the bracket, dims in our order; a view where our dims are not merged."""
        part = self._part(tensor, sizes, total, at)
        letters = [x for x in self._order() if x != "1"]
        split = part.reshape([sizes[x] for x in letters])
        ordered = split.transpose([letters.index(x) for dim in self.ours for x in dim])
        return ordered.reshape([math.prod(sizes[x] for x in dim) for dim in self.ours])

    def put(self, tensor, array, sizes, total, at):
        """Writes our array to its part of their tensor."""
        letters = [x for dim in self.ours for x in dim]
        split = array.reshape([sizes[x] for x in letters])
        ordered = split.transpose([letters.index(x) for x in self._order() if x != "1"])
        part = self._part(tensor, sizes, total, at)
        part[...] = ordered.reshape(part.shape)

    def _part(self, tensor, sizes, total, at):
        """Their tensor with every dim apart, the bracket's cut to this piece: always a view."""
        atoms = [a for dim in self.theirs for a in dim]
        view = tensor.reshape([total if isinstance(a, tuple) else sizes[a] for a in atoms])
        cut = slice(at, at + self.place(sizes))
        return view[tuple(cut if isinstance(a, tuple) else slice(None) for a in atoms)]

    def _order(self):
        """The letters of their side from left to right."""
        return [x for dim in self.theirs for a in dim for x in (a if isinstance(a, tuple) else (a,))]


@functools.cache
def parse(spec):
    """The Layout of a spec; ValueError when the two sides name different letters."""
    left, right = (_dims(side) for side in spec.split("->"))
    layout = Layout(left, right)
    ours = [x for dim in right for x in dim]
    if sorted(x for x in layout._order() if x != "1") != sorted(ours) or len(set(ours)) != len(ours):
        raise ValueError(f"layout {spec!r}: each letter must be on both sides once.")
    return layout


def same(ndim):
    """The Layout of arrays that are alike."""
    letters = tuple((chr(ord("a") + i),) for i in range(ndim))
    return Layout(letters, letters)


def _dims(side):
    dims, group, bracket = [], None, None
    for token in _TOKEN.findall(side):
        if token in "([":
            group, bracket = (group, []) if token == "[" else ([], None)
        elif token == "]":
            atom, bracket = tuple(bracket), None
            dims.append((atom,)) if group is None else group.append(atom)
        elif token == ")":
            dims.append(tuple(group))
            group = None
        elif bracket is not None:
            bracket.append(token)
        elif group is not None:
            group.append(token)
        else:
            dims.append((token,))
    return tuple(dims)


def contiguous(array, dtype):
    """A copy of a view in row-major order and in this dtype; never an alias of a mapped file."""
    return np.array(array, dtype=dtype, order="C", copy=True)

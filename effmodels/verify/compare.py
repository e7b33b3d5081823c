"""How far two sets of gradients are apart, leaf by leaf, and what a ratio between them says about the fault.

Letters: a = what is checked, b = the reference.
"""
import dataclasses
import itertools
import math

import numpy as np

FLOOR = 1e-6  # of the global rms: below it a leaf, or a difference, counts as zero
PROPORTIONAL = 0.03  # a - c b is at most this share of a: then a is c times b


@dataclasses.dataclass(frozen=True)
class Leaf:
    """error = rms(a - b) / max(rms(b), 1e-6 global rms); ratio = rms(a) / rms(b); along = <a, b> / <b, b>;
    rest = rms(a - along b) / rms(a)."""

    name: str
    error: float
    bound: float
    ratio: float
    along: float
    rest: float

    @property
    def failed(self):
        """Whether the error exceeds the leaf's bound."""
        return not self.error <= self.bound


def compare(got, want, bound, allowed=None):
    """[Leaf] of two dicts of arrays with the same names, the largest error (in units of its bound) first; a NaN is an infinite error.

    allowed: {name: bound} where a leaf's own is larger than `bound`. A difference under 1e-6 of the global rms is within any bound.
    """
    if got.keys() != want.keys():
        raise ValueError(f"compare: different names: {sorted(set(got) ^ set(want))[:6]}.")
    want = {n: np.asarray(b, np.float64) for n, b in want.items()}
    squares = {n: float(np.sum(b * b)) for n, b in want.items()}
    everything = math.sqrt(sum(squares.values()) / max(1, sum(b.size for b in want.values())))
    leaves = []
    for name, b in want.items():
        a, most = np.asarray(got[name], np.float64), max(bound, (allowed or {}).get(name, 0.0))
        if a.shape != b.shape:
            raise ValueError(f"compare: {name} has shape {a.shape}, the reference {b.shape}.")
        scale = max(math.sqrt(squares[name] / max(1, b.size)), FLOOR * everything, _TINY)
        difference = _rms(a - b)
        error = difference / scale if math.isfinite(difference) else math.inf
        if difference <= FLOOR * everything:
            error = min(error, most / 2)
        along = float(np.sum(a * b)) / squares[name] if squares[name] else 0.0
        leaves.append(Leaf(name, error, most, _rms(a) / scale, along, _rms(a - along * b) / max(_rms(a), _TINY)))
    return sorted(leaves, key=lambda leaf: -leaf.error / leaf.bound if leaf.bound else -leaf.error)


_TINY = float(np.finfo(np.float64).tiny)


def agree(leaves):
    """Whether every leaf is within its bound."""
    return not any(leaf.failed for leaf in leaves)


def relative(a, b):
    """|a - b| / max(|b|, tiny) of two numbers; infinite for a NaN."""
    difference = abs(float(a) - float(b)) / max(abs(float(b)), 1e-30)
    return difference if math.isfinite(difference) else math.inf


def reading(leaf, sizes):
    """What a leaf's ratio says, in words; sizes: mesh axis -> devices."""
    if not leaf.failed:
        return "equal"
    if not math.isfinite(leaf.error):
        return "not finite"
    if leaf.ratio < 1e-3:
        return "0: missing, no gradient arrives"
    if leaf.rest > PROPORTIONAL or abs(leaf.along - 1) < 1e-3:
        return f"not a multiple of the reference (of {leaf.ratio:.2f} times its size): a part of a sum is missing, or other data went in"
    factor = leaf.along
    if _near(factor, -1):
        return "-1: the sign is wrong"
    said = ["summed twice"] if _near(factor, 2) else ["halved"] if _near(factor, 0.5) else []
    for names in _axis_sets(sizes):
        n, axes = math.prod(sizes[a] for a in names), " x ".join(names)
        if _near(factor, n):
            said.append(f"summed {n} times, once too often over mesh axis {axes} ({n})")
        if _near(factor, 1 / n):
            said.append(f"1/{n}: averaged once too often over mesh axis {axes} ({n})")
    return f"{factor:.3f} times the reference: {', or '.join(said)}" if said else f"{factor:.3f} times the reference"


def patterns(leaves):
    """Which leaves fail, layers folded: ["layers.*.mixer.wq (3 of 4 layers)", "embed"], the worst first."""
    failing, everywhere = {}, {}
    for leaf in leaves:
        key = fold(leaf.name)
        everywhere[key] = everywhere.get(key, 0) + 1
        if leaf.failed:
            failing[key] = failing.get(key, 0) + 1
    return [f"{key} ({n} of {everywhere[key]} layers)" if "*" in key else key for key, n in failing.items()]


def fold(name):
    """layers.3.mixer.wq as layers.*.mixer.wq."""
    parts = name.split(".")
    return ".".join("*" if parts[i - 1] == "layers" and part.isdigit() else part for i, part in enumerate(parts))


def table(leaves, sizes, most=8):
    """The worst leaves as dicts of a report."""
    shown = [leaf for leaf in leaves[:most] if leaf.failed] or leaves[:3]
    return [{"name": x.name, "error": x.error, "bound": x.bound, "ratio": x.ratio, "reading": reading(x, sizes)} for x in shown]


def _axis_sets(sizes):
    used = [a for a, n in sizes.items() if n > 1]
    return [names for k in (1, 2) for names in itertools.combinations(used, k)]


def _near(x, y):
    return abs(x - y) <= 0.02 * abs(y)


def _rms(x):
    return math.sqrt(float(np.mean(x * x))) if x.size else 0.0

"""Arithmetic of a TPU core's scalar unit on 32-bit words, held as integers from 0 to 2^32 - 1; an unknown predicate is None."""
import operator
from collections.abc import Callable

MASK = 0xFFFFFFFF


def _signed(x):
    return x - (1 << 32) if x & 0x80000000 else x


_BINARY = {
    "sadd": operator.add,
    "ssub": operator.sub,
    "smul": operator.mul,
    "sand": operator.and_,
    "sor": operator.or_,
    "sxor": operator.xor,
    "sshll": lambda x, n: x << (n & 63),
    "sshrl": lambda x, n: x >> (n & 63),
    "sshra": lambda x, n: _signed(x) >> (n & 63),
}
_COMPARE = {"lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge, "eq": operator.eq, "ne": operator.ne}
DIVISIONS = {
    "kDiv": lambda x, y: [x // y] if y else None,
    "kRem": lambda x, y: [x % y] if y else None,
    "kDivAndRem": lambda x, y: list(divmod(x, y)) if y else None,
}


def _and(a, b):
    return False if a is False or b is False else None if a is None or b is None else True


def _not(a):
    return None if a is None else not a


PREDICATES = {
    "por": lambda a, b: _not(_and(_not(a), _not(b))),
    "pand": _and,
    "pnand": lambda a, b: _not(_and(a, b)),
    "pnor": lambda a, b: _and(_not(a), _not(b)),
    "pxor": lambda a, b: None if a is None or b is None else a != b,
    "pneg": _not,
    "pmov": lambda a: a,
}


def function(name: str) -> Callable | None:
    """What an operation without side effects computes from known operands; None when this simulator does not know it."""
    head, *kind = name.split(".")
    unsigned = any(k.startswith("u") for k in kind)
    if head in _BINARY:
        f = _BINARY[head]
        return lambda x, y: f(x, y) & MASK
    if head == "scmp":
        f = _COMPARE[kind[0]]
        return (lambda x, y: f(x, y)) if unsigned else (lambda x, y: f(_signed(x), _signed(y)))
    if head in ("smin", "smax"):
        f = min if head == "smin" else max
        return f if unsigned else lambda x, y: f(x, y, key=_signed)
    if head == "scalar_lea":
        return lambda *terms: sum(terms) & MASK
    if name == "sc.u32":  # the carry of an addition
        return lambda x, y: x + y > MASK
    if head == "smulhi":
        return (lambda x, y: x * y >> 32) if unsigned else lambda x, y: (_signed(x) * _signed(y) >> 32) & MASK
    if head in ("smov", "int_to_ptr"):
        return lambda x: x
    return None

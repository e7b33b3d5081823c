"""How a decoding state lies on a mesh: which dims of its arrays the rules split, by the letters in the fields' names (k_BSKH)."""
import dataclasses
import functools

import jax
from flax import nnx

from effmodels.models import Decoder
from effmodels.parallel import axes

_DIMS = {"B": "batch", "N": "act_heads", "K": "act_kv_heads", "S": "kv_seq"}


@dataclasses.dataclass(frozen=True)
class Placed:
    """An array of a decoding state. dims: what splits it, None where nothing does; whole: [(dim, size, pieces)] that do not divide."""

    name: str
    dims: tuple
    whole: tuple


@functools.lru_cache(16)
def state(config, rows, time):
    """The state of a ModelConfig for so many sequences of up to `time` tokens, as ShapeDtypeStructs."""
    model = nnx.eval_shape(lambda key: Decoder(config, rngs=nnx.Rngs(key)), jax.random.key(0, impl="threefry2x32"))
    return jax.eval_shape(lambda: model.init_state(rows, time))


def placed(path, shape, sizes, rules):
    """The `Placed` of the array at a path of a state (of `jax.tree_util`) on a mesh of these sizes, {axis: size}."""
    name = getattr(path[-1], "name", "")
    dims = [_DIMS.get(letter) for letter in name.rpartition("_")[2] if letter.isupper()][: len(shape)]
    dims = [None] * (len(shape) - len(dims)) + dims  # stacked layers stand first
    pieces = [axes.parts(d, sizes, rules) if d else 1 for d in dims]
    whole = tuple((d, n, k) for d, n, k in zip(dims, shape, pieces) if n % k)
    return Placed(name, tuple(None if n % k else d for d, n, k in zip(dims, shape, pieces)), whole)


def local_bytes(state, sizes, rules):
    """Bytes of a state on one device."""
    total = 0
    for path, a in jax.tree_util.tree_flatten_with_path(state)[0]:
        pieces = 1
        for d in placed(path, a.shape, sizes, rules).dims:
            pieces *= axes.parts(d, sizes, rules) if d else 1
        total += a.size // pieces * a.dtype.itemsize
    return total


def notes(state, sizes, rules):
    """One sentence for each dim that the rules split but that does not divide, with the arrays that every device therefore holds whole."""
    found = {}
    for path, a in jax.tree_util.tree_flatten_with_path(state)[0]:
        one = placed(path, a.shape, sizes, rules)
        for reason in one.whole:
            found.setdefault(reason, []).append(one.name)
    for (dim, size, pieces), names in found.items():
        arrays = ", ".join(dict.fromkeys(names))
        yield f"decoding state: {dim}={size} does not divide by {pieces}, so that {pieces} devices hold the same values of {arrays}"

"""Gradients of weights whose sum over the chips travels while it is computed: a collective matmul (arXiv:2105.04663, section 3.4).

dW = X^T G, summed over the rows of all chips; of its dim D every chip keeps its own shard. What is summed goes round a ring and every chip
adds the product of its own rows for the shard that is passing (a matmul that adds to what it reads), so that nothing waits for a whole dW.

    half A    send ------------ add the product | send ------------ add ...
    half B    add the product | send ------------ add the product |  ...

Half of the columns travels while the other half is multiplied. n chips of a torus are rings in several of its dims, both ways round each:
as many colours, each with its own links and its own part of the columns. A colour's ring in its first dim does all of the arithmetic and
carries the most; it leaves the sums over this dim, which then go round the other dims, 1 / n_first of the bytes.

Letters: M rows of one chip, D the scattered dim and d a shard of it, F all other columns, n chips = the product of `dims`.
"""
import dataclasses
import functools
import math

import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from effmodels.config import ConfigError
from effmodels.parallel import axes

ROWS, TILE = 8, 128  # of a TPU's tile: parts of whole tiles are not copied


def summed_product(x_MD, g_MF, *, axis, dims, last=False):
    """Own shard of the sum over chips of x^T g, [D / n, F], or of its transpose [F, D / n] if `last`; in x's dtype, inside `shard_map`.

    axis: mesh axes, a tuple of names, that the sum is over and D is split by, the first one slowest. dims: the sizes of rings whose product
    is their size, slowest first (`torus.rings`). Products accumulate in float32; what travels is rounded to x's dtype at every stop.
    """
    dims = tuple(n for n in dims if n > 1)
    ring = _Ring(axis, dims, x_MD.shape[1] // math.prod(dims), last)
    orders = [tuple((i + j) % len(dims) for j in range(len(dims))) for i in range(len(dims))]
    colours = [(way, order) for order in orders for way in (1, -1)]
    parts = _columns(g_MF.shape[1], 2 * len(colours))
    pieces = [None] * len(parts)
    for n in sorted(set(dims)):  # rings of equal length turn together
        turning = [p for p in range(len(parts)) if dims[colours[p % len(colours)][1][0]] == n]
        halves = [[p for p in turning if p // len(colours) == half] for half in (0, 1)]
        sums = ring.first_round(n, x_MD, g_MF, *([(*colours[p % len(colours)], *parts[p]) for p in half] for half in halves))
        for half, half_sums in zip(halves, sums):
            for p, total in zip(half, half_sums):
                pieces[p] = ring.other_rounds(total, *colours[p % len(colours)])
    return jnp.concatenate(pieces, 0 if last else 1)


def _columns(F, number):
    """(start, width) of `number` parts, of whole tiles where there are enough of them."""
    unit = TILE if F % TILE == 0 and F >= number * TILE else 1
    edges = [F // unit * i // number * unit for i in range(number + 1)]
    return [(a, b - a) for a, b in zip(edges, edges[1:])]


@dataclasses.dataclass(frozen=True)
class _Ring:
    """The chips of `axis` as a grid of `dims`, each of which closes; d columns of D per chip."""

    axis: tuple
    dims: tuple
    d: int
    last: bool

    def place(self, dim):
        """This chip's coordinate."""
        return lax.axis_index(self.axis) // math.prod(self.dims[dim + 1 :]) % self.dims[dim]

    def hop(self, x, dim, way):
        """x of the neighbour in a dim: what every chip holds moves on by `way`."""
        n, stride = self.dims[dim], math.prod(self.dims[dim + 1 :])
        on = [(i, i + ((i // stride + way) % n - i // stride % n) * stride) for i in range(math.prod(self.dims))]
        return lax.ppermute(x, self.axis, on)

    def first_round(self, n, x_MD, g_MF, half_a, half_b):
        """The sums over the first dim, of n chips, of each (way, order of dims, start, width) of either half: [D / n, width]."""
        in_order = {order: self.in_order(x_MD, order) for _, order, _, _ in half_a}
        size, wide = self.d * math.prod(self.dims) // n, jnp.promote_types(x_MD.dtype, jnp.float32)

        def add(totals, half, starts, hops):
            """Each total and the product for the shard that is `hops` hops away from being summed here."""
            added = []
            for total, (way, order, _, width), start in zip(totals, half, starts):
                x = lax.dynamic_slice_in_dim(in_order[order], (self.place(order[0]) + way * hops) % n * size, size, 1)
                g = lax.dynamic_slice_in_dim(g_MF, start, width, 1)
                product = _transposed_product(*((g, x) if self.last else (x, g)), wide)
                added.append((total.astype(wide) + product).astype(total.dtype))
            return added

        def send(totals, half):
            return [self.hop(total, order[0], way) for total, (way, order, _, _) in zip(totals, half)]

        def turn(carry, now):
            (a, b), (step, starts_a, starts_b) = carry, now
            # A travels before it is added to and stops at home; B is added to before it travels and comes home by its n-th hop.
            arrived = send(a, half_a)
            # A's products begin when B's are done and A is there: `step` says so, unchanged. Behind a barrier of its own, A would be added
            # in an operation apart from the product.
            b, marks = _together(add(b, half_b, starts_b, -step), [total[:1, :1] > 0 for total in arrived])
            step = functools.reduce(jnp.minimum, [n + mark.astype(jnp.int32).sum() for mark in marks], step)
            return _together(add(arrived, half_a, starts_a, n - 1 - step), send(b, half_b)), None

        def zeros(half):  # behind a barrier: else XLA writes them in the loop, at every step
            return _together([jnp.zeros((width, size) if self.last else (size, width), x_MD.dtype) for *_, width in half])[0]

        # Where a part starts comes in step by step: slices at constant places would be copied out of the loop.
        starts = [jnp.tile(jnp.array([start for _, _, start, _ in half], jnp.int32), (n, 1)) for half in (half_a, half_b)]
        return lax.scan(turn, (zeros(half_a), zeros(half_b)), (jnp.arange(n, dtype=jnp.int32), *starts))[0]

    def in_order(self, x_MD, order):
        """x with the columns of its shards ordered by their coordinates in this order of dims, the first one slowest."""
        if order == tuple(range(len(self.dims))):
            return x_MD
        M, D = x_MD.shape
        rows = ROWS if M % ROWS == 0 and self.d % TILE == 0 else 1
        # In memory a tile's rows lie together: whole tiles change places.
        tiles = x_MD.reshape(M // rows, rows, D // self.d, self.d).swapaxes(1, 2).reshape(M // rows, *self.dims, rows, self.d)
        moved = tiles.transpose(0, *(1 + dim for dim in order), len(order) + 1, len(order) + 2)
        return moved.reshape(M // rows, D // self.d, rows, self.d).swapaxes(1, 2).reshape(M, D)

    def other_rounds(self, total, way, order):
        """The sum over the other dims too, of own shards: [d, width]."""
        at = 1 if self.last else 0
        for dim in order[1:]:
            n, here = self.dims[dim], self.place(dim)
            shard = functools.partial(_slice, total, n, at)
            total = shard(here - way)
            for step in range(1, n):
                total = self.hop(total, dim, way) + shard(here + way * (n - 1 - step))
        return total


def _slice(x, n, at, k):
    """Part k, modulo n, of n equal parts of a dim."""
    size = x.shape[at] // n
    return lax.dynamic_slice_in_dim(x, k % n * size, size, at)


def _transposed_product(a_MX, b_MY, dtype):
    """a^T b, [X, Y]."""
    return lax.dot_general(a_MX, b_MY, (((0,), (0,)), ((), ())), preferred_element_type=dtype)


def _together(*groups):
    """All of them, none before the others are there."""
    return lax.optimization_barrier(groups)


# A projection's weight on a mesh.


@dataclasses.dataclass(frozen=True)
class Placed:
    """Where the operands of a projection lie. dim: the weight's, which `scattered` splits; summed: the other axes that split rows.

    inputs: how many of the weight's dims come from x; x_spec, y_spec, w_spec: the PartitionSpecs of its backward pass.
    """

    dim: int
    inputs: int
    scattered: tuple
    summed: tuple
    x_spec: PartitionSpec
    y_spec: PartitionSpec
    w_spec: PartitionSpec


def placed(spec, dim_names):
    """The `Placed` of einsum(spec, x[batch(, time), in], w[in, out]) by the rules in force; None where no axis splits rows and weight.

    Raises ConfigError where such axes split two dims of the weight, or one together with an axis that splits no rows.
    """
    mesh, lead, inputs = axes.current_mesh(), *_structure(spec)
    if mesh is None or not 1 <= lead <= 2:
        return None
    rows, w_spec = axes.spec(("batch", "seq")[:lead], mesh=mesh), axes.spec(dim_names, mesh=mesh)
    split = [tuple(a for a in axes.as_tuple(part) if mesh.shape[a] > 1) for part in w_spec]
    over = tuple(a for part in rows for a in axes.as_tuple(part) if mesh.shape[a] > 1)
    scattered = [i for i, part in enumerate(split) if set(part) & set(over)]
    if not scattered:
        return None
    dim = scattered[0]
    if len(scattered) > 1 or not set(split[dim]) <= set(over):
        given = ", ".join(f"rules.{name}={part}" for name, part in zip(dim_names, split) if part)
        raise ConfigError(
            f"parallel.gradient_sum='ring': the weight {tuple(dim_names)} is split by {given}; a ring needs all axes that also split rows "
            f"{over} in one dim, and no other axis in that dim. Change these rules, or use parallel.gradient_sum=xla."
        )
    kept = [None if i == dim else part or None for i, part in enumerate(split)]
    summed = tuple(a for a in over if a not in split[dim])
    x_spec, y_spec = (PartitionSpec(*rows, *part) for part in (kept[:inputs], kept[inputs:]))
    return Placed(dim, inputs, split[dim], summed, x_spec, y_spec, w_spec)


@functools.cache
def _structure(spec):
    """(leading dims, dims that are summed over) of "BTD,DNH->BTNH"; (0, 0) of what is no matrix product of rows and a weight."""
    operands, result = spec.split("->")
    x, w = operands.split(",")
    summed = "".join(d for d in x if d not in result)
    lead, out = x.removesuffix(summed), w.removeprefix(summed)
    return (len(lead), len(summed)) if summed and (lead + summed, summed + out, lead + out) == (x, w, result) else (0, 0)


def gradient(place, x, dy, dims):
    """The weight's gradient, placed by `place.w_spec`, of local x [rows, in] and dy [rows, out]; inside `shard_map`."""
    lead = x.ndim - place.inputs
    last = place.dim >= place.inputs
    dtype = jnp.promote_types(x.dtype, dy.dtype)
    owner, other = (dy, x) if last else (x, dy)
    at = place.dim - place.inputs if last else place.dim
    owner = jnp.moveaxis(owner, lead + at, lead)  # shards of the scattered dim are contiguous then
    rows = math.prod(x.shape[:lead])
    flat = [a.reshape(rows, -1).astype(dtype) for a in (owner, other)]
    dw = summed_product(*flat, axis=place.scattered, dims=dims, last=last)
    own = (owner.shape[lead] // math.prod(dims), *owner.shape[lead + 1 :])
    dw = dw.reshape(*other.shape[lead:], *own) if last else dw.reshape(*own, *other.shape[lead:])
    dw = jnp.moveaxis(dw, place.inputs if last else 0, place.dim)
    return lax.psum(dw, place.summed) if place.summed else dw

"""Weights gathered inside a `shard_map`, and their gradients summed over the shards so that each keeps its own part.

XLA for TPUs sums first and splits after, or scatters in one direction of one dim of the torus. Here parts of the gradient go round every
ring in both directions at once, by permutes, which run beside the additions. n: shards of a ring.
"""
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from effmodels.config import ConfigError
from effmodels.parallel import axes

LANES = 128


def rings(text, dim, taken=()):
    """The rings of `parallel.gradient_rings` in the mesh and the rules in force; () for none. taken: axes that split another dim.

    Raises ConfigError where they are not the mesh axes that split `dim` in weights, in that order.
    """
    mesh = axes.current_mesh()
    if mesh is None or not text:
        return ()
    return checked(text, tuple(a for a in axes.as_tuple(axes.current_rules()[dim]) if a not in taken), mesh.shape, dim)


def parsed(text, sizes):
    """The rings of "data,fsdp+seq", unchecked, without axes of one device."""
    found = (tuple(a.strip() for a in ring.split("+")) for ring in text.split(","))
    found = (tuple(a for a in ring if sizes.get(a, 1) > 1) for ring in found)
    return tuple(ring for ring in found if ring)


def checked(text, split, sizes, dim="embed"):
    """The rings of "data,fsdp+seq" (two, the second of two mesh axes) as tuples of axes of more than one device.

    split: the mesh axes that split `dim`; sizes: of the mesh axes. Raises ConfigError where the rings are others.
    """
    found, split = parsed(text, sizes), tuple(a for a in split if sizes.get(a, 1) > 1)
    if split != tuple(a for ring in found for a in ring):
        raise ConfigError(
            f"parallel.gradient_rings={text!r}: expected the mesh axes that split weights, {','.join(split) or 'none'} (rules.{dim}), in "
            "that order, with a plus between axes that lie along one ring of chips; or nothing."
        )
    return found


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gathered(w, rings, dim):
    """The whole of w, whose dim `dim` is split over the mesh axes of `rings`: tuples of axes, slowest first, each a ring of chips.

    Its gradient comes back summed over all shards and split, in w's dtype.
    """
    return jax.lax.all_gather(w, tuple(a for ring in rings for a in ring), axis=dim, tiled=True)


gathered.defvjp(lambda w, rings, dim: (gathered(w, rings, dim), None), lambda rings, dim, _, g: (scattered(g, rings, dim),))


def scattered(g, rings, dim):
    """The sum over all shards of g, of dim `dim` this shard's part.

    The columns of another dim are dealt out to as many ways round as there are links: ring by ring from each ring on, in either direction.
    Half of a way's columns travels while what arrived of the other half is added.
    """
    sizes = [jax.lax.axis_size(ring) for ring in rings]
    split = g.reshape(*g.shape[:dim], *sizes, g.shape[dim] // math.prod(sizes), *g.shape[dim + 1 :])
    other = max((i for i in range(g.ndim) if i != dim), key=lambda i: g.shape[i])
    column, k = other if other < dim else other + len(rings), len(rings)
    ways = [(first, way) for first in range(k) for way in (1, -1) for _ in range(2)]
    ends = _ends(g.shape[other], len(ways))
    parts = [jax.lax.slice_in_dim(split, begin, end, axis=column) for begin, end in zip(ends, ends[1:])]
    left = [list(range(k)) for _ in ways]
    for turn in range(k):
        now = [(first + turn) % k for first, _ in ways]
        for n in sorted({sizes[j] for j in now}):  # rings of equal length turn together
            these = [i for i, j in enumerate(now) if sizes[j] == n]
            jobs = [_Job(rings[now[i]], dim + left[i].index(now[i]), ways[i][1], late=i % 2 == 1) for i in these]
            for i, part in zip(these, _round([parts[i] for i in these], jobs, n)):
                parts[i] = part
        for i, j in enumerate(now):
            left[i].remove(j)
    return jnp.concatenate(parts, axis=other)


class _Job(NamedTuple):
    """A round of one part: the dim `at` is summed over a ring and split over it. late: is added to before it is sent, not after."""

    ring: tuple
    at: int
    way: int
    late: bool

    def piece(self, part, step):
        """What this shard adds at a step: to a sum that comes home by its last hop."""
        n, own = jax.lax.axis_size(self.ring), jax.lax.axis_index(self.ring)
        place = own - self.way * step if self.late else own + self.way * (n - 1 - step)
        return jax.lax.dynamic_index_in_dim(part, place % n, self.at, keepdims=False)

    def sent(self, total):
        n = jax.lax.axis_size(self.ring)
        return jax.lax.ppermute(total, self.ring, [(i, (i + self.way) % n) for i in range(n)])


def _round(parts, jobs, n):
    """Every job's part summed over its ring of n and split over it."""

    def turn(step, totals):
        add = [job.piece(part, step) for job, part in zip(jobs, parts)]
        return [job.sent(t + a) if job.late else job.sent(t) + a for job, t, a in zip(jobs, totals, add)]

    first = [job.piece(part, 0) for job, part in zip(jobs, parts)]
    return jax.lax.fori_loop(1, n, turn, [job.sent(t) if job.late else t for job, t in zip(jobs, first)])


def _ends(size, parts):
    """Where `parts` pieces of nearly equal size end, in whole lanes where there are enough."""
    unit = LANES if size % LANES == 0 and size >= parts * LANES else 1
    return [size // unit * i // parts * unit for i in range(parts + 1)]

"""Where mesh axes lie on the torus: which rings of chips they are made of."""
import functools
import math

import jax
import numpy as np

_RINGS = jax.make_user_context(default_value=None)


def use(mesh):
    """Context manager, part of jit's cache key: inside, `rings` knows where the axes of this mesh lie on the torus."""
    return _RINGS(tuple((axis, _lines(mesh, axis)) for axis in mesh.axis_names))


def rings(axis, sizes):
    """Sizes of the rings that mesh axes are made of, slowest first; an axis whose place is not known is one ring. sizes: {axis: size}."""
    known = dict(_RINGS.value or ())
    found = [n for a in axis for n in (known[a] if math.prod(known.get(a, (0,))) == sizes[a] else (sizes[a],))]
    return tuple(n for n in found if n > 1)


@functools.cache
def _lines(mesh, axis):
    devices = np.moveaxis(mesh.devices, mesh.axis_names.index(axis), 0).reshape(mesh.shape[axis], -1)[:, 0]
    if not all(hasattr(d, "coords") for d in devices):
        return (len(devices),)
    return straight_lines(np.array([d.coords for d in devices]))


def straight_lines(coords):
    """How devices at these coordinates [n, dims of the torus], in their order, are a product of straight lines: (8, 8) for a plane.

    One ring of n where they are no such product.
    """
    coords = np.asarray(coords)
    n = len(coords)
    moved = (coords != coords[0]).sum(1)
    run = next((i for i in range(1, n) if moved[i] != 1 or (coords[i] != coords[0]).argmax() != (coords[1] != coords[0]).argmax()), n)
    if run == n:
        return (n,)
    lines = coords.reshape(n // run, run, -1) if n % run == 0 and run > 1 else None
    if lines is None or ((lines - lines[:, :1]) != (lines[0] - lines[0, 0])).any():
        return (n,)
    return (*straight_lines(lines[:, 0]), run)

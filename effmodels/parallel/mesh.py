"""Meshes: named axis sizes to a device mesh, in one place, with Auto axes."""
import functools
import math

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from effmodels.config import ConfigError, nearest
from effmodels.parallel.axes import MESH_AXES


def sizes(config=None, num_devices=None):
    """Every axis' size for this many devices; one axis may be -1 (default: data) and takes what is left.

    Raises ConfigError with the nearest sizes that fit.
    """
    num_devices = jax.device_count() if num_devices is None else num_devices
    given = dict(config or {})
    for axis in given:
        if axis not in MESH_AXES:
            raise ConfigError(f"mesh: unknown axis {axis!r}.{nearest(axis, MESH_AXES)}")
    if -1 not in given.values() and "data" not in given:
        given["data"] = -1
    result = {axis: given.get(axis, 1) for axis in MESH_AXES}
    free = [a for a, n in result.items() if n == -1]
    fixed = math.prod(n for n in result.values() if n != -1)
    if len(free) > 1:
        raise ConfigError(f"mesh: only one axis may be -1, got {', '.join(free)}.")
    if any(n < 1 and n != -1 for n in result.values()):
        raise ConfigError(f"mesh: sizes must be positive (or one -1), got {given}.")
    if free and num_devices % fixed == 0:
        result[free[0]] = num_devices // fixed
    if math.prod(result.values()) != num_devices:
        divisors = [n for n in range(1, num_devices + 1) if num_devices % n == 0]
        raise ConfigError(
            f"mesh: {given} needs {'a multiple of ' if free else ''}{fixed} devices, but {num_devices} are here; "
            f"the fixed axes' product must be one of {divisors}{'' if free else f', or exactly {num_devices} without a -1'}."
            f" Nearest: {_nearest(result, free, num_devices)}."
        )
    return result


def _nearest(sizes, free, num_devices):
    """The sizes closest to those asked for, by ratio, that fill the devices, as text; the free axis or else data takes what is left."""
    rest = free[0] if free else "data"
    wanted = {axis: n for axis, n in sizes.items() if n > 1 and axis != rest}
    best, left = {}, num_devices
    for axis, n in sorted(wanted.items(), key=lambda item: item[1]):
        divisors = [d for d in range(1, left + 1) if left % d == 0]
        best[axis] = min(divisors, key=lambda d: abs(math.log(d / n)))
        left //= best[axis]
    return ", ".join(f"{axis}={n}" for axis, n in ({axis: best[axis] for axis in wanted} | {rest: left}).items())


def make_mesh(config=None, devices=None):
    """A mesh with all axes of MESH_AXES (size 1 where not asked for) over `devices` (default: all)."""
    devices = jax.devices() if devices is None else list(devices)
    shape = sizes(config, len(devices))
    # Explicit axes, jax's default, change the meaning of every op; this is the one place where a mesh is made.
    types = (AxisType.Auto,) * len(MESH_AXES)
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    if slices > 1:
        across = across_slices(shape, slices)
        inside = [n // across[axis] for axis, n in shape.items()]
        placed = mesh_utils.create_hybrid_device_mesh(inside, tuple(across.values()), devices, allow_split_physical_axes=True)
        return Mesh(placed, MESH_AXES, axis_types=types)
    return Mesh(_placed(tuple(shape.values()), devices), MESH_AXES, axis_types=types)


def _placed(shape, devices):
    """Devices in an array of this shape, neighbours of an axis near each other in the torus; an axis may take a part of a physical dim."""
    try:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except (ValueError, TypeError):  # jax 0.10 and 0.12 cannot split dims such as 12 x 16 x 20 into 15 x 32 x 8; of more axes it dies
        return _split(shape, devices)


def _split(shape, devices):
    """`_placed` for any torus: every axis in as few dims as possible, the fastest axis first choosing those where it has most."""
    where = [(*d.coords, getattr(d, "core_on_chip", 0)) for d in devices]
    torus = tuple(max(c) + 1 for c in zip(*where))
    shares = _shares(tuple(shape), torus)
    parts = {(k, axis): n for axis, share in enumerate(shares) for k, n in enumerate(share) if n > 1}
    order = sorted(parts)  # of each dim the slowest axis is outermost
    grid = np.empty(torus, object)
    for device, at in zip(devices, where):
        grid[at] = device
    by_axis = sorted(range(len(order)), key=lambda i: order[i][::-1])
    return grid.reshape([parts[key] for key in order]).transpose(by_axis).reshape(shape)


@functools.cache
def _shares(shape, torus):
    """Of every axis its factor in every dim of the torus; the products over the axes are the torus. None if there are none."""
    if not shape:
        return () if math.prod(torus) == 1 else None
    best = None
    for share in sorted(_factors(shape[-1], torus), reverse=True, key=lambda share: sorted(share, reverse=True)):
        rest = _shares(shape[:-1], tuple(n // f for n, f in zip(torus, share)))
        if rest is not None and (best is None or _dims_used((*rest, share)) < _dims_used(best)):
            best = (*rest, share)
    return best


def _dims_used(shares):
    return sum(n > 1 for share in shares for n in share)


def _factors(size, torus):
    """Every way to take `size` chips as a product over the dims."""
    if not torus:
        return [()] if size == 1 else []
    divisors = [n for n in range(1, min(size, torus[0]) + 1) if size % n == 0 and torus[0] % n == 0]
    return [(n, *rest) for n in divisors for rest in _factors(size // n, torus[1:])]


def across_slices(shape, slices):
    """How the slow network between slices is used: {axis: parts}, data first, then stage; everything else stays inside a slice.

    shape: every axis' size. Raises ConfigError when the slices divide neither.
    """
    left, across = slices, dict.fromkeys(shape, 1)
    for axis in ("data", "stage"):
        across[axis] = math.gcd(shape[axis], left)
        left //= across[axis]
    if left > 1:
        raise ConfigError(
            f"mesh: {slices} slices are connected by a slow network, which only the data and stage axes may cross, but "
            f"data={shape['data']} and stage={shape['stage']} do not split into {slices}; make mesh.data a multiple of {slices} (fsdp then "
            "shards inside a slice)."
        )
    return across

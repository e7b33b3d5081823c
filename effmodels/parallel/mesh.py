"""Meshes: named axis sizes to a device mesh, in one place, with Auto axes."""
import math

import jax
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
        )
    return result


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
    return jax.make_mesh(tuple(shape.values()), MESH_AXES, axis_types=types, devices=devices)


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

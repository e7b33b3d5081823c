"""Arrays from the host onto their devices, shard by shard and of a stack one layer at a time."""
import functools
import math
import pathlib

import jax
import jax.numpy as jnp

from effmodels.interop.errors import InteropError


def fill(shape, dtype, sharding, read, stacked):
    """The jax.Array whose parts are read(layer or None, index): a numpy array of our dims at `index`, slices of one layer's array.

    Only what lies on this process's devices is read, each part once; the host holds one part of one layer at a time.
    """
    places, parts = {}, []
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index, shape))
        places.setdefault(bounds, []).append(device)
    for bounds, devices in places.items():
        index = tuple(slice(*b) for b in bounds)
        if not stacked:
            host = read(None, index)
            parts += [jax.block_until_ready(jax.device_put(host, d)) for d in devices]
            continue
        local = tuple(stop - start for start, stop in bounds)
        stacks = [jnp.zeros(local, dtype, device=d) for d in devices]
        for row, layer in enumerate(range(*bounds[0])):
            host = read(layer, index[1:])
            stacks = [_set_row(stack, jax.device_put(host, d), row) for stack, d in zip(stacks, devices)]
            jax.block_until_ready(stacks)  # else slices wait in a queue, all of them on the host
        parts += stacks
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


@functools.partial(jax.jit, donate_argnums=0)
def _set_row(stack, row, i):
    return jax.lax.dynamic_update_index_in_dim(stack, row, i, 0)


def check_memory(shardings, shapes):
    """InteropError when the arrays do not fit into what the devices (on CPU: the machine) have free. shapes: name -> (shape, dtype)."""
    need = {}
    for name, (shape, dtype) in shapes.items():
        sharding = shardings[name]
        size = math.prod(sharding.shard_shape(shape)) * jnp.dtype(dtype).itemsize
        for device in sharding.addressable_devices:
            need[device] = need.get(device, 0) + size
    free = free_host_bytes()
    if all(d.platform == "cpu" for d in need):
        total = sum(need.values())
        if free is not None and total > free:
            raise InteropError(f"the weights take {total / 1e9:.2f} GB of memory and {free / 1e9:.2f} GB is free; {_ADVICE}")
        return
    for device, size in need.items():
        stats = device.memory_stats() or {}
        room = stats.get("bytes_limit", size) - stats.get("bytes_in_use", 0)
        if size > room:
            raise InteropError(f"the weights take {size / 1e9:.2f} GB of {device} and {room / 1e9:.2f} GB is free there; {_ADVICE}")


_ADVICE = "nothing was loaded. Ask for a smaller dtype, or give a mesh over more devices."


def free_host_bytes():
    """Memory that this process may still take: what the system says is available, bounded by the container's limit; None if unknown."""
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None
    try:
        group = pathlib.Path("/sys/fs/cgroup")
        free = min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return free

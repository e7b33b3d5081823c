"""Compiling for TPUs that are not here: libtpu describes a topology and compiles for it on any x86 machine (`pip install -e '.[plan]'`).

Nothing compiled here can run here; what it is good for is that it compiles at all, its memory, its HLO and its schedule.
"""
import contextlib
import functools
import importlib.util
import math
import os

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# Per generation: the topology of 4, 8 and 16 chips, and further arguments. Without "megacore" a v4 or v5p chip is described as two devices.
_CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4"}
_SQUARES = {4: "2x2", 8: "2x4", 16: "4x4"}
_GENERATIONS = {
    "v4": (_CUBES, {"chip_config_name": "megacore"}),
    "v5e": (_SQUARES, {}),
    "v5p": (_CUBES, {"chip_config_name": "megacore"}),
    "v6e": (_SQUARES, {}),
}
GENERATIONS = tuple(_GENERATIONS)


def quiet_environment():
    """Sets what libtpu reads when it is loaded: no search for a TPU's metadata, several processes at once. Values that are set stay."""
    for name, value in {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else the second process dies on a lock file
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v4-8",  # silences warnings; need not match what is compiled for
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_LOG_DIR": "disabled",
        "TPU_MIN_LOG_LEVEL": "2",
    }.items():
        os.environ.setdefault(name, value)


def has_compiler():
    """Whether libtpu is installed."""
    return importlib.util.find_spec("libtpu") is not None


@functools.cache
def devices(generation, number=4, slices=1):
    """`number` (4, 8 or 16) chips of each slice, of a generation in GENERATIONS, as devices that only a compiler can use."""
    if generation not in _GENERATIONS:
        raise ValueError(f"unknown TPU generation {generation!r}; expected one of {', '.join(GENERATIONS)}.")
    shapes, options = _GENERATIONS[generation]
    if number not in shapes:
        raise ValueError(f"no topology of {number} chips of {generation} is named here; expected one of {', '.join(map(str, shapes))}.")
    if not has_compiler():
        raise ModuleNotFoundError("compiling for a TPU needs libtpu, which is not installed: pip install -e '.[plan]'.")
    quiet_environment()
    name = f"{generation}:{shapes[number]}"
    return tuple(topologies.get_topology_desc(platform="tpu", topology_name=name, num_slices=slices, **options).devices)


def mesh(generation, **axes):
    """A mesh of Auto axes {name: size} over chips of one slice: `mesh("v4", data=2, tensor=2)`; one chip without axes."""
    axes = axes or {"data": 1}
    number = math.prod(axes.values())
    chips = np.array(devices(generation, max(4, number))[:number]).reshape(*axes.values())
    return Mesh(chips, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def compile_for(generation, f, *shapes, **compiler_options):
    """f compiled for one chip; shapes are pytrees of arrays or ShapeDtypeStructs. Raises what the compiler raises."""
    return trace_and_compile_for(generation, f, *shapes, **compiler_options)[1]


def trace_and_compile_for(generation, f, *shapes, keep_unused=False, **compiler_options):
    """`compile_for` that also returns what was traced: (traced, compiled). keep_unused: parameter i is the i-th array of the arguments."""
    chip = mesh(generation)
    here = NamedSharding(chip, PartitionSpec())
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)
    with jax.sharding.use_abstract_mesh(chip.abstract_mesh), _no_cache():
        traced = jax.jit(f, keep_unused=keep_unused).trace(*shapes)
        return traced, traced.lower().compile(compiler_options=compiler_options or None)


@contextlib.contextmanager
def _no_cache():
    # The persistent cache cannot read back what libtpu compiled, and warns at every attempt.
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)

"""Compiling for TPUs that are not here: libtpu describes a topology and compiles for it on any x86 machine (`pip install -e '.[plan]'`).

Nothing compiled here can run here; what it is good for is that it compiles at all, its memory, its HLO and its schedule.
"""
import contextlib
import dataclasses
import functools
import importlib.util
import math
import os
import re

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from effmodels import simulated
from effmodels.config import ConfigError, nearest
from effmodels.plan import chips

# What libtpu calls each chip, and further arguments. Without "megacore" a v4 or v5p chip is described as two devices.
_LIBTPU = {
    "v4": ("v4", {"chip_config_name": "megacore"}),
    "v5e": ("v5e", {}),
    "v5p": ("v5p", {"chip_config_name": "megacore"}),
    "v6e": ("v6e", {}),
    "7x": ("tpu7x", {}),
}
GENERATIONS = ("v4", "v5e", "v5p", "v6e")  # for which every kernel is compiled by the tests
_ALIASES = {"tpu7x": "7x", "v7x": "7x", "v5litepod": "v5e", "v5lite": "v5e", "v6": "v6e"}
_CORES_IN_NAME = {"v4": 2, "v5p": 2, "7x": 2}  # Cloud's names count TensorCores of these, chips of the others: v4-128 is 64 chips
_LARGEST_SQUARE = 16  # of the generations with a two-dimensional torus
_LARGEST_SLICE = {"v4": 4096, "v5p": 6144, "7x": 9216}  # chips; v5p: of one job, its pod has more
_FORMS = "v4:4x4x4, v4-128 (128 TensorCores, 64 chips), v5e:2x4, v5p:2x2x2, v6e:16x16, 7x:2x2x1, cpu:8, gpu:h200:8"


@dataclasses.dataclass(frozen=True)
class Topology:
    """The devices that a program is planned for. shape: of one slice, in chips; chips: jax devices in all slices (two for each 7x chip).

    wrap: which dims of a slice close into rings.
    """

    name: str
    chip: chips.Chip
    shape: tuple[int, ...]
    chips: int
    slices: int
    wrap: tuple[bool, ...]

    @property
    def platform(self):
        return self.chip.platform

    @property
    def hosts(self):
        """In all slices."""
        if self.platform != "tpu":
            return -(-self.chips // self.chip.per_host) if self.platform == "gpu" else 1
        return self.slices * math.prod(self.shape) // math.prod(_host_bounds(self.chip.name, self.shape))

    def devices(self):
        """The devices, for a compiler only. On cpu: this process must simulate as many (`environment`). ValueError for a GPU."""
        if self.platform == "gpu":
            raise ValueError(f"topology {self.name}: no compiler for GPUs is used here; ask for the closed form (--fast).")
        if self.platform == "cpu":
            here = jax.devices("cpu")
            if len(here) < self.chips:
                raise ValueError(f"topology {self.name}: this process has {len(here)} CPU devices; start it with {self.environment()}.")
            return tuple(here[: self.chips])
        dims = "x".join(map(str, self.shape))
        wrap = (*self.wrap, *(False,) * (3 - len(self.wrap)))
        return _described(self.chip.name, dims, _host_bounds(self.chip.name, self.shape), wrap, self.slices)

    def environment(self):
        """What a process needs in its environment before it imports jax."""
        if self.platform != "cpu":
            return {"JAX_PLATFORMS": "cpu"}
        return simulated.environment(self.chips)


def parse(text: str, slices: int = 1) -> Topology:
    """The Topology of a name: `v4:8x8x16`, `v4-128`, `v5e:2x4`, `cpu:8`, `gpu:h200:8`.

    Raises ConfigError for an unknown chip (with the nearest), and for a shape that does not exist (with what divides).
    """
    kind, _, rest = text.strip().lower().partition(":")
    if slices < 1:
        raise ConfigError(f"slices: expected a positive number, got {slices}.")
    if kind in ("cpu", "gpu"):
        return _hosts_of(kind, rest, text, slices)
    family, _, size = kind.partition("-")
    family = _ALIASES.get(family, family)
    if family not in _LIBTPU:
        raise ConfigError(f"topology {text!r}: unknown chip {family!r}.{nearest(family, (*_LIBTPU, 'cpu', 'gpu'))} Write {_FORMS}.")
    chip = chips.CHIPS[family]
    if size and not rest:
        shape = _shape_of(family, size, text)
    elif rest and not size and re.fullmatch(r"\d+(x\d+)*", rest):
        shape = tuple(int(n) for n in rest.split("x"))
    else:
        raise ConfigError(f"topology {text!r}: expected a shape or a size; write {_FORMS}.")
    _check_shape(chip, shape, text)
    number = math.prod(shape) * chip.devices_per_chip * slices
    return Topology(f"{family}:{'x'.join(map(str, shape))}", chip, shape, number, slices, _wrap(chip, shape))


def _hosts_of(kind, rest, text, slices):
    """Devices without a torus: cpu:8, gpu:h200:8."""
    model, _, number = rest.rpartition(":")
    known = [c.name for c in chips.CHIPS.values() if c.platform == "gpu"]
    if kind == "gpu" and model not in known:
        raise ConfigError(f"topology {text!r}: unknown GPU {model!r}.{nearest(model, known)} Write gpu:h200:8.")
    if (kind == "cpu" and model) or not number.isdigit() or int(number) < 1:
        raise ConfigError(f"topology {text!r}: expected a number of devices, as in cpu:8 or gpu:h200:8.")
    if slices > 1:
        raise ConfigError(f"topology {text!r}: slices are of TPUs; write the number of all devices instead, slices=1.")
    n = int(number)
    return Topology(f"{kind}:{rest}", chips.get(model) if model else chips.share_of_cpu(n), (n,), n, 1, (False,))


def named_slices(family) -> dict[int, tuple[int, ...]]:
    """{chips: shape} of the slices that Cloud has a name for, ascending; of several shapes of one size the most compact."""
    if chips.CHIPS[family].torus_dims == 2:
        shapes = [(1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)]
    else:  # any box of whole cubes (arXiv:2304.01433, section 2), or a part of one cube
        cubes = [cube for n in range(1, _LARGEST_SLICE[family] // 64 + 1) for cube in _shapes(3, n)]
        shapes = [(1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)]
        shapes += [tuple(4 * n for n in cube) for cube in sorted(cubes, key=lambda cube: (math.prod(cube), -sum(cube), cube))]
    return {math.prod(shape): shape for shape in shapes}


def slice_name(family, number) -> str:
    """Cloud's name of a slice of this many chips: v4-128 for 64."""
    return f"{family}-{number * _CORES_IN_NAME.get(family, 1)}"


def _shape_of(family, size, text):
    """The shape of a slice by the number in Cloud's name."""
    cores = _CORES_IN_NAME.get(family, 1)
    if not size.isdigit() or int(size) < 1 or int(size) % cores:
        what = "TensorCores, two on each chip" if cores == 2 else "chips"
        raise ConfigError(f"topology {text!r}: the number counts {what}; got {size!r}. Write {_FORMS}.")
    number, shapes = int(size) // cores, named_slices(family)
    if number not in shapes:
        below, above = [n for n in shapes if n < number][-1:], [n for n in shapes if n > number][:1]
        names = " and ".join(slice_name(family, n) for n in (*below, *above))
        raise ConfigError(f"topology {text!r}: no slice has {number} chips; nearest: {names}.")
    return shapes[number]


def _shapes(dims, number):
    """Ascending shapes of this many dims and chips."""
    if dims == 1:
        return [(number,)]
    first = [n for n in range(1, int(number ** (1 / dims) + 1e-6) + 1) if number % n == 0]
    return [(n, *rest) for n in first for rest in _shapes(dims - 1, number // n) if rest[0] >= n]


def _check_shape(chip, shape, text):
    name, dims = chip.name, chip.torus_dims
    if len(shape) != dims:
        example = "2x2x1" if dims == 3 else "2x4"
        raise ConfigError(f"topology {text!r}: {name} has a torus of {dims} dims, as in {name}:{example}; got {len(shape)}.")
    bounds = _host_bounds(name, shape)
    wrong = [n for n, b in zip(shape, bounds) if n < 1 or n % b]
    if wrong:
        near = "x".join(str(max(b, -(-n // b) * b)) for n, b in zip(shape, bounds))
        raise ConfigError(
            f"topology {text!r}: a host of {name} has {'x'.join(map(str, bounds[:dims]))} chips, which does not divide "
            f"{'x'.join(map(str, shape))}; the nearest shape that it divides is {name}:{near}, one chip is {name}:{'x'.join('1' * dims)}."
        )
    if dims == 2 and max(shape) > _LARGEST_SQUARE:
        raise ConfigError(f"topology {text!r}: {name} has slices of up to 16x16 chips; take more of them with slices=.")


def _host_bounds(name, shape):
    """Chips of one host, as libtpu wants it: three numbers."""
    if math.prod(shape) == 1:
        return (1, 1, 1)
    return (2, 4, 1) if chips.CHIPS[name].torus_dims == 2 and shape == (2, 4) else (2, 2, 1)


def _wrap(chip, shape):
    """Rings close where a slice is made of whole cubes of 4 x 4 x 4 chips; of the two-dimensional ones, where a dim is a whole pod's."""
    if chip.torus_dims == 3:
        return (all(n % 4 == 0 for n in shape),) * 3
    return tuple(n == _LARGEST_SQUARE for n in shape)


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


def devices(generation, number=4, slices=1):
    """`number` chips of each slice, of a generation in GENERATIONS, as devices that only a compiler can use."""
    return parse(f"{generation}-{number * _CORES_IN_NAME.get(generation, 1)}", slices).devices()


@functools.cache
def _described(name, dims, host_bounds, wrap, slices):
    if not has_compiler():
        raise ModuleNotFoundError("compiling for a TPU needs libtpu, which is not installed: pip install -e '.[plan]'.")
    quiet_environment()
    libtpu, options = _LIBTPU[name]
    options = options | {"chips_per_host_bounds": host_bounds, "wrap": wrap, "num_slices": slices}
    return tuple(topologies.get_topology_desc(platform="tpu", topology_name=f"{libtpu}:{dims}", **options).devices)


def mesh(generation, **axes):
    """A mesh of Auto axes {name: size} over chips of one slice: `mesh("v4", data=2, tensor=2)`; one chip without axes."""
    axes = axes or {"data": 1}
    number = math.prod(axes.values())
    found = np.array(devices(generation, max(4, number))[:number]).reshape(*axes.values())
    return Mesh(found, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def compile_for(generation, f, *shapes, **compiler_options):
    """f compiled for one chip; shapes are pytrees of arrays or ShapeDtypeStructs. Raises what the compiler raises."""
    return trace_and_compile_for(generation, f, *shapes, **compiler_options)[1]


def trace_and_compile_for(generation, f, *shapes, keep_unused=False, **compiler_options):
    """`compile_for` that also returns what was traced: (traced, compiled). keep_unused: parameter i is the i-th array of the arguments."""
    one = mesh(generation)
    here = NamedSharding(one, PartitionSpec())
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)
    with jax.sharding.use_abstract_mesh(one.abstract_mesh), _no_cache():
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

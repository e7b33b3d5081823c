"""Small scheduled HLO programs with known costs, and meshes without devices for them."""
import dataclasses

import numpy as np

PEAK, BANDWIDTH, ICI = 275e12, 1.228e12, 45e9  # of a v4
MATMUL_CYCLES = 1050  # a microsecond of a v4's clock


@dataclasses.dataclass(frozen=True)
class Chip:
    coords: tuple
    slice_index: int = 0


class Mesh:
    """What the planner reads of a mesh: devices with places on the torus, and axis names."""

    def __init__(self, devices, **axes):
        self.devices = np.empty(tuple(axes.values()), object)
        self.devices.ravel()[:] = devices
        self.axis_names = tuple(axes)
        self.shape = axes


def torus(x, y, z=1, *, slices=1, **axes):
    """A mesh over every chip of `slices` slices of x * y * z, x slowest."""
    places = [(i, j, k) for i in range(x) for j in range(y) for k in range(z)]
    return Mesh([Chip(place, s) for s in range(slices) for place in places], **axes)


def module(body, others=""):
    """An HLO module whose entry computation holds these lines."""
    lines = "\n".join(f"  {line.strip()}" for line in body.strip().splitlines())
    return f"HloModule m, is_scheduled=true\n\n{others}\nENTRY %main (p: f32[]) -> f32[] {{\n  %p = f32[]{{}} parameter(0)\n{lines}\n}}\n"


def computation(name, body):
    lines = "\n".join(f"  {line.strip()}" for line in body.strip().splitlines())
    return f"%{name} (q: f32[]) -> f32[] {{\n{lines}\n}}\n\n"


def cycles(number):
    return f'backend_config={{"window_config":{{"estimated_cycles":"{number}"}}}}'


def matmul(name, x, w, microseconds, n=1024):
    """[n, n] x [n, n] in bfloat16."""
    return f"%{name} = bf16[{n},{n}]{{1,0}} convolution(%{x}, %{w}), dim_labels=bf_io->bf, {cycles(round(microseconds * MATMUL_CYCLES))}"



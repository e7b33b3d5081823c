"""Axis sizes for a number of devices, and the sentence for sizes that do not fit."""
import math

import jax
import pytest

from effmodels.config import ConfigError
from effmodels.parallel import mesh
from effmodels.plan import topology


@pytest.mark.parametrize(
    "given, devices, want",
    [
        ({}, 8, {"data": 8}),
        ({"data": -1, "tensor": 2}, 8, {"data": 4, "tensor": 2}),
        ({"fsdp": -1, "data": 1}, 8, {"fsdp": 8}),
        ({"data": 2, "fsdp": 3}, 6, {"data": 2, "fsdp": 3}),
        ({"tensor": 4}, 4, {"tensor": 4}),
        ({"tensor": -1}, 1, {}),
    ],
)
def test_sizes(given, devices, want):
    assert mesh.sizes(given, devices) == {**{axis: 1 for axis in mesh.MESH_AXES}, **want}


@pytest.mark.parametrize(
    "given, message",
    [
        ({"model": 2}, r"mesh: unknown axis 'model'. Available: data, expert, fsdp, seq, stage, tensor"),
        ({"tensr": 2}, r"mesh: unknown axis 'tensr'. Did you mean 'tensor'\?"),
        ({"data": -1, "fsdp": -1}, r"mesh: only one axis may be -1, got data, fsdp"),
        ({"tensor": 0}, r"mesh: sizes must be positive \(or one -1\)"),
        ({"tensor": 3}, r"needs a multiple of 3 devices, but 8 are here; the fixed axes' product must be one of \[1, 2, 4, 8\]"),
        ({"data": 2, "tensor": 2}, r"needs 4 devices, but 8 are here; .* or exactly 8 without a -1"),
        ({"data": 16}, r"needs 16 devices, but 8 are here"),
    ],
)
def test_errors(given, message):
    with pytest.raises(ConfigError, match=message):
        mesh.sizes(given, 8)


@pytest.mark.parametrize(
    "given, devices, want",
    [
        ({"data": 16}, 4, "data=4"),
        ({"fsdp": 3, "data": 2}, 4, "fsdp=4, data=1"),
        ({"fsdp": 8, "tensor": 3}, 64, "fsdp=8, tensor=4, data=2"),
        ({"data": 1, "fsdp": -1, "tensor": 5}, 8, "tensor=4, fsdp=2"),
    ],
)
def test_the_nearest_sizes_are_named_and_fit(given, devices, want):
    with pytest.raises(ConfigError, match=f"Nearest: {want}\\."):
        mesh.sizes(given, devices)
    fitting = {axis: int(n) for axis, _, n in (part.partition("=") for part in want.split(", "))}
    assert math.prod(mesh.sizes(fitting, devices).values()) == devices


class Chip:
    def __init__(self, *coords):
        self.coords, self.core_on_chip = coords, 0


@pytest.mark.parametrize(
    "torus, shape",
    [((6, 4, 10), (15, 2, 8)), ((4, 4, 4), (2, 4, 8)), ((2, 2, 1), (1, 4)), ((12, 16, 20), (15, 32, 8)), ((12, 16, 20), (15, 2, 16, 8))],
)
def test_every_chip_has_one_place_whatever_the_torus(torus, shape):
    chips = [Chip(x, y, z) for x in range(torus[0]) for y in range(torus[1]) for z in range(torus[2])]
    made = mesh._split(shape, chips)
    assert made.shape == shape and {id(c) for c in made.flat} == {id(c) for c in chips}
    # Members of an axis differ in few coordinates: a group of the fastest axis is a box in the torus.
    group = made[(0,) * (len(shape) - 1)]
    extents = [len({c.coords[k] for c in group}) for k in range(3)]
    assert math.prod(extents) == shape[-1]


def test_every_axis_lies_in_as_few_dims_as_possible():
    """15 stages take 3 of 12 and 5 of 20, which leaves 4 x 16 x 4 for 2 x 16 x 8; taking the largest dim first cut two axes more."""
    shares = mesh._shares((15, 2, 16, 8), (12, 16, 20))
    assert shares == ((3, 1, 5), (1, 2, 1), (4, 1, 4), (1, 8, 1))
    assert mesh._shares((7, 2), (4, 4)) is None


def test_all_axes_are_there_and_auto():
    made = mesh.make_mesh({"tensor": 2})
    assert made.axis_names == mesh.MESH_AXES and made.devices.size == 8 and made.shape["data"] == 4
    assert all(t == jax.sharding.AxisType.Auto for t in made.axis_types)
    assert mesh.make_mesh({}, jax.devices()[:1]).devices.size == 1


@pytest.mark.parametrize(
    "given, slices, want",
    [({"data": 4}, 2, {"data": 2}), ({"data": 2, "stage": 4}, 4, {"data": 2, "stage": 2}), ({"data": 6, "fsdp": 4}, 3, {"data": 3})],
)
def test_only_data_and_stage_cross_slices(given, slices, want):
    assert mesh.across_slices(mesh.sizes(given, math.prod(given.values())), slices) == {a: want.get(a, 1) for a in mesh.MESH_AXES}


def test_slices_that_nothing_may_cross_are_refused():
    with pytest.raises(ConfigError, match=r"2 slices .* data=1 and stage=1 do not split into 2; make mesh.data a multiple of 2"):
        mesh.across_slices(mesh.sizes({"data": 1, "fsdp": 8}, 8), 2)


@pytest.mark.aot
def test_each_data_replica_lies_inside_one_slice():
    """Hybrid sharding: fsdp and tensor inside a slice, data across two of them."""
    chips = topology.devices("v4", 8, slices=2)
    made = mesh.make_mesh({"data": 2, "fsdp": 4, "tensor": 2}, chips)
    for replica in range(2):
        assert len({d.slice_index for d in made.devices[:, replica].flat}) == 1
    assert len({d.slice_index for d in made.devices.flat}) == 2

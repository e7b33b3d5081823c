"""Names of topologies: what they mean, and what is said of those that do not exist."""
import math

import pytest

from effmodels.config import ConfigError
from effmodels.parallel import mesh
from effmodels.plan import chips, topology


@pytest.mark.parametrize(
    "text, name, devices, hosts, rings",
    [
        ("v4:8x8x16", "v4:8x8x16", 1024, 256, 3),
        ("v4-128", "v4:4x4x4", 64, 16, 3),  # TensorCores
        ("v4-8", "v4:2x2x1", 4, 1, 0),
        ("v4-64", "v4:2x4x4", 32, 8, 0),
        ("v4-2048", "v4:8x8x16", 1024, 256, 3),
        ("V4:1x1x1", "v4:1x1x1", 1, 1, 0),
        ("v4:12x16x20", "v4:12x16x20", 3840, 960, 3),
        ("v5e:2x4", "v5e:2x4", 8, 1, 0),
        ("v5litepod-16", "v5e:4x4", 16, 4, 0),
        ("v5p-16", "v5p:2x2x2", 8, 2, 0),
        ("v6e:16x16", "v6e:16x16", 256, 64, 2),
        ("tpu7x:2x2x1", "7x:2x2x1", 8, 1, 0),  # two devices a chip
        ("gpu:h200:8", "gpu:h200:8", 8, 1, 0),
    ],
)
def test_names(text, name, devices, hosts, rings):
    found = topology.parse(text)
    assert (found.name, found.chips, found.hosts, sum(found.wrap)) == (name, devices, hosts, rings)
    twice = topology.parse(name, 2) if found.platform == "tpu" else None
    assert twice is None or (twice.chips, twice.hosts) == (2 * devices, 2 * hosts)


@pytest.mark.parametrize(
    "text, message",
    [
        ("v9:2x2", r"'v9:2x2': unknown chip 'v9'. Did you mean 'v\d\w?'\? Available: 7x, cpu, gpu, v4, v5e, v5p, v6e. Write v4:4x4x4"),
        ("v4:3x3x1", r"a host of v4 has 2x2x1 chips, which does not divide 3x3x1; the nearest shape that it divides is v4:4x4x1, one chip"),
        ("v4:0x2x2", r"does not divide 0x2x2; the nearest shape that it divides is v4:2x2x2"),
        ("v4:4x4", r"v4 has a torus of 3 dims, as in v4:2x2x1; got 2"),
        ("v5e:2x2x1", r"v5e has a torus of 2 dims, as in v5e:2x4; got 3"),
        ("v5e:32x16", r"slices of up to 16x16 chips; take more of them with slices="),
        ("v4-7", r"the number counts TensorCores, two on each chip; got '7'"),
        ("v4-200", r"no slice has 100 chips; nearest: v4-128 and v4-256\."),
        ("v4-4", r"no slice has 2 chips; nearest: v4-2 and v4-8\."),
        ("v4-12", r"no slice has 6 chips; nearest: v4-8 and v4-16\."),
        ("v4-400", r"no slice has 200 chips; nearest: v4-384 and v4-512\."),
        ("v4-10000", r"no slice has 5000 chips; nearest: v4-8192\."),
        ("v5e-2", r"no slice has 2 chips; nearest: v5e-1 and v5e-4\."),
        ("7x-4", r"no slice has 2 chips; nearest: 7x-2 and 7x-8\."),
        ("v4", r"expected a shape or a size; write v4:4x4x4"),
        ("v4-8:2x2x1", r"expected a shape or a size"),
        ("gpu:b300:8", r"unknown GPU 'b300'. .*Available: a100, h100, h200. Write gpu:h200:8"),
        ("cpu", r"expected a number of devices, as in cpu:8"),
        ("cpu:big:8", r"expected a number of devices, as in cpu:8"),
    ],
)
def test_names_that_do_not_exist(text, message):
    with pytest.raises(ConfigError, match=message):
        topology.parse(text)


@pytest.mark.parametrize("family, largest", [("v4", 4096), ("v5e", 256), ("v5p", 6144), ("v6e", 256), ("7x", 9216)])
def test_every_slice_has_a_name_that_means_it(family, largest):
    found = topology.named_slices(family)
    assert list(found) == sorted(found) and max(found) == largest
    for number, shape in found.items():
        place = topology.parse(topology.slice_name(family, number))
        assert place.shape == shape and place.chips == number * place.chip.devices_per_chip and topology.parse(place.name) == place


def test_slices_are_of_tpus():
    with pytest.raises(ConfigError, match=r"slices are of TPUs; write the number of all devices instead"):
        topology.parse("gpu:h100:8", 2)
    with pytest.raises(ConfigError, match="expected a positive number, got 0"):
        topology.parse("v4:2x2x1", 0)


def test_every_device_of_a_gpu_or_cpu_topology_has_to_be_here():
    with pytest.raises(ValueError, match=r"no compiler for GPUs is used here; ask for the closed form \(--fast\)"):
        topology.parse("gpu:h200:8").devices()
    place = topology.parse("cpu:512")
    with pytest.raises(ValueError, match=r"this process has 8 CPU devices; start it with .*device_count=512"):
        place.devices()
    assert len(topology.parse("cpu:4").devices()) == 4


def test_a_cpus_devices_share_it(monkeypatch):
    monkeypatch.setattr(chips, "cpu", lambda: chips.measured("cpu", 8e9, 4e9))
    one, many = topology.parse("cpu:1").chip, topology.parse("cpu:4").chip
    assert (many.flops, many.bandwidth) == (2e9, 1e9) and many.hbm == one.hbm // 4


def test_chips_are_known_by_name_and_by_what_jax_calls_them():
    assert chips.get("v4").seconds(275e12, 0) == 1.0 and chips.get("v4").seconds(0, 1.228e12) == 1.0
    assert all(chips.PEAKS[chips.KINDS[name]].name == name for name in chips.CHIPS)
    with pytest.raises(ValueError, match=r"unknown chip 'v3'; expected one of v4, .*, cpu"):
        chips.get("v3")


@pytest.mark.aot
@pytest.mark.parametrize(
    "name, slices", [("v4:1x1x1", 1), ("v4:4x4x4", 1), ("v5e:2x4", 1), ("v5p:2x2x2", 2), ("v6e:4x4", 1), ("7x:2x2x1", 1)]
)
def test_libtpu_describes_what_the_name_says(name, slices):
    place = topology.parse(name, slices)
    found = place.devices()
    assert len(found) == place.chips and found[0].device_kind == place.chip.kind
    assert len({d.process_index for d in found}) == place.hosts
    assert len({getattr(d, "slice_index", None) for d in found}) == slices
    assert tuple(max(d.coords[k] for d in found) + 1 for k in range(len(place.shape))) == place.shape


@pytest.mark.aot
def test_meshes_on_a_torus_that_they_split_unevenly():
    """12 x 16 x 20 chips as 15 stages x 32 x 8: no axis is a product of whole dims, and jax's own placement fails."""
    made = mesh.make_mesh({"stage": 15, "data": 32, "tensor": 8}, topology.parse("v4:12x16x20").devices())
    assert made.devices.size == 3840 == len({d.id for d in made.devices.flat})
    for group in made.devices.reshape(-1, 8)[::97]:  # a tensor group is a box of neighbours
        extents = [max(c) - min(c) + 1 for c in zip(*(d.coords for d in group))]
        assert math.prod(extents) == 8, extents
    split = {"stage": 15, "fsdp": 2, "expert": 16, "tensor": 8}  # on which jax's own placement ends in a TypeError
    assert mesh.make_mesh(split, topology.parse("v4:12x16x20").devices()).devices.size == 3840

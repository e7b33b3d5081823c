"""Every axis alone, every pair of axes, and some triples: train's own step on 8 devices equals one device, loss and every gradient.

And the sweep: all checks of every config in its small form, on its own mesh.
"""
import itertools

import jax
import pytest

from effmodels.verify import verify
from tests.configs.catalogue import distinct_short, load
from tests.verify.cases import tiny

AXES = ("fsdp", "seq", "tensor", "expert", "stage")  # data takes what is left
MESHES = [c for n in (1, 2) for c in itertools.combinations(AXES, n)] + [
    ("fsdp", "seq", "expert"), ("seq", "tensor", "stage"), ("fsdp", "expert", "stage"), ("tensor", "expert", "seq"),
    ("fsdp", "tensor", "stage"),
]  # fmt: skip
GATE = [("seq", "expert"), ("tensor", "stage")]


@pytest.mark.parametrize("axes", [pytest.param(a, marks=pytest.mark.slow(always=a in GATE), id=" x ".join(a)) for a in MESHES])
def test_axes_together_equal_one_device(axes):
    report = verify(tiny(dict.fromkeys(axes, 2), num_layers=4, dropout=0.1), checks=["mesh"], log=print)
    assert report.passed, report.table()


@pytest.mark.slow
def test_data_alone_equals_one_device():
    report = verify(tiny({"data": 8}, dropout=0.1), checks=["mesh"], log=print)
    assert report.passed, report.table()


@pytest.mark.slow
@pytest.mark.parametrize("name,argument", distinct_short(), ids="{}".format)
def test_sweep(name, argument):
    config = load(name, argument)
    report = verify(config, devices=jax.devices(), log=print)
    assert report.passed, report.table()

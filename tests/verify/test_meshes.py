"""Every axis alone, every pair of axes, and some triples: train's own step on 8 devices equals one device, loss and every gradient.

And the sweep: all checks of every config in its small form, on its own mesh.
"""
import importlib
import itertools
import pathlib

import jax
import pytest

from effmodels.verify import verify
from tests.verify.cases import tiny

AXES = ("fsdp", "seq", "tensor", "expert", "stage")  # data takes what is left
MESHES = [c for n in (1, 2) for c in itertools.combinations(AXES, n)] + [
    ("fsdp", "seq", "expert"), ("seq", "tensor", "stage"), ("fsdp", "expert", "stage"), ("tensor", "expert", "seq"),
    ("fsdp", "tensor", "stage"),
]  # fmt: skip
DEFAULT = [("seq", "expert"), ("tensor", "stage")]


@pytest.mark.parametrize("axes", [pytest.param(a, marks=() if a in DEFAULT else pytest.mark.slow, id=" x ".join(a)) for a in MESHES])
def test_axes_together_equal_one_device(axes):
    report = verify(tiny(dict.fromkeys(axes, 2), num_layers=4, dropout=0.1), checks=["mesh"], log=print)
    assert report.passed, report.table()


@pytest.mark.slow
def test_data_alone_equals_one_device():
    report = verify(tiny({"data": 8}, dropout=0.1), checks=["mesh"], log=print)
    assert report.passed, report.table()


SMALL = {
    "dense_65b": "small", "gpt4_moe_1p8t": "small", "moe_1b": "small", "quickstart": "test", "reference_8m": "small",
    "retnet_6p7b": "small",
}  # fmt: skip


def test_the_sweep_knows_every_config():
    files = {p.stem for p in (pathlib.Path(__file__).resolve().parents[2] / "configs").glob("*.py")} - {"__init__", "common"}
    assert files == set(SMALL), "name the small form of a new config here"


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_sweep(name):
    config = importlib.import_module(f"configs.{name}").get_config(SMALL[name])
    report = verify(config, devices=jax.devices(), log=print)
    assert report.passed, report.table()

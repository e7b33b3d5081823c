"""What None chooses is said once; the packages export functions; kernels import jax and numpy only; the examples in the docs are true."""
import ast
import doctest
import importlib
import logging
import pathlib
import sys

import jax.numpy as jnp
import pytest

import pallas_kernels
from pallas_kernels import dispatch, target

OPS = ["flash_attention", "grouped_matmul", "linear_cross_entropy", "retention"]


def retain(implementation=None, **kwargs):
    x = jnp.ones((1, 2, 1, 1))
    return pallas_kernels.retention(x, x, x, jnp.zeros(1), implementation=implementation, **kwargs)


def test_none_says_once_what_it_chose_and_refused(caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "_said", set())
    with caplog.at_level(logging.INFO, logger="pallas_kernels"):
        for _ in range(2):
            retain()
    assert [record.message for record in caplog.records] == [
        "retention: implementation=None chose xla (refused pallas_tpu: the program is for a CPU; pallas_gpu: the program is for a CPU)"]


@pytest.fixture
def for_a(monkeypatch):
    """Makes dispatch believe that the program is for another platform."""
    return lambda platform, kind: monkeypatch.setattr(dispatch, "target", lambda: target.Target(platform, kind))


def test_none_picks_the_kernel_of_the_platform_that_the_program_is_for(for_a):
    arguments = (None,) * 8
    for_a("cpu", "cpu")
    assert dispatch.pick("retention", "retain", None, None, arguments).__module__ == "pallas_kernels.retention.xla"
    for_a("gpu", "NVIDIA H200")
    # Not seen right on a GPU yet: never picked, whatever it supports.
    assert "retention" not in dispatch.SEEN_RIGHT_ON_A_GPU
    assert dispatch.pick("retention", "retain", None, None, arguments).__module__ == "pallas_kernels.retention.xla"


def test_a_kernel_of_another_platform_is_interpreted_when_named(for_a):
    x = jnp.ones((1, 2, 1, 1))
    arguments = (x, x, x, jnp.zeros(1), None, None, None, 1.0)
    assert dispatch.pick("retention", "retain", "pallas_tpu", None, arguments).keywords == {"interpret": True}
    assert dispatch.pick("retention", "retain", "pallas_tpu", False, arguments).keywords == {"interpret": False}
    for_a("tpu", "TPU v4")
    assert dispatch.pick("retention", "retain", "pallas_tpu", None, arguments).keywords == {"interpret": False}
    assert dispatch.pick("retention", "retain", None, None, arguments).func.__module__ == "pallas_kernels.retention.tpu"


@pytest.mark.parametrize("op", OPS)
def test_both_import_paths_give_the_function(op):
    assert getattr(importlib.import_module(f"pallas_kernels.{op}"), op) is getattr(pallas_kernels, op)


@pytest.mark.parametrize("op", OPS)
def test_examples_in_the_docs(op):
    failures, tried = doctest.testmod(importlib.import_module(f"pallas_kernels.{op}.api"))
    assert tried and not failures


def test_imports():
    root = pathlib.Path(pallas_kernels.__file__).parent
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None)]
            for name in filter(None, modules):
                top = name.split(".")[0]
                assert top in {"jax", "numpy", "pallas_kernels"} or top in sys.stdlib_module_names, f"{path} imports {name}"

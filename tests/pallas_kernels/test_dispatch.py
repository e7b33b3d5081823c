"""What None chooses is said once; the packages export functions; kernels import jax and numpy only; the examples in the docs are true."""
import ast
import doctest
import importlib
import logging
import pathlib
import sys

import pytest

import pallas_kernels
from pallas_kernels import dispatch

OPS = ["flash_attention", "grouped_matmul", "linear_cross_entropy", "retention"]


def test_none_says_once_what_it_chose_and_refused(caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "_said", set())
    with caplog.at_level(logging.INFO, logger="pallas_kernels"):
        assert [dispatch.choose("retention", None) for _ in range(2)] == ["xla", "xla"]
    assert [record.message for record in caplog.records] == [
        "retention: implementation=None chose xla (refused pallas_tpu: no Pallas TPU kernel is written yet; "
        "pallas_gpu: no Pallas GPU kernel is written yet)"]


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

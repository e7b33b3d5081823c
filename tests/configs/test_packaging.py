"""What pip installs: every package of the repository, and extras whose pins agree with the base."""
import fnmatch
import runpy
import sys
import types

import pytest
from packaging.requirements import Requirement

from tests.configs.catalogue import ROOT

TOPS = ("effmodels", "pallas_kernels", "experiments", "configs")


@pytest.fixture
def arguments(monkeypatch):
    """What setup.py passes to setuptools, which a test environment need not have; `packages` are the patterns of find_packages."""
    given = {}
    stub = types.SimpleNamespace(setup=lambda **kwargs: given.update(kwargs), find_packages=lambda include: include)
    monkeypatch.setitem(sys.modules, "setuptools", stub)
    runpy.run_path(str(ROOT / "setup.py"))
    return given


def test_every_folder_with_code_is_a_package(arguments):
    """So that `experiments` and `configs` import after a pip install from a git address too."""
    folders = {p.parent.relative_to(ROOT) for top in TOPS for p in (ROOT / top).rglob("*.py")}
    for folder in folders:
        assert (ROOT / folder / "__init__.py").exists(), f"{folder} has no __init__.py: find_packages passes over it"
        assert any(fnmatch.fnmatch(".".join(folder.parts), pattern) for pattern in arguments["packages"]), folder
    assert not any(fnmatch.fnmatch(name, pattern) for name in ("tests", "tests.data", "colab") for pattern in arguments["packages"])


def test_extras(arguments):
    extras = arguments["extras_require"]
    assert {"tpu", "cuda", "plan", "dev", "test"} <= set(extras)
    base = {r.name: r for r in map(Requirement, arguments["install_requires"])}
    for name, requirements in extras.items():
        for requirement in map(Requirement, requirements):
            if requirement.name in base:
                assert requirement.specifier == base[requirement.name].specifier, f"[{name}]: {requirement} differs from the base"
    assert set(extras["test"]) <= set(extras["dev"])
    for name in ("tpu", "plan"):
        assert any(r.name == "jax" and r.extras == {"tpu"} for r in map(Requirement, extras[name])), f"[{name}] brings libtpu"


def test_every_pin_has_both_ends_or_a_reason(arguments):
    """jax and its circle change their interfaces between minor versions: both ends are pinned."""
    for requirement in map(Requirement, arguments["install_requires"]):
        if requirement.name in ("jax", "flax", "optax", "orbax-checkpoint", "chex", "grain"):
            assert {s.operator for s in requirement.specifier} == {">=", "<"}, requirement
        assert requirement.specifier, f"{requirement} has no version"

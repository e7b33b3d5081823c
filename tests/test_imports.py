"""Imports point one way, checked by parsing every file: no later part can be needed by an earlier one.

pallas_kernels <- effmodels <- experiments; configs import ml_collections and configs.common only. Inside effmodels:
config, registry <- parallel <- layers <- mixers, channel <- models <- decode, interop <- train <- plan, verify, compare;
data is imported by train and above only, and by interop, which reads and writes tokenizers.
"""
import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
# What each part of effmodels may import of the rest of effmodels. A new part needs a line here.
MAY_IMPORT = {
    "config": set(),
    "simulated": set(),
    "registry": {"config"},
    "parallel": {"config", "registry"},
    "layers": {"config", "registry", "parallel"},
    "mixers": {"config", "registry", "parallel", "layers"},
    "channel": {"config", "registry", "parallel", "layers", "mixers"},
    "multimodal": {"config", "registry", "parallel", "layers", "mixers", "channel"},
    "models": {"config", "registry", "parallel", "layers", "mixers", "channel", "multimodal"},
    "decode": {"config", "registry", "parallel", "layers", "mixers", "channel", "multimodal", "models"},
    "interop": {"config", "registry", "parallel", "layers", "mixers", "channel", "multimodal", "models", "data"},
    "data": {"config", "registry"},
}
MAY_IMPORT["train"] = {*MAY_IMPORT["decode"], "decode", "interop", "data"}
for _part in ("plan", "verify", "compare"):
    MAY_IMPORT[_part] = {*MAY_IMPORT["train"], "train", "simulated"}
OURS = ("pallas_kernels", "effmodels", "experiments", "configs", "tests")


def imports(path):
    """Absolute names of the modules that a file imports, at its top or inside functions."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) + "." if node.level else ""
            yield from (f"{base}{node.module or ''}.{alias.name}".replace("..", ".") for alias in node.names)


def files(package):
    return sorted((ROOT / package).rglob("*.py"))


def violations(package, allowed):
    """'file imports module' for every import that allowed(file, parts of the module's name) refuses."""
    found = []
    for path in files(package):
        for name in imports(path):
            if not allowed(path, name.split(".")):
                found.append(f"{path.relative_to(ROOT)} imports {name}")
    return found


def test_kernels_import_jax_and_numpy_only():
    def allowed(path, parts):
        return parts[0] == "pallas_kernels" or parts[0] in {"jax", "numpy", *sys.stdlib_module_names}

    assert violations("pallas_kernels", allowed) == []


def test_only_parallel_imports_kernels():
    """A mixer that called a kernel itself would compile on CPU and fail on the first mesh of real TPUs."""

    def allowed(path, parts):
        return parts[0] != "pallas_kernels" or path.relative_to(ROOT).parts[:2] == ("effmodels", "parallel")

    assert violations("effmodels", allowed) == []

    def in_experiments(path, parts):
        return parts[0] != "pallas_kernels" or path.parent.name == "kernels"  # the kernel benchmark

    assert violations("experiments", in_experiments) == []


def test_parts_of_effmodels_point_one_way():
    def allowed(path, parts):
        if parts[0] != "effmodels" or path == ROOT / "effmodels" / "__init__.py":
            return parts[0] not in ("experiments", "configs", "tests")
        own = path.relative_to(ROOT / "effmodels").parts[0].removesuffix(".py")
        assert own in MAY_IMPORT, f"effmodels/{own} is new: say in {__file__} what it may import"
        return len(parts) > 1 and parts[1] in {own, *MAY_IMPORT[own]}

    assert violations("effmodels", allowed) == []


def test_configs_import_ml_collections_and_common_only():
    def allowed(path, parts):
        return parts[0] in ("ml_collections", "__future__") or parts == ["configs", "common"]

    assert violations("configs", allowed) == []


def test_nothing_imports_tests_or_experiments():
    for package in ("pallas_kernels", "effmodels", "configs"):
        assert violations(package, lambda path, parts: parts[0] not in ("tests", "experiments")) == []
    assert violations("experiments", lambda path, parts: parts[0] != "tests") == []


def test_registries_name_files_that_exist():
    """Every line is "module:Class", one file per kind."""
    from effmodels.channel.registry import CHANNELS
    from effmodels.mixers.registry import MIXERS

    for table, package in ((MIXERS, "mixers"), (CHANNELS, "channel")):
        targets = [target.split(":") for target in table.values()]
        assert len({module for module, _ in targets}) == len(targets)
        for module, cls in targets:
            path = ROOT / pathlib.Path(*module.split(".")).with_suffix(".py")
            assert path.parent.name == package and f"class {cls}(" in path.read_text()


@pytest.mark.parametrize("source", ["from effmodels import train", "import effmodels.train as t"])
def test_the_parser_sees_every_form(tmp_path, monkeypatch, source):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    path = tmp_path / "effmodels" / "layers" / "x.py"
    path.parent.mkdir(parents=True)
    path.write_text(f"def f():\n    {source}\n\nfrom . import y\nfrom ..parallel import axes\n")
    assert set(imports(path)) == {"effmodels.train", "effmodels.layers.y", "effmodels.parallel.axes"}


"""Imports point one way, as CONTRIBUTING and docs/design.md say: read from every source file, lazy imports included."""
import ast
import sys

import pytest

from tests.docs.blocks import ROOT

# A part may import parts of a lower rank, and its own rank; `data` stands aside and is imported by train and above only.
RANKS = {
    "config": 0, "registry": 1, "parallel": 2, "layers": 3, "mixers": 4, "channel": 4, "models": 5, "decode": 6, "interop": 6, "train": 7,
}  # fmt: skip
ABOVE_TRAIN = 8  # plan, verify, compare
SOURCES = sorted(p for top in ("pallas_kernels", "effmodels", "experiments", "configs") for p in (ROOT / top).rglob("*.py"))


def imports(path):
    """Dotted names that a file imports; `from a import b` counts as a.b."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.relative_to(ROOT)}: relative import; write it in full"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def part(dotted):
    """effmodels.models.state.split -> models."""
    names = dotted.split(".")
    return names[1] if len(names) > 1 else ""


@pytest.mark.parametrize("top", ["pallas_kernels", "effmodels", "experiments", "configs"])
def test_imports_point_one_way(top):
    wrong = [message for path in SOURCES if path.relative_to(ROOT).parts[0] == top for message in complaints(path, top)]
    assert not wrong, "\n".join(wrong)


def complaints(path, top):
    where = path.relative_to(ROOT)
    own = where.with_suffix("").parts[1] if top == "effmodels" else ""
    for name in imports(path):
        root = name.split(".")[0]
        message = f"{where} imports {name}"
        if root in sys.stdlib_module_names:
            continue
        if top == "configs" and not (root == "ml_collections" or name.startswith("configs.common")):
            yield f"{message}: a config imports ml_collections and configs.common only"
        elif top == "pallas_kernels" and root not in ("jax", "numpy", "pallas_kernels"):
            yield f"{message}: kernels import jax and numpy only"
        elif top == "effmodels" and root in ("experiments", "configs", "tests"):
            yield f"{message}: the library knows no mains and no configs"
        elif top == "effmodels" and root == "pallas_kernels" and own != "parallel":
            yield f"{message}: kernels are called through effmodels.parallel.ops"
        elif top == "effmodels" and root == "effmodels" and not allowed(own, part(name)):
            yield f"{message}: {own} may not import {part(name)}"


def allowed(own, other):
    if own == other or own in ("", "__init__"):
        return own == other
    if own == "data":
        return False
    rank = RANKS.get(own, ABOVE_TRAIN)
    return rank >= RANKS["train"] if other == "data" else RANKS.get(other, ABOVE_TRAIN) <= rank


def test_the_rules_refuse_what_they_should():
    assert allowed("models", "layers") and allowed("channel", "mixers") and allowed("train", "data") and allowed("plan", "train")
    assert not any((allowed("layers", "mixers"), allowed("models", "decode"), allowed("models", "data"), allowed("data", "config"),
                    allowed("train", "plan")))  # fmt: skip

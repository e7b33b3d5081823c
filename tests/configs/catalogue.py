"""Every file of configs/ and every argument that it takes, read from the sources: a new config is tested without a new line here."""
import ast
import importlib
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDER = ROOT / "configs"
NAMES = sorted(p.stem for p in FOLDER.glob("*.py") if p.stem not in ("__init__", "common"))


def arguments(name):
    """What get_config compares its argument with: `arg == "small"`, `arg in ("a", "b")`."""
    found = []
    for node in ast.walk(ast.parse((FOLDER / f"{name}.py").read_text())):
        if isinstance(node, ast.Compare) and isinstance(node.left, ast.Name) and node.left.id == "arg":
            for constant in (n for right in node.comparators for n in ast.walk(right) if isinstance(n, ast.Constant)):
                if isinstance(constant.value, str) and constant.value not in found:
                    found.append(constant.value)
    return found


VARIANTS = [(name, arg) for name in NAMES for arg in (None, *arguments(name))]


def label(variant):
    """quickstart, quickstart:test."""
    name, arg = variant
    return name if arg is None else f"{name}:{arg}"


def load(name, arg=None):
    """The ConfigDict of a config file."""
    return importlib.import_module(f"configs.{name}").get_config(arg)


def short(name):
    """The argument of the form that takes a minute."""
    return "small" if "small" in arguments(name) else "test"


def distinct_short():
    """[(name, argument)] of the short forms, the first of those whose models are equal: the sizes of one family differ in nothing there."""
    found = {}
    for name in NAMES:
        found.setdefault(load(name, short(name)).model.to_json_best_effort(sort_keys=True), (name, short(name)))
    return list(found.values())

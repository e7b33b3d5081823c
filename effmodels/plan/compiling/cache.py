"""Compiled programs kept on disk: the second plan of the same config for the same topology compiles nothing.

One folder per program under $EFFMODELS_PLAN_CACHE, else ~/.cache/effmodels/plans; an empty value keeps nothing. The key holds every field
of the config, the topology, what is compiled, flags in the environment, versions, and a digest of the sources that decide what is compiled.
A folder appears whole or not at all, so that two plans at once do not disturb each other.
"""
import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import tempfile
import uuid

from effmodels.plan import records

_ROOT = pathlib.Path(__file__).parents[3]
# Of the planner itself only these decide what is compiled; the rest reads it, and is free to change.
_OF_PLAN = ("topology.py", "compiling/step.py", "formulas/executed.py", "formulas/decoding.py")
_FLAGS = ("LIBTPU_INIT_ARGS", "XLA_FLAGS")
# jax's settings that the child sets itself, or that compile nothing differently.
_OTHERS = re.compile("JAX_(PLATFORMS|OPTIMIZATION_LEVEL|NUM_CPU_DEVICES|COMPILATION_CACHE|PERSISTENT_CACHE|LOG|DEBUG_LOG|TRACEBACK)")


def folder():
    """Where plans are kept, or None."""
    given = os.environ.get("EFFMODELS_PLAN_CACHE", "~/.cache/effmodels/plans")
    return pathlib.Path(given).expanduser() if given else None


def key(request: dict) -> str:
    """A name for what the request compiles with these sources in this environment."""
    text = {"request": request, "sources": sources(), "versions": versions(), "environment": environment()}
    text = json.dumps(text, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def environment() -> dict:
    """The variables that tell the compiler what to do; how many devices are simulated is the topology's."""
    found = {name: value for name, value in os.environ.items() if name in _FLAGS or name.startswith("JAX_") and not _OTHERS.match(name)}
    if "XLA_FLAGS" in found:
        found["XLA_FLAGS"] = " ".join(f for f in found["XLA_FLAGS"].split() if "xla_force_host_platform_device_count" not in f)
    return {name: value for name, value in found.items() if value.strip()}


@functools.cache
def sources() -> str:
    """A digest of the package's sources that can change a compiled step."""
    digest, plan = hashlib.sha256(), _ROOT / "effmodels" / "plan"
    for package in ("effmodels", "pallas_kernels"):
        for path in sorted((_ROOT / package).rglob("*.py")):
            if plan not in path.parents or path.relative_to(plan).as_posix() in _OF_PLAN:
                digest.update(f"{path.relative_to(_ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


@functools.cache
def versions() -> dict:
    """Versions of what the compiled program depends on."""
    found = {}
    for package in ("jax", "jaxlib", "libtpu", "effmodels"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def find(name: str):
    """The folder of a kept program, or None."""
    here = folder()
    return here / name if here is not None and (here / name / "result.json").exists() else None


@contextlib.contextmanager
def writing(name: str):
    """A new folder to fill; at the end it becomes the kept one, unless another plan was first, or nothing is kept. Yields the folder."""
    here = folder()
    base = here if here is not None else pathlib.Path(tempfile.gettempdir())
    base.mkdir(parents=True, exist_ok=True)
    new = base / f".{name}-{uuid.uuid4().hex}"
    new.mkdir()
    try:
        yield new
        if here is not None:
            with contextlib.suppress(OSError):  # it is there already
                new.rename(here / name)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def kept_plan(name: str):
    """The Plan that these sources made of a kept program, or None."""
    path = _plan_file(name)
    if path is None or not path.exists():
        return None
    return records.from_json(json.loads(path.read_text()))


def keep_plan(name: str, plan):
    """Writes a Plan next to its program; nothing where nothing is kept."""
    path = _plan_file(name)
    if path is not None and path.parent.exists():
        part = path.with_name(f".{uuid.uuid4().hex}")
        part.write_text(json.dumps(records.to_json(plan)))
        part.replace(path)


def _plan_file(name):
    here = folder()
    return None if here is None else here / name / f"plan-{reader()}.json"


@functools.cache
def reader() -> str:
    """A digest of the planner's own sources."""
    digest = hashlib.sha256()
    for path in sorted((_ROOT / "effmodels" / "plan").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]

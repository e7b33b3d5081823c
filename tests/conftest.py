"""One JAX set-up for every test: CPU, eight simulated devices, a compilation cache on disk.

Everything here happens before jax is imported for the first time.
"""
import hashlib
import os
import pathlib
import re

from effmodels import simulated

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # on a GPU: JAX_PLATFORMS=cuda python -m pytest -m gpu
for _name, _value in simulated.environment(8 if simulated.asked_for() == 1 else simulated.asked_for()).items():
    os.environ[_name] = os.environ["JAX_PLATFORMS"] if _name == "JAX_PLATFORMS" else _value
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax  # noqa: E402
import pytest  # noqa: E402

_CACHE = pathlib.Path(os.environ.get("EFFMODELS_TEST_CACHE", pathlib.Path(__file__).parent.parent / ".cache" / "jax-tests"))
jax.config.update("jax_compilation_cache_dir", str(_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@pytest.fixture
def key():
    """A threefry key: draws that are compared must not depend on how they are batched."""
    return jax.random.key(0, impl="threefry2x32")


@pytest.fixture
def x64():
    """Double precision inside one test: forms that must be equal are compared where rounding plays no part."""
    with jax.enable_x64(True):
        yield


# Folders whose tests also run on the second version column in .ci/run; the rest depends on no library that differs between the two.
CORE = ("contract", "parallel", "layers", "mixers", "channel", "models", "decode", "pallas_kernels", "train")


# Tests that need something a plain install has not: they run only when `-m` names their marker.
NEED = ("aot", "gpu_compile", "gpu")


def pytest_collection_modifyitems(config, items):
    """Marks the core tests; leaves slow ones out unless SLOW_SHARD=k/n asks for the k-th of n parts, and NEED unless asked for by name.

    The first part, which the gate runs, also has every test marked `slow(always=True)`.
    """
    kept, left_out = [], []
    for item in items:
        if pathlib.Path(item.path).parent.name in CORE:
            item.add_marker("core")
        # A test named on the command line runs whatever its marks.
        named = any("::" in arg for arg in config.args)
        (kept if named or _wanted(item, config.getoption("-m")) else left_out).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


def _wanted(item, expression):
    asked = set(re.findall(r"\w+", expression or ""))
    if any(item.get_closest_marker(name) and name not in asked for name in NEED):
        return False
    slow, shard = list(item.iter_markers("slow")), os.environ.get("SLOW_SHARD")
    return not slow if shard is None else bool(slow) and _shard(item.nodeid, slow, shard)


def _shard(nodeid, slow, shard):
    k, n = map(int, shard.split("/"))
    if not 1 <= k <= n:
        raise pytest.UsageError(f"SLOW_SHARD={shard}: expected k/n with 1 <= k <= n.")
    always = any(mark.kwargs.get("always") for mark in slow)
    return k == (1 if always else 1 + int(hashlib.sha256(nodeid.encode()).hexdigest(), 16) % n)

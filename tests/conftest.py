"""One JAX set-up for every test: CPU, eight simulated devices, a compilation cache on disk.

Everything here happens before jax is imported for the first time.
"""
import hashlib
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# An absolute bound on the thread pool: interpreted kernels with callbacks can exhaust a pool sized by two cores (jax 0.10).
os.environ.setdefault("NPROC", "8")
_flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in _flags:
    os.environ["XLA_FLAGS"] = f"{_flags} --xla_force_host_platform_device_count=8".strip()
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


def pytest_collection_modifyitems(config, items):
    """Marks the core tests; leaves slow ones out unless SLOW_SHARD=k/n asks for the k-th of n parts."""
    kept, left_out, shard = [], [], os.environ.get("SLOW_SHARD")
    for item in items:
        if pathlib.Path(item.path).parent.name in CORE:
            item.add_marker("core")
        slow = item.get_closest_marker("slow") is not None
        wanted = not slow if shard is None else slow and _in_shard(item.nodeid, shard)
        # A test named on the command line runs whatever its marks.
        named = any("::" in arg for arg in config.args)
        (kept if wanted or named else left_out).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


def _in_shard(nodeid, shard):
    k, n = map(int, shard.split("/"))
    if not 1 <= k <= n:
        raise pytest.UsageError(f"SLOW_SHARD={shard}: expected k/n with 1 <= k <= n.")
    return int(hashlib.sha256(nodeid.encode()).hexdigest(), 16) % n == k - 1

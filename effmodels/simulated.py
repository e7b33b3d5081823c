"""Devices simulated on the CPU: what a process needs in its environment before jax starts."""
import os
import re

_COUNT = re.compile(r"--xla_force_host_platform_device_count=(\d+)")


def environment(devices: int) -> dict[str, str]:
    """The variables to set for this many devices; other flags in XLA_FLAGS stay."""
    flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if not _COUNT.fullmatch(f)]
    count = f"--xla_force_host_platform_device_count={devices}"
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join([*flags, count]), **threads(devices)}


def threads(devices: int) -> dict[str, str]:
    """NPROC, the size of XLA's thread pool, where the machine's cores are too few.

    A device that waits in a collective holds a thread, and independent collectives hold several at once: 8 devices in a pool of 8
    wait for each other until the runtime ends the process.
    """
    return {"NPROC": str(max(os.cpu_count() or 1, 8 * devices))} if devices > 1 else {}


def asked_for() -> int:
    """The number of devices that XLA_FLAGS asks for; 1 if it does not."""
    found = _COUNT.findall(os.environ.get("XLA_FLAGS", ""))
    return int(found[-1]) if found else 1

"""Simulated devices: the environment of a process that has them."""
import os
import subprocess
import sys

from effmodels import simulated


def test_other_flags_stay_and_threads_suffice(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_cpu_enable_fast_math=false")
    assert simulated.asked_for() == 8
    found = simulated.environment(2)
    assert found["XLA_FLAGS"] == "--xla_cpu_enable_fast_math=false --xla_force_host_platform_device_count=2"
    assert int(found["NPROC"]) >= 16 and "NPROC" not in simulated.environment(1)
    done = subprocess.run(
        [sys.executable, "-c", "import jax; print(jax.device_count())"], env=os.environ | found, capture_output=True, text=True, check=True
    )
    assert done.stdout == "2\n"

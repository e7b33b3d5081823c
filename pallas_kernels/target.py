"""Which hardware the program being traced is for: that of the mesh in force, else the default backend's.

A mesh of topology devices makes a machine without a TPU trace, and compile, what a TPU would run.
"""
import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Target:
    platform: str  # "cpu", "gpu", "tpu"
    kind: str  # as the driver names it: "TPU v4", "NVIDIA H200", "cpu"


def target():
    """The Target of code traced here."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh is None or mesh.empty else getattr(mesh, "abstract_device", None)
    if device is None:
        device = jax.local_devices()[0]
    platform = device.platform or jax.default_backend()
    return Target("gpu" if platform in ("cuda", "rocm") else platform, device.device_kind)

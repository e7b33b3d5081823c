"""Compiles for an H200 that is not here: jax's CUDA plugin needs neither a GPU nor NVIDIA's libraries to make sm_90a programs.

    pip install --no-deps jax-cuda13-plugin==<jax version> jax-cuda13-pjrt==<jax version>     # 143 MB
"""
import functools
import importlib.util

import jax
from jax.experimental import topologies

# What XLA asks about the hardware: the data sheet's figures.
_TARGET = """
gpu_device_info {
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  threads_per_warp: 32  threads_per_block_limit: 1024  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024  thread_dim_limit_y: 1024  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448  shared_memory_per_core: 233472
  registers_per_block_limit: 65536  registers_per_core_limit: 65536
  device_memory_size: 151397597184  memory_bandwidth: 4800000000000  l2_cache_size: 52428800
  device_vendor: "NVIDIA Corporation"  device_address_bits: 64  name: "NVIDIA H200"
  driver_version: "13.0.0"  runtime_version: "12.8.0"  compile_time_toolkit_version: "12.8.0"
}
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
"""


@functools.cache
def device_mesh():
    """A mesh of the one described device. Its absence is an error, not a skip: these tests run only when asked for."""
    if importlib.util.find_spec("jax_plugins") is None or importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
        raise ModuleNotFoundError(f"the CUDA plugin of jax is not installed: see {__name__}.")
    topology = topologies.get_topology_desc(platform="cuda", target_config=_TARGET, topology="1x1x1")
    return jax.sharding.Mesh(topology.devices, ("x",))


def compile_for_h200(f, *shapes):
    """The compiled program of f at (shape, dtype) pairs; inside, `pallas_kernels.target` sees an NVIDIA H200."""
    mesh = device_mesh()
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in shapes]
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)  # it cannot read back what was compiled without a GPU
    try:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jax.jit(f).lower(*arguments).compile()
    finally:
        jax.config.update("jax_enable_compilation_cache", before)

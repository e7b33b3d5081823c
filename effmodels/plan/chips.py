"""What is known of the accelerators that figures are related to; all figures are those of one jax device.

Sources: [tpu] jax's `tpu_info`; [cloud] the machine types in Google's TPU documentation; [compiler] libtpu's own out-of-memory message;
[sheet] data sheets of the GPUs (SXM, dense, without sparsity); [assumed] nobody published it.
"""
import dataclasses
import functools
import os
import time

import numpy as np

from effmodels.train import budget

GIB = 2**30
GB = 1e9


@dataclasses.dataclass(frozen=True)
class Peak:
    """flops: dense bfloat16 FLOP/s. bandwidth: bytes/s of the main memory."""

    flops: float
    bandwidth: float

    def seconds(self, flops, num_bytes):
        """The roofline: nothing that does this work and moves these bytes is faster."""
        return max(flops / self.flops, num_bytes / self.bandwidth)


@dataclasses.dataclass(frozen=True)
class Chip(Peak):
    """One device as jax counts it: a whole chip, but half of a 7x.

    hbm: bytes that a program may use; 0 where nobody knows. ici: bytes/s of one link in one direction, torus_dims of them both ways.
    dcn: bytes/s that a host sends to other slices. per_host: devices of one host. host_memory: bytes of it.
    """

    name: str
    kind: str  # jax's device_kind
    platform: str  # tpu, gpu, cpu
    hbm: int = 0
    clock_mhz: float = 0.0
    ici: float = 0.0
    torus_dims: int = 0
    dcn: float = 0.0
    per_host: int = 1
    host_memory: float = 0.0
    devices_per_chip: int = 1


HOST_BYTES = 8e9  # bytes/s between a chip and its host: a guess, four chips on one PCIe switch
# ici: 45 GB/s a link and direction on v4 and v5e [assumed: 90 % of the 2,400 Gbit/s over six links and 1,600 over four that Google states];
# v5p 4,800 Gbit/s over six, v6e 3,584 over four, 7x 9,600 over six, likewise 90 %.
# dcn: 200 Gbit/s a host, 400 of v6e and 7x [assumed].
CHIPS = {
    chip.name: chip
    for chip in (
        # FLOP/s [tpu], bytes/s [tpu], name, kind, platform, usable HBM [compiler], MHz (cores.py), ici, torus, dcn, per host, host [cloud]
        Chip(275e12, 1.228e12, "v4", "TPU v4", "tpu", int(30.75 * GIB), 1050.0, 45e9, 3, 25e9, 4, 407 * GB),
        Chip(197e12, 0.82e12, "v5e", "TPU v5 lite", "tpu", int(15.75 * GIB), 1503.0, 45e9, 2, 25e9, 4, 192 * GB),
        Chip(459e12, 2.46e12, "v5p", "TPU v5", "tpu", int(95.73 * GIB), 1751.0, 90e9, 3, 25e9, 4, 448 * GB),
        Chip(918e12, 1.64e12, "v6e", "TPU v6 lite", "tpu", int(31.24 * GIB), 1751.0, 100e9, 2, 50e9, 4, 720 * GB),
        # Half a chip: jax shows each as two devices of 1.155 PFLOP/s. Clock [assumed].
        Chip(1.155e15, 3.7e12, "7x", "TPU7x", "tpu", int(94.74 * GIB), 2200.0, 90e9, 3, 50e9, 8, 960 * GB, devices_per_chip=2),
        # [sheet]; HBM less what the driver keeps [assumed: 4 %]; NVLink stands for ici: bytes/s of one GPU in one direction.
        Chip(989e12, 3.35e12, "h100", "NVIDIA H100 80GB HBM3", "gpu", int(76 * GB), 0.0, 450e9, 0, 400e9, 8, 2000 * GB),
        Chip(989e12, 4.8e12, "h200", "NVIDIA H200", "gpu", int(135 * GB), 0.0, 450e9, 0, 400e9, 8, 2000 * GB),
        Chip(312e12, 2.039e12, "a100", "NVIDIA A100-SXM4-80GB", "gpu", int(76 * GB), 0.0, 300e9, 0, 200e9, 8, 1000 * GB),
    )
}
PEAKS = {chip.kind: chip for chip in CHIPS.values()}
KINDS = {chip.name: chip.kind for chip in CHIPS.values()}


def get(name: str) -> Chip:
    """The Chip of a name in CHIPS, or of "cpu": this machine, measured once."""
    if name != "cpu" and name not in CHIPS:
        raise ValueError(f"unknown chip {name!r}; expected one of {', '.join((*CHIPS, 'cpu'))}.")
    return cpu() if name == "cpu" else CHIPS[name]


@functools.cache
def cpu() -> Chip:
    """This machine: float32 FLOP/s of a matmul and bytes/s of a copy, measured now (about half a second), and its memory."""
    return measured("cpu", budget.measured_matmul_rate(), _copy_rate())


def measured(name, flops, bandwidth) -> Chip:
    """A Chip without a data sheet, with this machine's memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Chip(flops, bandwidth, name, name, "cpu", memory, ici=bandwidth, dcn=bandwidth, host_memory=float(memory))


def share_of_cpu(devices) -> Chip:
    """One of so many simulated devices, which share this machine."""
    whole = cpu()
    return dataclasses.replace(whole, flops=whole.flops / devices, bandwidth=whole.bandwidth / devices, hbm=whole.hbm // devices)


def _copy_rate(size=2**26, repeats=3):
    """Bytes read and written per second by a copy that no cache holds."""
    source, target, best = np.ones(size, np.uint8), np.zeros(size, np.uint8), float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        np.copyto(target, source)
        best = min(best, time.perf_counter() - start)
    return 2 * size / best

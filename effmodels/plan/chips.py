"""Peak rates of the accelerators that figures are related to: per chip, dense bfloat16, as their makers state them."""
import dataclasses


@dataclasses.dataclass(frozen=True)
class Peak:
    flops: float  # FLOP/s
    bandwidth: float  # bytes/s of the main memory

    def seconds(self, flops, num_bytes):
        """The roofline: nothing that does this work and moves these bytes is faster."""
        return max(flops / self.flops, num_bytes / self.bandwidth)


# By the kind that jax reports. TPUs: jax's `tpu_info` and the published specifications; GPUs: data sheets, SXM, without sparsity.
PEAKS = {
    "TPU v4": Peak(275e12, 1.228e12),
    "TPU v5 lite": Peak(197e12, 0.82e12),
    "TPU v5": Peak(459e12, 2.46e12),
    "TPU v6 lite": Peak(918e12, 1.64e12),
    "NVIDIA H100 80GB HBM3": Peak(989e12, 3.35e12),
    "NVIDIA H200": Peak(989e12, 4.8e12),
}
KINDS = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}

"""Kernels with a slow twin each: one public function per op (attention has a second one, for rings), imports jax and numpy only."""
from pallas_kernels.flash_attention.api import flash_attention, flash_attention_grads
from pallas_kernels.gated_delta.api import gated_delta
from pallas_kernels.grouped_matmul.api import grouped_matmul
from pallas_kernels.linear_cross_entropy.api import linear_cross_entropy
from pallas_kernels.retention.api import retention

__all__ = ["flash_attention", "flash_attention_grads", "gated_delta", "grouped_matmul", "linear_cross_entropy", "retention"]

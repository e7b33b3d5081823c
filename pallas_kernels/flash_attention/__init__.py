"""Attention without the T x S matrix; see `api.flash_attention`."""
from pallas_kernels.flash_attention.api import flash_attention, flash_attention_grads

__all__ = ["flash_attention", "flash_attention_grads"]

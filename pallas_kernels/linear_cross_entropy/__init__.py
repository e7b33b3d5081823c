"""Cross entropy of a linear head without its logits in memory; see `api.linear_cross_entropy`."""
from pallas_kernels.linear_cross_entropy.api import linear_cross_entropy

__all__ = ["linear_cross_entropy"]

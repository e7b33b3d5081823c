"""One matmul per group of rows; see `api.grouped_matmul`."""
from pallas_kernels.grouped_matmul.api import grouped_matmul

__all__ = ["grouped_matmul"]

"""Retention and linear attention with decay; see `api.retention` and `summary.combine`."""
from pallas_kernels.retention.api import retention
from pallas_kernels.retention.summary import Summary, combine

__all__ = ["Summary", "combine", "retention"]

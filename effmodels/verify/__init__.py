"""Does a run compute what it should? The same numbers on its mesh and on one device, in every form, packed, recomputed, resumed."""
from effmodels.verify.run import CHECKS, verify

__all__ = ["CHECKS", "verify"]

"""What the TPU kernels need to know of a TPU: memory, cores and matrix units of each generation, and when to interpret."""
import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.target import target

LANES = 128  # columns of a vector register, and of a tile in memory


@dataclasses.dataclass(frozen=True)
class Chip:
    """One generation. Sources: jax's `pltpu.get_tpu_info`, and the limits in the compiler's own messages."""
    name: str
    cores: int  # per device, as one program: a grid axis marked "parallel" is split over them
    vmem: int  # bytes per core that a kernel may use
    mxu: int  # side of a matrix unit


CHIPS = {
    "TPU v4": Chip("v4", 2, 16 * 2**20, 128),
    "TPU v5 lite": Chip("v5e", 1, 128 * 2**20, 128),
    "TPU v5": Chip("v5p", 2, 64 * 2**20, 128),
    "TPU v6 lite": Chip("v6e", 1, 128 * 2**20, 256),
    "TPU7x": Chip("7x", 1, 64 * 2**20, 256),
}


def chip():
    """The chip that the traced program is for. Unknown or absent: v4, the tightest, whose blocks fit everywhere."""
    return CHIPS.get(target().kind, CHIPS["TPU v4"])


def precision(dtype):
    """Of a matmul in a kernel: float32 operands are multiplied as float32, not rounded to one pass of bfloat16."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def sublanes(dtype):
    """Rows of a tile in memory: 8 of 32 bits, 16 of 16, 32 of 8."""
    return 32 // jnp.dtype(dtype).itemsize


def round_up(n, multiple):
    return -(-n // multiple) * multiple

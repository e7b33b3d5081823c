"""What one optimiser step reads and writes."""
import jax
from flax import struct


@struct.dataclass
class TrainState:
    """step: int32 scalar, the number of finished steps; params, buffers: arrays by path; opt_state: the optimiser's tree."""

    step: jax.Array
    params: dict
    buffers: dict
    opt_state: object


def abstract(state):
    """The state as ShapeDtypeStructs that keep their shardings: what a checkpoint is restored into."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)), state)


def nbytes(tree):
    """Bytes of all arrays of a tree, concrete or abstract."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

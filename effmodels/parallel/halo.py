"""What a convolution needs of the tokens before a shard's own: the last few of the stretch before, from whoever holds it.

Letters: B batch, T tokens of the shard, r stretches of a shard, c = T / r tokens of one, w tokens of a halo, n shards.
"""
import jax
import jax.numpy as jnp

from effmodels.config import ConfigError
from effmodels.parallel import layouts


def stretches(x_BT, layout):
    """[B, r, c, ...]: the shard's tokens as stretches of the row; ConfigError for a layout of single tokens, and for an uneven split."""
    r = layouts.runs(layout)
    if r is None:
        raise ConfigError(f"convolution: the tokens of a {layout!r} layout have no neighbours on one device; use contiguous or zigzag.")
    B, T = x_BT.shape[:2]
    if T % r:
        raise ConfigError(f"convolution: a shard of a {layout!r} layout is {r} equal stretches of the row, got {T} tokens.")
    return x_BT.reshape(B, r, T // r, *x_BT.shape[2:])


def before(x_Brc, width, *, axis):
    """[B, r, w, ...]: the last `width` tokens before every stretch, zeros where the row starts; inside `shard_map`.

    axis: the mesh axes that split the row. Raises ConfigError for stretches shorter than the width, which would need more than a neighbour.
    """
    n, r, c = jax.lax.axis_size(axis), *x_Brc.shape[1:3]
    if c < width:
        raise ConfigError(
            f"convolution: {width} tokens before each stretch are needed, but a stretch has {c}; use longer rows, or fewer shards than {n}."
        )
    ends_Brw = x_Brc[:, :, c - width :]
    later = jax.lax.ppermute(ends_Brw[:, 0], axis, [(i, i + 1) for i in range(n - 1)])
    if r == 1:
        return later[:, None]
    # The second stretches of a zigzag lie on shards n-1, n-2, ...; the first of them follows the first stretch of its own shard.
    earlier = jax.lax.ppermute(ends_Brw[:, 1], axis, [(i, i - 1) for i in range(1, n)])
    turn = jax.lax.axis_index(axis) == n - 1
    return jnp.stack([later, jnp.where(turn, ends_Brw[:, 0], earlier)], axis=1)

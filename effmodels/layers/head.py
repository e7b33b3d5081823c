"""The output head. Letters: B batch, T time, D model, V vocab."""
import jax.numpy as jnp

from effmodels.layers.linear import dot


def logits(x_BTD, weight, *, tied, soft_cap=None, scale=1.0):
    """float32 logits [B, T, V] from the head [D, V] or, tied, from the embedding table [V, D]; soft_cap c gives c tanh(z / c)."""
    # Summed and kept in float32: rounded to bfloat16, close logits tie and sampling sees the order of the vocabulary.
    z_BTV = dot("BTD,VD->BTV" if tied else "BTD,DV->BTV", x_BTD, weight, dtype=jnp.promote_types(x_BTD.dtype, jnp.float32)) * scale
    return z_BTV if soft_cap is None else soft_cap * jnp.tanh(z_BTV / soft_cap)

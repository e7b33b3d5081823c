"""What travels with the activations through every layer: positions, order, documents, keys.

Letters: B batch, T time, S source time, D model.
"""
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from effmodels.parallel import layouts
from effmodels.parallel.axes import shards


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ctx:
    """Context of a call; frozen pytree, the last two fields static.

    positions_BT: for rotary only, may repeat. index_BT: strict order in the row; causality and windows use only this; None = that of
    the layout (contiguous: 0, 1, 2, ...).
    segment_ids_BT: 0 = padding, documents from 1; None = one document without padding. layer: absolute, int32, traced in scans.
    key: None = deterministic; else already folded with step and micro-batch. memory: {name: Memory} for cross-attention.
    experts_BTLk: expert ids that routers take instead of their own choice, of every absolute layer; -1 or None = their own.
    """

    positions_BT: Any = None
    index_BT: Any = None
    segment_ids_BT: Any = None
    layer: Any = 0
    key: Any = None
    experts_BTLk: Any = None
    memory: Any = dataclasses.field(default_factory=dict)
    layout: str = dataclasses.field(default="contiguous", metadata={"static": True})
    mode: str = dataclasses.field(default="train", metadata={"static": True})

    def at_layer(self, layer):
        """The context of one layer."""
        return dataclasses.replace(self, layer=jnp.asarray(layer, jnp.int32))

    def key_for(self, site):
        """The random key of this layer and site (a small integer), or None when deterministic."""
        if self.key is None:
            return None
        return jax.random.fold_in(jax.random.fold_in(self.key, self.layer), site)

    def experts(self, top_k):
        """experts_BTLk of this layer [B, T, top_k], or None."""
        if self.experts_BTLk is None:
            return None
        return jax.lax.dynamic_index_in_dim(self.experts_BTLk, self.layer, axis=2, keepdims=False)[..., :top_k]

    def rotary_positions(self, batch, time):
        """positions_BT, else the order in the row."""
        if self.positions_BT is not None:
            return self.positions_BT
        if self.index_BT is not None:
            return self.index_BT
        pieces = shards("seq") if self.layout != "contiguous" else 1
        return jnp.broadcast_to(layouts.order(self.layout, time, pieces), (batch, time))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Memory:
    """A sequence that layers may attend to: activations, documents (0 = padding) and order."""

    x_BSD: Any
    segment_ids_BS: Any = None
    index_BS: Any = None


def dropout(x_BTD, rate, key, layout="contiguous"):
    """x with a share `rate` of its entries zeroed and the rest scaled up; x itself without a key or at rate 0.

    The mask is drawn in the order of the row, so that a token keeps it under every layout.
    """
    if key is None or rate == 0.0:
        return x_BTD
    keep = layouts.to_layout(jax.random.bernoulli(key, 1.0 - rate, x_BTD.shape), layout, shards("seq"))
    return jnp.where(keep, x_BTD / (1.0 - rate), 0).astype(x_BTD.dtype)

"""Caches of a slot per token: a few slots are written, all are read.

In a scanned run of layers a cache is one layer of a stack that the loop carries (`Layer`). New tokens are written into the stack where it
lies; cut out, changed and put back, every token would cost four passes over the whole cache. Letters: B batch, T time, S slots, R layers.
"""
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp


class Slots:
    """Base of states whose arrays [B, S, ...] are written by `put` and read by `whole` only."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """Cache [B, S, ...] number `layer` of the stack [R, B, S, ...]; a leaf of the trees that it is in."""

    stack: Any
    layer: Any

    @property
    def shape(self):
        return self.stack.shape[1:]

    @property
    def dtype(self):
        return self.stack.dtype


def put(cache, slot_BT, new):
    """The cache with new [B, T, ...] in these slots of each row; a slot past the end is dropped."""
    row_B1, new = jnp.arange(slot_BT.shape[0])[:, None], new.astype(cache.dtype)
    if isinstance(cache, Layer):
        # Heads and their entries as one dim: a scatter wants them innermost, which for few heads is not how the cache lies.
        width = math.prod(cache.stack.shape[3:])
        flat = cache.stack.reshape(*cache.stack.shape[:3], width)
        written = flat.at[cache.layer, row_B1, slot_BT].set(new.reshape(*new.shape[:2], width), mode="drop")
        return Layer(written.reshape(cache.stack.shape), cache.layer)
    return cache.at[row_B1, slot_BT].set(new, mode="drop")


def whole(cache):
    """The cache as an array [B, S, ...]."""
    return _cut(cache.stack, cache.layer) if isinstance(cache, Layer) else cache


def layer_of(states, layer):
    """One layer of the stacked states of several mixers: `Layer`s of caches, arrays of what each token changes whole."""

    def of(state):
        return jax.tree.map(lambda a: Layer(a, layer) if isinstance(state, Slots) else _cut(a, layer), state)

    return tuple(of(state) for state in states)


def stacked(states, new, layer):
    """The stacked states with one layer of each replaced by a new one."""

    def back(value, a):
        return value.stack if isinstance(value, Layer) else jax.lax.dynamic_update_index_in_dim(a, value, layer, 0)

    return jax.tree.map(back, new, states)


def _cut(stack, layer):
    return jax.lax.dynamic_index_in_dim(stack, layer, 0, keepdims=False)

"""Attention over a split sequence by exchanging heads for tokens: every shard gets all tokens of some heads (DeepSpeed Ulysses,
arXiv:2309.14509). Letters: B batch, T tokens of one shard, N heads, K kv heads, H head dim, P value dim, n shards.
"""
import math

import jax
import jax.numpy as jnp

import pallas_kernels
from effmodels.config import ConfigError


def attend(q_BTNH, k_BTKH, v_BTKP, *, axis, layout, sinks=None, segment_ids=None, kv_segment_ids=None, positions=None, kv_positions=None,
           **options):  # fmt: skip
    """`pallas_kernels.flash_attention` of the local queries with the keys of all shards, inside `shard_map`; [B, T, N, P],
    with the logsumexp [B, T, N] if asked for the residual.

    Between the two exchanges all tokens are in the order of the row, so that without `positions` (None: those of the layout) the kernel
    knows its mask when it is compiled. kv heads that the shards do not divide are repeated until they do.

    Raises ConfigError when the shards do not divide the heads.
    """
    n, heads, kv_heads = jax.lax.axis_size(axis), q_BTNH.shape[2], k_BTKH.shape[2]
    if heads % n:
        valid = [i for i in range(2, heads + 1) if heads % i == 0]
        raise ConfigError(
            f"parallel.attention='ulysses': {heads} heads (of one tensor shard) cannot be exchanged over {n} sequence shards; valid "
            f"sequence shards: {', '.join(map(str, valid)) or 'none'}. Or use parallel.attention='ring'."
        )
    repeats = n // math.gcd(kv_heads, n)
    if repeats > 1:
        k_BTKH, v_BTKP = (jnp.repeat(x, repeats, axis=2) for x in (k_BTKH, v_BTKP))
    q, k, v = (_in_order(jax.lax.all_to_all(x, axis, 2, 1, tiled=True), layout, n) for x in (q_BTNH, k_BTKH, v_BTKP))
    ids = {"segment_ids": segment_ids, "kv_segment_ids": kv_segment_ids, "positions": positions, "kv_positions": kv_positions}
    ids = {name: _in_order(jax.lax.all_gather(x, axis, axis=1, tiled=True), layout, n) for name, x in ids.items() if x is not None}
    if sinks is not None:
        ids["sinks"] = jax.lax.dynamic_slice_in_dim(sinks, jax.lax.axis_index(axis) * (heads // n), heads // n)
    results = pallas_kernels.flash_attention(q, k, v, **ids, **options)
    return jax.tree.map(lambda x: jax.lax.all_to_all(_in_layout(x, layout, n), axis, 1, 2, tiled=True), results)


def _in_order(x_BT, layout, n):
    """`layouts.from_layout` of a whole row by moving its pieces: cheaper on a TPU than a gather."""
    B, T, *rest = x_BT.shape
    if layout == "striped":
        return x_BT.reshape(B, n, T // n, *rest).swapaxes(1, 2).reshape(x_BT.shape)
    if layout == "zigzag":
        pieces = x_BT.reshape(B, n, 2, T // n // 2, *rest)
        return jnp.concatenate([pieces[:, :, 0], pieces[:, ::-1, 1]], axis=1).reshape(x_BT.shape)
    return x_BT


def _in_layout(x_BT, layout, n):
    """`layouts.to_layout` likewise."""
    B, T, *rest = x_BT.shape
    if layout == "striped":
        return x_BT.reshape(B, T // n, n, *rest).swapaxes(1, 2).reshape(x_BT.shape)
    if layout == "zigzag":
        pieces = x_BT.reshape(B, 2 * n, T // n // 2, *rest)
        return jnp.stack([pieces[:, :n], pieces[:, :n - 1:-1]], axis=2).reshape(x_BT.shape)
    return x_BT

"""Attention to compressed blocks of keys, and to the tokens of those blocks that this attention finds important, block by block of queries.

Native Sparse Attention (arXiv:2502.11089): the weights of a query on compressed blocks, added up over the heads of a group, choose the
blocks (equations 8 and 10, with equal blocks for both); the choice itself gets no gradient.
Letters: B batch, T query, M blocks, C tokens of a block, N heads, K kv heads, G = N / K, H head dim, n chosen blocks.
"""
import functools

import jax
import jax.numpy as jnp

from effmodels.config import ConfigError
from effmodels.parallel import axes, ops
from effmodels.parallel.topk import softmax

GATHERED = 1 << 16  # (query, key) pairs of a kv head whose keys are gathered at once


def block_attention(q_BTNH, blocks, compressed, end_BM, *, top_blocks, scale, positions, segment_ids, block_segment_ids):
    """(attention to the compressed blocks, attention to the tokens of chosen ones), both [B, T, N, H] in q's dtype; 0 where none is seen.

    blocks: keys and values [B, M, C, K, H] of whole blocks; compressed: [B, M, K, H] of each. end_BM: position of a block's last token, -1
    for none. A block is visible to queries of its segment (not 0) from that position on. Chosen are the first block of the document and
    those of most weight; of equal ones the earlier. The blocks of the whole row are gathered where the sequence is split.
    """
    pieces, K = axes.shards("act_heads"), blocks[0].shape[3]
    if K % pieces:
        raise ConfigError(f"block_sparse: {K} kv heads cannot be split over a tensor axis of {pieces}, each chooses blocks of its own.")
    rows, heads = ("batch", "seq"), ("batch", "seq", "act_heads", None)
    arrays = {
        "q": (q_BTNH, heads), "positions": (positions, rows), "segment_ids": (segment_ids, rows), "end": (end_BM, ("batch", None)),
        "block_segment_ids": (block_segment_ids, ("batch", None)),
        **{n: (a, ("batch", None, None, "act_heads", None)) for n, a in zip(("k", "v"), blocks)},
        **{n: (a, ("batch", None, "act_heads", None)) for n, a in zip(("compressed_k", "compressed_v"), compressed)},
    }  # fmt: skip
    kernel = functools.partial(_by_queries, count=min(top_blocks, end_BM.shape[1]), scale=scale)
    return ops.run_sharded(kernel, arrays, (heads, heads))


def _by_queries(q, positions, segment_ids, *, count, scale, **keys):
    """One shard's queries, as many at a time as GATHERED allows; a part is computed again in the backward pass."""
    rows, T = {"q": q, "positions": positions, "segment_ids": segment_ids}, q.shape[1]
    size = max(8, GATHERED // (count * keys["k"].shape[2]))
    if T <= size:
        return _attend(rows, keys, count, scale)
    parts = -(-T // size)

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, parts * size - T)) + ((0, 0),) * (x.ndim - 2))  # of segment 0: sees nothing
        return jnp.moveaxis(x.reshape(x.shape[0], parts, size, *x.shape[2:]), 1, 0)

    def joined(x):
        return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], parts * size, *x.shape[3:])[:, :T]

    part = jax.checkpoint(lambda rows, keys: _attend(rows, keys, count, scale))
    return jax.tree.map(joined, jax.lax.map(lambda rows: part(rows, keys), jax.tree.map(cut, rows)))


def _attend(rows, keys, count, scale):
    (B, T, N, H), (C, K) = rows["q"].shape, keys["k"].shape[2:4]
    q_BTKGH, wide = rows["q"].reshape(B, T, K, N // K, H), jnp.promote_types(rows["q"].dtype, jnp.float32)
    see_BTM = (keys["end"][:, None] >= 0) & (keys["end"][:, None] <= rows["positions"][..., None])
    see_BTM &= (keys["block_segment_ids"][:, None] == rows["segment_ids"][..., None]) & (rows["segment_ids"][..., None] != 0)
    logits = scale * jnp.einsum("btkgh,bmkh->btkgm", q_BTKGH, keys["compressed_k"], preferred_element_type=wide)
    weights = softmax(logits, see_BTM[:, :, None, None])
    far = jnp.einsum("btkgm,bmkp->btkgp", weights.astype(q_BTKGH.dtype), keys["compressed_v"], preferred_element_type=wide)
    first_BM = keys["end"] == C - 1
    importance_BTKM = jax.lax.stop_gradient(weights.sum(3)) + (N // K + 1) * first_BM[:, None, None]
    top_BTKn, ids_BTKn = jax.lax.top_k(jnp.where(see_BTM[:, :, None], importance_BTKM, -jnp.inf), count)
    take = jax.vmap(jax.vmap(lambda a_MCH, ids_Tn: a_MCH[ids_Tn], (2, 1), 1))  # over rows and kv heads: [B, T, K, n, C, H]
    logits = scale * jnp.einsum("btkgh,btknch->btkgnc", q_BTKGH, take(keys["k"], ids_BTKn), preferred_element_type=wide)
    seen = jnp.broadcast_to((top_BTKn > -jnp.inf)[:, :, :, None, :, None], logits.shape)
    weights = softmax(logits.reshape(*logits.shape[:4], -1), seen.reshape(*logits.shape[:4], -1)).reshape(logits.shape)
    near = jnp.einsum("btkgnc,btkncp->btkgp", weights.astype(q_BTKGH.dtype), take(keys["v"], ids_BTKn), preferred_element_type=wide)
    return tuple(a.reshape(B, T, N, -1).astype(q_BTKGH.dtype) for a in (far, near))

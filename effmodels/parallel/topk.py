"""Attention over the k keys of every query that a light indexer scores highest, block by block of queries.

The indexer (DeepSeek-V3.2-Exp): I_ts = sum_j w_tj ReLU(q_tj . k_s). It is trained by the divergence between its softmax over the chosen
keys and the attention's weights, added up over all heads and normalised; nothing else of the loss reaches it.
Letters: B batch, T query, S key, N heads, K kv heads, G = N / K, H head dim, P value dim, J index heads, C index dim, k chosen keys.
"""
import functools

import jax
import jax.numpy as jnp

from effmodels.parallel import axes, layouts, ops, options

CHOSEN = 1 << 16  # (query, key) pairs of a block whose keys are gathered at once


def sparse_attention(
    q_BTNH, k_BSKH, v_BSKP, index_q_BTJC, index_k_BSC, index_w_BTJ, *, top_k, scale, segment_ids=None, kv_segment_ids=None,
    positions=None, kv_positions=None,
):  # fmt: skip
    """(out [B, T, N, P] in q's dtype, divergence [B, T], at least float32: 0 where a query sees nothing).

    Visible are keys of the query's segment (not 0) up to its position, as in `ops.attention`; without positions, those of the layout in
    force, and T = S. Of equal scores the earlier key wins. The keys of the whole row are gathered where the sequence is split.
    """
    pieces, kv_heads = axes.shards("act_heads"), k_BSKH.shape[2]
    if kv_heads % pieces:
        k_BSKH, v_BSKP = (jnp.repeat(x, q_BTNH.shape[2] // kv_heads, axis=2) for x in (k_BSKH, v_BSKP))
    if positions is None:
        positions = ops.layout_positions(q_BTNH)
        kv_segment_ids = segment_ids
        # In the order of the row, so that ties fall as they do on one device.
        in_row = functools.partial(layouts.from_layout, layout=options.current().layout, pieces=axes.shards("seq"))
        k_BSKH, v_BSKP, index_k_BSC, kv_positions = (in_row(x) for x in (k_BSKH, v_BSKP, index_k_BSC, positions))
        kv_segment_ids = None if segment_ids is None else in_row(segment_ids)
    head_axes = tuple(a for a in axes.as_tuple(axes.current_rules()["act_heads"]) if pieces > 1 and axes.current_mesh().shape.get(a, 1) > 1)
    rows, heads, key_heads = ("batch", "seq"), ("batch", "seq", "act_heads", None), ("batch", None, "act_heads", None)
    arrays = {
        "q": (q_BTNH, heads), "index_q": (index_q_BTJC, (*rows, None, None)), "index_w": (index_w_BTJ, (*rows, None)),
        "positions": (positions, rows), "segment_ids": (segment_ids, rows), "k": (k_BSKH, key_heads), "v": (v_BSKP, key_heads),
        "index_k": (index_k_BSC, ("batch", None, None)), "kv_positions": (kv_positions, ("batch", None)),
        "kv_segment_ids": (kv_segment_ids, ("batch", None)),
    }  # fmt: skip
    kernel = functools.partial(_by_blocks, top_k=min(top_k, k_BSKH.shape[1]), scale=scale, head_axes=head_axes)
    return ops.run_sharded(kernel, arrays, (heads, rows))


def index_scores(index_q_BTJC, index_k_BSC, index_w_BTJ):
    """I [B, T, S] in the indexer's dtype."""
    agreement_BTJS = jax.nn.relu(jnp.einsum("btjc,bsc->btjs", index_q_BTJC, index_k_BSC))
    return jnp.einsum("btjs,btj->bts", agreement_BTJS, index_w_BTJ)


def visible(positions, kv_positions, segment_ids=None, kv_segment_ids=None):
    """bool [B, T, S]: not empty, of the same document, not later."""
    see = (kv_positions[:, None, :] >= 0) & (kv_positions[:, None, :] <= positions[:, :, None])
    if segment_ids is not None:
        see &= (segment_ids[:, :, None] == kv_segment_ids[:, None, :]) & (segment_ids[:, :, None] != 0)
    return see


def _by_blocks(q, k, v, index_q, index_k, index_w, positions, kv_positions, segment_ids=None, kv_segment_ids=None, *, top_k, **static):
    """One shard's queries, as many at a time as CHOSEN allows; a block is computed again in the backward pass."""
    rows = {"q": q, "index_q": index_q, "index_w": index_w, "positions": positions}
    rows |= {} if segment_ids is None else {"segment_ids": segment_ids}
    keys = {"k": k, "v": v, "index_k": index_k, "kv_positions": kv_positions, "kv_segment_ids": kv_segment_ids}
    T, size = q.shape[1], max(8, CHOSEN // top_k)
    if T <= size:
        return _block(rows, keys, top_k=top_k, **static)
    blocks = -(-T // size)

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, blocks * size - T)) + ((0, 0),) * (x.ndim - 2), constant_values=-1 if x is positions else 0)
        return jnp.moveaxis(x.reshape(x.shape[0], blocks, size, *x.shape[2:]), 1, 0)

    def joined(x):
        return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], blocks * size, *x.shape[3:])[:, :T]

    block = jax.checkpoint(lambda rows, keys: _block(rows, keys, top_k=top_k, **static))
    return jax.tree.map(joined, jax.lax.map(lambda rows: block(rows, keys), jax.tree.map(cut, rows)))


def _block(rows, keys, *, top_k, scale, head_axes):
    q_BTNH, k_BSKH, v_BSKP = rows["q"], keys["k"], keys["v"]
    (B, T, N, H), K = q_BTNH.shape, k_BSKH.shape[2]
    wide = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    see_BTS = visible(rows["positions"], keys["kv_positions"], rows.get("segment_ids"), keys["kv_segment_ids"])
    scores_BTS = index_scores(rows["index_q"], keys["index_k"], rows["index_w"])
    top_BTk, ids_BTk = jax.lax.top_k(jnp.where(see_BTS, scores_BTS, -jnp.inf), top_k)
    chosen_BTk = top_BTk > -jnp.inf
    take = jax.vmap(lambda a_SKH, ids_Tk: a_SKH[ids_Tk])
    logits = scale * jnp.einsum(
        "btkgh,btckh->btkgc", q_BTNH.reshape(B, T, K, N // K, H), take(k_BSKH, ids_BTk), preferred_element_type=wide
    )  # fmt: skip
    weights = softmax(logits, chosen_BTk[:, :, None, None])
    out = jnp.einsum("btkgc,btckp->btkgp", weights.astype(v_BSKP.dtype), take(v_BSKP, ids_BTk), preferred_element_type=wide)
    target_BTk = jax.lax.stop_gradient(weights.sum((2, 3)))
    target_BTk = jax.lax.psum(target_BTk, head_axes) if head_axes else target_BTk
    return out.reshape(B, T, N, -1).astype(q_BTNH.dtype), _divergence(target_BTk, top_BTk, chosen_BTk)


def softmax(logits, seen):
    """Over the last dim; zeros where nothing is seen."""
    logits = jnp.where(seen, logits, -jnp.inf)
    peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.where(seen, jnp.exp(logits - jnp.where(peak == -jnp.inf, 0, peak)), 0)
    total = weights.sum(-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1)


def _divergence(target_BTk, top_BTk, chosen_BTk):
    """KL(target, normalised || softmax of the indexer's scores) over the chosen keys [B, T]."""
    total_BT1 = target_BTk.sum(-1, keepdims=True)
    target_BTk = target_BTk / jnp.where(total_BT1 > 0, total_BT1, 1)
    top_BTk = jnp.where(chosen_BTk, top_BTk, -1e30)
    log_index_BTk = top_BTk - jax.nn.logsumexp(top_BTk, axis=-1, keepdims=True)
    log_target_BTk = jnp.log(jnp.where(target_BTk > 0, target_BTk, 1))
    return jnp.sum(jnp.where(chosen_BTk, target_BTk * (log_target_BTk - log_index_BTk), 0), axis=-1)

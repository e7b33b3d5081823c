"""Attention of queries, split over a mesh like any, to a memory that every shard of the sequence holds whole.

Letters: B batch, T query time, S memory, N heads, K kv heads, H head dim, P value dim.
"""
import math

import jax.numpy as jnp

import pallas_kernels
from effmodels.parallel import axes, ops


def attention(q_BTNH, k_BSKH, v_BSKP, *, ids_BT, kv_ids_BS, **attention_options):
    """`pallas_kernels.flash_attention` without order: a query sees the entries whose id is its own and not 0; [B, T, N, P] in q's dtype."""
    pieces, kv_heads = axes.shards("act_heads"), k_BSKH.shape[2]
    if kv_heads % pieces:
        repeats = math.lcm(kv_heads, pieces) // kv_heads
        k_BSKH, v_BSKP = jnp.repeat(k_BSKH, repeats, axis=2), jnp.repeat(v_BSKP, repeats, axis=2)

    def kernel(q, k, v, segment_ids, kv_segment_ids):
        return pallas_kernels.flash_attention(
            q, k, v, is_causal=False, segment_ids=segment_ids, kv_segment_ids=kv_segment_ids, **attention_options
        )

    heads, memory = ("batch", "seq", "act_heads", None), ("batch", None, "act_heads", None)
    arrays = {
        "q": (q_BTNH, heads), "k": (k_BSKH, memory), "v": (v_BSKP, memory), "segment_ids": (ids_BT, ("batch", "seq")),
        "kv_segment_ids": (kv_ids_BS, ("batch", None)),
    }  # fmt: skip
    return ops.run_sharded(kernel, arrays, heads)

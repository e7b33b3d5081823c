"""The gated delta rule over a mesh: batch and heads by the rules, and states passed exactly over a sequence that an axis splits.

What a stretch of the row does to the state before it is linear, but no decay: S_after = M S_before + S_alone with M [H, H] per head. The
rule treats every column of the values by itself, so a run on (v, 0) from the state (0, I) leaves (S_alone, M), and its output is that of
the stretch alone beside what multiplies S_before. Pairs (S, M) combine associatively, in the order of the row.
Letters: B batch, T tokens of the shard, r stretches, c = T / r tokens of one, R = B r rows, N heads, H key dim, P value dim.
"""
import jax
import jax.numpy as jnp

import pallas_kernels
from effmodels.parallel import axes, layouts, ops, options
from effmodels.parallel.halo import stretches
from effmodels.parallel.state_passing import LARGEST_RING, Passing, prefix
from pallas_kernels.checks import accumulator
from pallas_kernels.retention.summary import runs


def gated_delta(q_BTNH, k_BTNH, v_BTNP, log_decay_BTN, beta_BTN, *, initial_state=None, segment_ids=None, output_final_state=False,
                **delta_options):  # fmt: skip
    """`pallas_kernels.gated_delta` with batch, heads and time split by the rules; y [B, T, N, P], and the state [B, N, H, P] if asked.

    Raises ValueError for states at the ends of a split row: rows of decoding are whole.
    """
    split_time = axes.shards("seq") > 1
    if split_time and (initial_state is not None or output_final_state):
        raise ValueError("gated_delta: a row split over devices starts from zero and leaves no state; decode by axes.decode_rules(rules).")

    def kernel(q, k, v, log_decay, beta, **rest):
        if split_time:
            return _over_shards(q, k, v, log_decay, beta, **rest, **delta_options)
        return pallas_kernels.gated_delta(q, k, v, log_decay, beta, output_final_state=output_final_state, **rest, **delta_options)

    heads, tokens, state = ("batch", "seq", "act_heads", None), ("batch", "seq", "act_heads"), ("batch", "act_heads", None, None)
    arrays = {
        "q": (q_BTNH, heads), "k": (k_BTNH, heads), "v": (v_BTNP, heads), "log_decay": (log_decay_BTN, tokens), "beta": (beta_BTN, tokens),
        "initial_state": (initial_state, state), "segment_ids": (segment_ids, ("batch", "seq")),
    }  # fmt: skip
    return ops.run_sharded(kernel, arrays, (heads, state) if output_final_state else heads)


def _over_shards(q_BTNH, k_BTNH, v_BTNP, log_decay_BTN, beta_BTN, segment_ids=None, **delta_options):
    """The rule of the whole row, inside `shard_map`: the arrays of one shard."""
    layout, axis = options.current().layout, ops.seq_axes()
    (B, T, N, H), P, dtype = q_BTNH.shape, v_BTNP.shape[3], accumulator(q_BTNH.dtype)
    n, r, form = jax.lax.axis_size(axis), layouts.runs(layout), options.current().states
    passing = Passing(axis, n, r, form if form != "auto" else "ring" if n <= LARGEST_RING else "log")
    rows = lambda x: stretches(x, layout).reshape(-1, T // r, *x.shape[2:])  # noqa: E731
    segment_Rc = None if segment_ids is None else rows(segment_ids)
    v_RcNX = jnp.pad(rows(v_BTNP), ((0, 0), (0, 0), (0, 0), (0, H)))
    start_RNHX = jnp.broadcast_to(jnp.eye(H, P + H, k=P, dtype=dtype), (v_RcNX.shape[0], N, H, P + H))
    q, k, g, beta = (rows(x) for x in (q_BTNH, k_BTNH, log_decay_BTN, beta_BTN))
    out_RcNX, end_RNHX = pallas_kernels.gated_delta(
        q, k, v_RcNX, g, beta, initial_state=start_RNHX, output_final_state=True, segment_ids=segment_Rc, **delta_options
    )  # fmt: skip
    alone_RNHP, map_RNHH, reads_RcNH = end_RNHX[..., :P], end_RNHX[..., P:], out_RcNX[..., P:].astype(dtype)
    if segment_Rc is not None:
        joined_R = _joined(passing, segment_Rc)
        map_RNHH, reads_RcNH = (jnp.where(joined_R.reshape(-1, 1, 1, 1), x, 0) for x in (map_RNHH, reads_RcNH))

    def follow(left, right):
        (left_S, left_M), (right_S, right_M) = left, right
        return right_S + _matmul(right_M, left_S), _matmul(right_M, left_M)

    pairs = [tuple(x.reshape(B, r, *x.shape[1:])[:, i] for x in (alone_RNHP, map_RNHH)) for i in range(r)]
    before_RNHP = jnp.stack([S for S, _ in prefix(passing, pairs, follow)], axis=1).reshape(alone_RNHP.shape)
    passed_RcNP = jnp.einsum("rcnh,rnhp->rcnp", reads_RcNH, before_RNHP, precision="highest")
    return (out_RcNX[..., :P] + passed_RcNP).astype(v_BTNP.dtype).reshape(v_BTNP.shape)


def _matmul(x, y):
    return jnp.matmul(x, y, precision="highest")


def _joined(passing, segment_Rc):
    """[R]: whether the first segment of a stretch is the last one before it; true too where there was none, or is none in the stretch."""
    _, first_R, last_R = runs(segment_Rc)
    ends = list(last_R.reshape(-1, passing.stretches).T)
    before = prefix(passing._replace(form="log"), ends, lambda left, right: jnp.where(right == 0, left, right))
    before_R = jnp.stack(before, axis=1).reshape(-1)
    return (before_R == 0) | (first_R == 0) | (first_R == before_R)

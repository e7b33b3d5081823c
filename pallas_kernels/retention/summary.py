"""What a stretch of tokens does to a retention state, in a form that combines associatively: how shards of a sequence talk.

B batch, N heads, H head dim, P value dim.
"""
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Summary(NamedTuple):
    """The state that the stretch leaves when it starts from zero, and how much of an earlier state passes through it."""
    state_BNHP: jax.Array
    log_decay_BN: jax.Array  # sum over the stretch; -inf if a new segment starts inside it
    first_segment_B: jax.Array  # first and last nonzero segment; 0 if there is none
    last_segment_B: jax.Array


def combine(left, right):
    """The summary of `left` followed by `right`. Associative; a stretch without tokens is neutral.

    A final state with an initial one is `combine(Summary(initial_state, zeros, first, first), summary).state_BNHP`,
    where first is `summary.first_segment_B`.
    """
    empty_B = (left.first_segment_B == 0) | (right.first_segment_B == 0)
    joined_B1 = (empty_B | (left.last_segment_B == right.first_segment_B))[:, None]
    pass_BN = jnp.where(joined_B1, jnp.exp(right.log_decay_BN), 0.0)
    return Summary(
        right.state_BNHP + pass_BN[..., None, None] * left.state_BNHP,
        jnp.where(joined_B1, left.log_decay_BN + right.log_decay_BN, -jnp.inf),
        jnp.where(left.first_segment_B == 0, right.first_segment_B, left.first_segment_B),
        jnp.where(right.last_segment_B == 0, left.last_segment_B, right.last_segment_B),
    )


def runs(segment_ids_BT):
    """Numbers the stretches of one segment along a row: (run [B,T], first nonzero segment [B], last nonzero segment [B]).

    Padding (segment 0) belongs to the run around it and starts none: a segment continues behind it. The first nonzero token is in
    run 0, so an initial state, which lives in run 0, belongs to its segment. A segment id that comes back after another one is a new run.
    """
    time_BT = jax.lax.broadcasted_iota(jnp.int32, segment_ids_BT.shape, 1)
    latest_BT = jax.lax.cummax(jnp.where(segment_ids_BT != 0, time_BT, -1), axis=1)
    filled_BT = jnp.where(latest_BT >= 0, jnp.take_along_axis(segment_ids_BT, jnp.maximum(latest_BT, 0), axis=1), 0)
    before_BT = jnp.pad(filled_BT[:, :-1], ((0, 0), (1, 0)))
    starts_BT = (before_BT != 0) & (filled_BT != before_BT)
    first_B = jnp.take_along_axis(segment_ids_BT, jnp.argmax(segment_ids_BT != 0, axis=1)[:, None], axis=1)[:, 0]
    return jnp.cumsum(starts_BT.astype(jnp.int32), axis=1), first_B.astype(jnp.int32), filled_BT[:, -1].astype(jnp.int32)

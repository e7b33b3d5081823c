"""Retention over a sequence that a mesh axis splits: every shard works on its own tokens, and only states travel.

A shard holds r stretches of the row: one, or two under a zigzag layout. With g the log decays of a stretch and S the state before it,
  out_t = out_t from zero + scale exp(sum_{u <= t} g_u) q_t S,     state after = exp(sum_u g_u) S + state from zero:
the states before all stretches are an exclusive prefix of the pairs (state from zero, what passes), in the order of the row. Gradients of
these states travel the same way back, with the same decays: dS_after = dS of the next stretch + exp(sum_u g_u of the next) its dS_after.
Letters: B batch, T tokens of the shard, r stretches, c = T / r tokens of one, R = B r rows, N heads, H key dim, P value dim, n shards.
"""
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

import pallas_kernels
from effmodels.config import ConfigError
from effmodels.parallel import layouts, options
from pallas_kernels.checks import accumulator
from pallas_kernels.products import product
from pallas_kernels.retention.summary import runs

LARGEST_RING = 4  # shards up to which a ring is as many messages as the log form, all of them to neighbours


class Passing(NamedTuple):
    """How states pass: over which mesh axes, over how many shards, through how many stretches of each, in which form."""
    axis: tuple
    shards: int
    stretches: int
    form: str  # "ring": shards - 1 messages for every stretch; "log": 1 + ceil(log2(shards - 1))


def retain(q_BTNH, k_BTNH, v_BTNP, log_decay, *, axis, layout, initial_state=None, segment_ids=None, output_final_state=False,
           scale=None, **kernel_options):  # fmt: skip
    """`pallas_kernels.retention` of the whole row, inside `shard_map`: the arrays of one shard, `axis` the mesh axes that split the row.

    log_decay: [N], the same on every shard, or [B,T,N]. initial_state [B,N,H,P] and the final state, if asked for: the same on every shard.
    Raises ConfigError for a striped layout, and for a shard that does not split into its stretches.
    """
    passing = _passing(axis, layout, q_BTNH.shape[1])
    (B, T, N, H), r = q_BTNH.shape, passing.stretches
    rows = lambda x: x.reshape(B * r, T // r, *x.shape[2:])  # noqa: E731
    q_RcNH, k_RcNH, v_RcNP = rows(q_BTNH), rows(k_BTNH), rows(v_BTNP)
    segment_Rc = None if segment_ids is None else rows(segment_ids)
    log_decay = log_decay if log_decay.ndim == 1 else rows(log_decay)
    scale = H**-0.5 if scale is None else float(scale)

    # A product of k and v alone would let the states leave before the kernel runs. Reading k and v twice costs more than that hides.
    out_RcNP, summary = pallas_kernels.retention(
        q_RcNH, k_RcNH, v_RcNP, log_decay, segment_ids=segment_Rc, scale=scale, return_summary=True, **kernel_options)  # fmt: skip
    joined_R = None if segment_ids is None else _joined(passing, summary)
    alone_BrNHP = summary.state_BNHP.reshape(B, r, N, H, -1)
    passed_BrN = _masked(joined_R, jnp.exp(summary.log_decay_BN)).reshape(B, r, N)
    before_BrNHP = _with_initial(passing, alone_BrNHP, passed_BrN, initial_state)
    from_start_RcN = _decay_from_start(log_decay, segment_Rc, T // r, accumulator(q_BTNH.dtype))
    incoming_RNHP = _masked(joined_R, before_BrNHP.reshape(B * r, N, H, -1))
    out_RcNP = (out_RcNP + _read(q_RcNH, incoming_RNHP, from_start_RcN, scale)).astype(out_RcNP.dtype)
    out_BTNP = out_RcNP.reshape(v_BTNP.shape)
    if not output_final_state:
        return out_BTNP
    after_BNHP = alone_BrNHP[:, -1] + passed_BrN[:, -1, :, None, None] * before_BrNHP[:, -1]
    last = 0 if r == 2 else passing.shards - 1  # the shard that holds the end of the row
    return out_BTNP, jax.lax.psum(jnp.where(jax.lax.axis_index(axis) == last, after_BNHP, 0), axis)


def _passing(axis, layout, T):
    n, r = jax.lax.axis_size(axis), layouts.runs(layout)
    if r is None:
        raise ConfigError(f"retention: states cannot pass through the single tokens of a {layout!r} layout; use contiguous or zigzag.")
    if T % r:
        raise ConfigError(
            f"retention: a shard of a {layout!r} layout is {r} equal stretches of the row, got {T} tokens; "
            f"use rows of a multiple of {r * n}."
        )
    form = options.current().states
    return Passing(axis, n, r, form if form != "auto" else "ring" if n <= LARGEST_RING else "log")


def _masked(mask_R, x_R):
    return x_R if mask_R is None else jnp.where(mask_R.reshape(-1, *(1,) * (x_R.ndim - 1)), x_R, 0)


def _joined(passing, summary):
    """[R]: whether the first segment of a stretch is the last one before it; true too where there was none, or is none in the stretch."""
    def later(left_B, right_B):
        return jnp.where(right_B == 0, left_B, right_B)

    first_R, last_R = summary.first_segment_B, summary.last_segment_B
    by_stretch = list(last_R.reshape(-1, passing.stretches).T)
    before_R = jnp.stack(prefix(passing._replace(form="log"), by_stretch, later), axis=1).reshape(-1)
    return (before_R == 0) | (first_R == 0) | (first_R == before_R)


def _decay_from_start(log_decay, segment_Rc, c, dtype):
    """Log decays [R,c,N] from the state before a stretch to its tokens; -inf for padding and behind the start of a segment."""
    # exp() of less than this is zero, and a sum over -inf tokens would be nan where it meets zero.
    log_decay = jnp.maximum(log_decay.astype(dtype), -104.0 if dtype == jnp.float32 else -746.0)
    valid_RcN = jnp.ones((1, c, 1), bool) if segment_Rc is None else (segment_Rc != 0)[..., None]
    if log_decay.ndim == 1:  # tokens are counted: whole numbers, exact
        from_start_RcN = log_decay * jnp.cumsum(valid_RcN.astype(dtype), axis=1)
    else:
        from_start_RcN = jnp.cumsum(jnp.where(valid_RcN, log_decay, 0), axis=1)
    if segment_Rc is None:
        return from_start_RcN
    return jnp.where(valid_RcN & (runs(segment_Rc)[0] == 0)[..., None], from_start_RcN, -jnp.inf)


def _read(q_RcNH, state_RNHP, from_start_RcN, scale):
    weighted_RcNH = (q_RcNH * (scale * jnp.exp(from_start_RcN))[..., None]).astype(q_RcNH.dtype)
    # As in the kernels for TPUs: what is multiplied has the dtype of the inputs, the state that travels has not.
    return product("rcnh,rnhp->rcnp", weighted_RcNH, state_RNHP.astype(q_RcNH.dtype), accumulator(q_RcNH.dtype))


def _with_initial(passing, alone_BrNHP, passed_BrN, initial_state):
    if initial_state is None:
        return _states_before(passing, alone_BrNHP, passed_BrN)
    is_first = jax.lax.axis_index(passing.axis) == 0  # of any layout: shard 0 holds the start of the row
    initial_BNHP = jnp.where(is_first, initial_state.astype(alone_BrNHP.dtype), 0)
    alone_BrNHP = alone_BrNHP.at[:, 0].add(passed_BrN[:, 0, :, None, None] * initial_BNHP)
    return _states_before(passing, alone_BrNHP, passed_BrN).at[:, 0].add(initial_BNHP)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _states_before(passing, alone_BrNHP, passed_BrN):
    """The state before every stretch, from a row that starts with zeros. Its own derivative, so that no partial sum is kept."""
    return _pass_states(passing, alone_BrNHP, passed_BrN)


def _states_before_forward(passing, alone_BrNHP, passed_BrN):
    before_BrNHP = _pass_states(passing, alone_BrNHP, passed_BrN)
    return before_BrNHP, (before_BrNHP, passed_BrN)


def _states_before_backward(passing, residuals, dbefore_BrNHP):
    before_BrNHP, passed_BrN = residuals
    dafter_BrNHP = _pass_states(passing, dbefore_BrNHP, passed_BrN, reverse=True)
    return dafter_BrNHP, jnp.sum(dafter_BrNHP * before_BrNHP, axis=(-2, -1))


_states_before.defvjp(_states_before_forward, _states_before_backward)


def _pass_states(passing, states_BrNHP, passed_BrN, reverse=False):
    def follow(left, right):
        (left_BNHP, left_BN), (right_BNHP, right_BN) = left, right
        return right_BNHP + right_BN[..., None, None] * left_BNHP, left_BN * right_BN

    pairs = [(states_BrNHP[:, i], passed_BrN[:, i]) for i in range(passing.stretches)]
    return jnp.stack([state_BNHP for state_BNHP, _ in prefix(passing, pairs, follow, reverse)], axis=1)


def prefix(passing, elements, follow, reverse=False):
    """For every stretch, all elements before it in the row combined (with `reverse`: all after it, from the end).

    elements: a pytree of arrays for each stretch of the shard. follow(left, right) combines two neighbours, is associative, and takes zeros
    for nothing on its left.
    """
    before, carried = [None] * passing.stretches, None

    def at_start(step, x, other):
        here = jax.lax.axis_index(passing.axis) == (0 if step == 1 else passing.shards - 1)
        return jax.tree.map(functools.partial(jnp.where, here), x, other)

    order = list(enumerate((1, -1)[: passing.stretches]))  # first parts lie on shards 0, 1, ..., second parts of a zigzag on n-1, n-2, ...
    for i, step in [(i, -step) for i, step in reversed(order)] if reverse else order:
        element = elements[i]
        if carried is not None:  # the last shard of the stretches so far is the first one of these
            element = at_start(step, follow(carried, element), element)
        before[i] = _before(passing, element, follow, step)
        if carried is not None:
            before[i] = at_start(step, carried, before[i])
        carried = follow(before[i], elements[i])
    return before


def _before(passing, element, follow, step):
    """All elements of earlier shards (step 1) or later ones (step -1), combined; zeros where there is none."""
    n, axis = passing.shards, passing.axis

    def moved(x, distance):
        pairs = [(i, i + distance * step) for i in range(n) if 0 <= i + distance * step < n]
        return jax.tree.map(lambda a: jax.lax.ppermute(a, axis, pairs), x)

    before = moved(element, 1)
    if passing.form == "ring":
        for _ in range(n - 2):
            before = moved(follow(before, element), 1)
        return before
    span = 1
    while span < n - 1:
        before, span = follow(moved(before, span), before), 2 * span
    return before

"""Ring attention (arXiv:2310.01889): queries stay, keys and values go round the shards, and every partial result joins in float32.

Letters: B batch, T query time and S key time of one shard, N heads, K kv heads, H head dim, P value dim, n shards. Shift s of the ring is
when shard d holds the keys of shard d - s; a hop of h takes what a shard holds to the shard h further on. Only the shifts at which some
shard sees some key are visited.

    forward    shift  0 ------- s1 ------ s2 ...      keys of the next shift travel while the kernel works on these
    backward   shift  s1 ------ s2 ... -- 0           keys likewise, and the float32 gradients of the last shift's keys travel after
                                                      them; they come home while the kernel works on the shard's own keys

The backward pass goes round again: it saves q, k, v, the output and its logsumexp, and no block. Each block's probabilities are
exp(score - final logsumexp), so that its forward pass is not run again (FlashAttention-2, arXiv:2307.08691, algorithm 2).
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp

import pallas_kernels
from effmodels.config import ConfigError
from effmodels.parallel import layouts
from pallas_kernels.kept import kept


def attend(q_BTNH, k_BSKH, v_BSKP, *, axis, layout, sinks=None, segment_ids=None, kv_segment_ids=None, positions=None, kv_positions=None,
           is_causal=True, local_window_size=None, global_tokens=0, return_residual=False, **options):  # fmt: skip
    """`pallas_kernels.flash_attention` of the local queries [B, T, N, H] with the keys of all shards, inside `shard_map`; [B, T, N, P],
    with the logsumexp [B, T, N] if asked for the residual.

    Args:
      axis: the mesh axes that split time, as a tuple of names.
      layout: which tokens a shard holds (`layouts`); without `positions` a window visits no more shifts than it needs there.
      positions, kv_positions: int32 [B, T], [B, S], which travel with the keys. None: those of the layout, which nobody needs to send.
      options: logits_soft_cap, scale, implementation, interpret.

    Raises ConfigError for global tokens: the keys of one shard do not hold the first tokens of each segment.
    """
    if global_tokens:
        raise ConfigError(
            f"parallel.attention='ring': global_tokens={global_tokens} needs the first tokens of each segment on every shard, and a ring "
            "shows a part of the keys at a time; use parallel.attention='all_gather' (or 'ulysses')."
        )
    n, T, S = jax.lax.axis_size(axis), q_BTNH.shape[1], k_BSKH.shape[1]
    if (positions is None) != (kv_positions is None) or (segment_ids is None) != (kv_segment_ids is None):
        raise ValueError("ring attention: positions and kv_positions, segment_ids and kv_segment_ids come in pairs; give both or neither.")
    mask = {"is_causal": is_causal, "local_window_size": local_window_size}
    ring = _Ring(axis, n, layout, _shifts(layout, n, T, S, placed=positions is None, **mask), positions is None, mask, options)
    rows = {"segment_ids": segment_ids, "positions": positions}
    keys = {"kv_segment_ids": kv_segment_ids, "kv_positions": kv_positions}
    present = lambda x: {name: a for name, a in x.items() if a is not None}  # noqa: E731
    out_BTNP, lse_BTN = _attend(ring, q_BTNH, k_BSKH, v_BSKP, sinks, present(rows), present(keys))
    return (out_BTNP, lse_BTN) if return_residual else out_BTNP


def _shifts(layout, n, T, S, placed, is_causal, local_window_size):
    """The shifts to visit, 0 first. What is not causal sees both ways; of positions that somebody gave nothing is known beforehand."""
    if local_window_size is None or T != S or not placed:
        return tuple(range(n))
    causal = layouts.shifts(layout, n * T, n, local_window_size)
    return causal if is_causal else tuple(sorted({*causal, *(-s % n for s in causal)}))


@dataclasses.dataclass(frozen=True)
class _Ring:
    """Everything static."""

    axis: tuple
    n: int
    layout: str
    shifts: tuple
    placed: bool  # positions are those of the layout
    mask: dict
    options: dict

    @property
    def hops(self):
        return tuple(b - a for a, b in zip(self.shifts, self.shifts[1:]))

    def hop(self, x, by):
        """A pytree sent to the shard `by` further on."""
        to = [(i, (i + by) % self.n) for i in range(self.n)]
        return jax.tree.map(lambda a: jax.lax.ppermute(a, self.axis, to), x)

    def visibility(self, shift, q_BTNH, k_BSKH, rows, ids):
        """What the kernel is told of the tokens of both sides at a shift, which may be traced."""
        known = {**rows, **ids}
        matters = self.mask["is_causal"] or self.mask["local_window_size"] is not None
        if not self.placed or not matters or self._in_place(shift, q_BTNH.shape[1], k_BSKH.shape[1]):
            return known
        here = jax.lax.axis_index(self.axis)
        sides = ((q_BTNH, here), (k_BSKH, (here - shift) % self.n))
        own, other = (jnp.broadcast_to(_places(self.layout, self.n, x.shape[1], shard), x.shape[:2]) for x, shard in sides)
        return {**known, "positions": own, "kv_positions": other}

    def _in_place(self, shift, T, S):
        """Whether counting from 0 on both sides gives the same mask: then the kernel knows it when it is compiled."""
        same = isinstance(shift, int) and shift == 0 and T == S
        return same and (self.layout == "contiguous" or self.mask["local_window_size"] is None)

    def block(self, shift, q_BTNH, keys, rows):
        k, v, ids = keys
        where = self.visibility(shift, q_BTNH, k, rows, ids)
        wide = jnp.promote_types(q_BTNH.dtype, jnp.float32)
        return pallas_kernels.flash_attention(q_BTNH, k, v, return_residual=True, out_dtype=wide, **where, **self.mask, **self.options)

    def block_gradients(self, shift, q_BTNH, keys, rows, grads):
        """(dq, (dk, dv)) in float32, flat; so are the keys."""
        k, v, ids = keys
        k_BSKH, v_BSKP = (x.reshape(*x.shape[:2], -1, like.shape[3]) for x, like in ((k, q_BTNH), (v, grads[2])))
        where = self.visibility(shift, q_BTNH, k_BSKH, rows, ids)
        dq, dk, dv = pallas_kernels.flash_attention_grads(q_BTNH, k_BSKH, v_BSKP, *grads, **where, **self.mask, **self.options)
        return _flat(dq), (_flat(dk), _flat(dv))


def _places(layout, n, c, shard):
    """int32 [c]: `layouts.order` of one shard, whose number may be traced."""
    slot = jnp.arange(c, dtype=jnp.int32)
    if layout == "striped":
        return slot * n + shard
    if layout == "zigzag":
        half = c // 2
        return jnp.where(slot < half, shard * half + slot, (2 * n - 2 - shard) * half + slot)
    return shard * c + slot


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(ring, q_BTNH, k_BSKH, v_BSKP, sinks_N, rows, ids):
    return _forward(ring, q_BTNH, (k_BSKH, v_BSKP, ids), sinks_N, rows)


def _attend_fwd(ring, q_BTNH, k_BSKH, v_BSKP, sinks_N, rows, ids):
    keys = k_BSKH, v_BSKP, ids
    out_BTNP, lse_BTN = kept(_forward(ring, q_BTNH, keys, sinks_N, rows))
    return (out_BTNP, lse_BTN), (q_BTNH, keys, sinks_N, rows, out_BTNP, lse_BTN)


def _attend_bwd(ring, residuals, d_results):
    q_BTNH, keys, sinks_N, rows, out_BTNP, lse_BTN = residuals
    d_out_BTNP, d_lse_BTN = d_results
    delta_BTN = (out_BTNP.astype(lse_BTN.dtype) * d_out_BTNP.astype(lse_BTN.dtype)).sum(-1) - d_lse_BTN
    k, v, ids = keys
    dq, (dk, dv) = _backward(ring, q_BTNH, (_flat(k), _flat(v), ids), rows, (lse_BTN, delta_BTN, d_out_BTNP))
    d_sinks_N = None
    if sinks_N is not None:  # a key whose value is zero; a row that saw nothing has no shares
        share_BTN = jnp.where(lse_BTN == -jnp.inf, 0.0, jnp.exp(sinks_N.astype(lse_BTN.dtype) - lse_BTN))
        d_sinks_N = -(share_BTN * delta_BTN).sum((0, 1)).astype(sinks_N.dtype)
    dq, dk, dv = (x.reshape(like.shape).astype(like.dtype) for x, like in ((dq, q_BTNH), (dk, k), (dv, v)))
    return dq, dk, dv, d_sinks_N, None, None


_attend.defvjp(_attend_fwd, _attend_bwd)


# The rounds.


def _forward(ring, q_BTNH, keys, sinks_N, rows):
    """(out in q's dtype, logsumexp over all keys and the sink)."""
    shifts, hops = ring.shifts, ring.hops

    def block(keys, shift, hop):
        return None if hop is None else ring.hop(keys, hop), ring.block(shift, q_BTNH, keys, rows)

    def step(carry, shift, hop):
        keys, total = carry
        # The total waits too: it is joined beside the kernel of the next block, and no two blocks are alive after that.
        (keys, part), total = _together(block(keys, shift, hop), total)
        return keys, joined(total, part)

    carry = block(keys, shifts[0], hops[0] if hops else None)
    if hops:
        carry = _over(step, _together(*carry), shifts[1:-1], hops[1:])
        carry = step(carry, shifts[-1], None)
    out_BTNP, lse_BTN = carry[1]
    if sinks_N is not None:
        out_BTNP, lse_BTN = _with_sinks(out_BTNP, lse_BTN, sinks_N.astype(lse_BTN.dtype))
    return out_BTNP.astype(q_BTNH.dtype), lse_BTN


def _backward(ring, q_BTNH, keys, rows, grads):
    """(dq, (dk, dv)) in float32, flat; gradients of keys are at home."""
    shifts, hops = ring.shifts, ring.hops
    block = functools.partial(ring.block_gradients, q_BTNH=q_BTNH, rows=rows, grads=grads)
    add = functools.partial(jax.tree.map, jnp.add)
    if not hops:
        return block(0, keys=keys)

    def step(carry, shift, hop, back):
        """One block. `back`: the hop that its keys came by, on which their gradients so far follow."""
        keys, dq, dkv = carry
        moving = None if hop is None else ring.hop(keys, hop), ring.hop(dkv, back)
        (keys, dkv), (more_dq, more_dkv), dq = _together(moving, block(shift, keys=keys), dq)
        return keys, dq + more_dq, add(dkv, more_dkv)

    away = ring.hop(keys, hops[0])
    following = ring.hop(away, hops[1]) if len(hops) > 1 else None
    following, (dq, dkv) = _together(following, block(shifts[1], keys=away))
    carry = following, dq, dkv
    if len(hops) > 1:
        carry = _over(lambda carry, shift, hop: step(carry, shift, *hop), carry, shifts[2:-1], tuple(zip(hops[2:], hops[1:])))
        carry = step(carry, shifts[-1], None, hops[-1])
    _, dq, dkv = step((keys, *carry[1:]), 0, None, -shifts[-1])
    return dq, dkv


def _over(step, carry, shifts, hops):
    """step(carry, shift, hop) for each of them: a loop where all hops are equal, so that the program is as long for any ring."""
    if len(shifts) > 1 and len(set(hops)) == 1:
        return jax.lax.scan(lambda carry, shift: (step(carry, shift, hops[0]), None), carry, jnp.array(shifts))[0]
    for shift, hop in zip(shifts, hops):
        carry = step(carry, shift, hop)
    return carry


def _together(*groups):
    """All of them, none before the others are there: work on the result of a kernel cannot take the kernel's place beside a transfer."""
    return jax.lax.optimization_barrier(groups)


def _flat(x_BTNH):
    """[B, T, N * H], the form that the backward kernel reads and writes: what goes round is not rearranged at every step."""
    return x_BTNH.reshape(*x_BTNH.shape[:2], -1)


# Partial results.


def joined(one, other):
    """(out, logsumexp) over the keys of both; a row that saw nothing on one side, or on both, is exact."""
    (out_a, lse_a), (out_b, lse_b) = one, other
    most = jnp.maximum(lse_a, lse_b)
    most = jnp.where(most == -jnp.inf, 0.0, most)
    a, b = jnp.exp(lse_a - most), jnp.exp(lse_b - most)
    total = a + b
    seen = total > 0
    total = jnp.where(seen, total, 1.0)
    out = (a / total)[..., None] * out_a + (b / total)[..., None] * out_b
    return out, jnp.where(seen, most + jnp.log(total), -jnp.inf)


def _with_sinks(out_BTNP, lse_BTN, sinks_N):
    """One more logit in the denominator only, joined once. Rows that saw nothing stay as they are."""
    seen = lse_BTN != -jnp.inf
    safe = jnp.where(seen, lse_BTN, 0.0)
    return out_BTNP * jax.nn.sigmoid(safe - sinks_N)[..., None], jnp.where(seen, jnp.logaddexp(safe, sinks_N), -jnp.inf)

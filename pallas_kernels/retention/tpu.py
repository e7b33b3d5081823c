"""Retention on a TPU: layout of heads, and the pair of Pallas kernels joined by a custom derivative.

B batch, T time, N heads, H head dim, P value dim, G heads that share a register. A row is a batch entry and G heads.
Decoding is the same kernel: one short chunk, and many rows in each step of the grid.
"""
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.kept import kept
from pallas_kernels.retention import tpu_plan
from pallas_kernels.retention.summary import Summary, runs
from pallas_kernels.retention.tpu_backward import backward
from pallas_kernels.retention.tpu_forward import forward


def unsupported(q_BTNH, k_BTNH, v_BTNP, log_decay, initial_state, segment_ids, chunk_size, scale):
    """Why these inputs cannot run, or None."""
    if q_BTNH.dtype not in (jnp.float32, jnp.bfloat16):
        return f"{q_BTNH.dtype} is not multiplied on a TPU"
    return None


def retain(q_BTNH, k_BTNH, v_BTNP, log_decay, initial_state, segment_ids, chunk_size, scale, *, interpret):
    """(out [B,T,N,P], final state [B,N,H,P] float32, Summary).

    chunk_size is rounded up to a multiple of 128, at most 512; None is 128, which needs the least matrix work at any head size.
    The Summary's state from zero is the final state; beside an initial state it is a second kernel, dropped if nobody uses it.
    """
    B, T, N, _ = q_BTNH.shape
    log_decay = jnp.maximum(log_decay.astype(jnp.float32), tpu_plan.LEAST)
    initial = None if initial_state is None else initial_state.astype(jnp.float32)
    if segment_ids is None:
        kind_BT, first_B, last_B = None, jnp.ones(B, jnp.int32), jnp.ones(B, jnp.int32)
        total_BN = log_decay.sum(1) if log_decay.ndim == 3 else jnp.broadcast_to(T * log_decay, (B, N))
    else:
        run_BT, first_B, last_B = runs(segment_ids)
        real_BT = segment_ids != 0
        starts_BT = run_BT != jnp.pad(run_BT[:, :-1], ((0, 0), (1, 0)))
        kind_BT = jnp.where(starts_BT, tpu_plan.STARTS, jnp.where(real_BT, tpu_plan.REAL, tpu_plan.PADDING))
        total_BN = jnp.where(real_BT[..., None], jnp.broadcast_to(log_decay, (B, T, N)), 0.0).sum(1)
        total_BN = jnp.where((run_BT[:, -1] == 0)[:, None], total_BN, -jnp.inf)
    if scale < 0:
        q_BTNH, scale = -q_BTNH, -scale
    run = functools.partial(_in_parts, q_BTNH, k_BTNH, v_BTNP, log_decay, kind_BT, chunk_size, scale, interpret)
    out_BTNP, final_BNHP = run(initial)
    alone_BNHP = final_BNHP if initial is None else run(None)[1]
    return out_BTNP, final_BNHP, Summary(alone_BNHP, total_BN, first_B, last_B)


def _in_parts(q_BTNH, k_BTNH, v_BTNP, log_decay, kind_BT, chunk_size, scale, interpret, initial):
    """A state too large for the chip is cut: out is a sum over parts of H, and concatenates parts of P."""
    along_h, along_p = tpu_plan.parts(q_BTNH.shape[-1], v_BTNP.shape[-1])
    split = lambda x, n, axis: [None] * n if x is None else jnp.array_split(x, n, axis)  # noqa: E731
    outs, states = [], []
    for v, state in zip(split(v_BTNP, along_p, -1), split(initial, along_p, -1)):
        pieces = [_laid_out(*piece[:2], v, log_decay, piece[2], kind_BT, chunk_size, scale, interpret) for piece in zip(
            split(q_BTNH, along_h, -1), split(k_BTNH, along_h, -1), split(state, along_h, -2))]
        outs.append(sum(out.astype(jnp.float32) for out, _ in pieces).astype(v.dtype) if along_h > 1 else pieces[0][0])
        states.append(jnp.concatenate([state for _, state in pieces], axis=-2))
    return jnp.concatenate(outs, axis=-1), jnp.concatenate(states, axis=-1)


def _laid_out(q_BTNH, k_BTNH, v_BTNP, log_decay, initial, kind_BT, chunk_size, scale, interpret):
    """Heads come before time: XLA gives a matrix product that layout for nothing, while it has to copy [B, T, N * H] together."""
    B, T, N, H = q_BTNH.shape
    P = v_BTNP.shape[-1]
    G = tpu_plan.heads_together(N, H, P)
    arrays = [x.reshape(B, T, N // G, -1).swapaxes(1, 2).reshape(B * N // G, T, -1) for x in (q_BTNH, k_BTNH, v_BTNP)]
    rows, groups = B * N // G, N // G
    C, K, U = tpu_plan.sizes(T, rows, groups, G * H, G * P, q_BTNH.dtype.itemsize, chunk_size, G)
    by_token = log_decay.ndim == 3 or kind_BT is not None
    plan = tpu_plan.Plan(rows, T, G, groups, H, P, C, K, U, scale, by_token)
    state = None if initial is None else _join(initial.reshape(-1, G, H, P))
    out, final = _retain(*arrays, log_decay, state, kind_BT, plan, interpret)
    return out.reshape(B, N // G, T, -1).swapaxes(1, 2).reshape(B, T, N, P), _part(final, G).reshape(B, N, H, P)


def _join(state_bGHP):
    """[b, G, H, P] -> [b, G * H, G * P], zeros between different heads."""
    b, G, H, P = state_bGHP.shape
    return jnp.einsum("bghp,gf->bghfp", state_bGHP, jnp.eye(G, dtype=state_bGHP.dtype), precision="highest").reshape(b, G * H, G * P)


def _part(state, G):
    """The inverse of `_join`."""
    b, GH, GP = state.shape
    return jnp.stack([state.reshape(b, G, GH // G, G, GP // G)[:, j, :, j] for j in range(G)], axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _retain(q, k, v, log_decay, initial, kind_BT, plan, interpret):
    """(out as v, final state [rows, key lanes, value lanes])."""
    return tuple(forward(q, k, v, _decay(log_decay, kind_BT, plan), initial, plan, False, interpret))


def _decay(log_decay, kind_BT, plan):
    if plan.by_token:
        return tpu_plan.decay_rows(log_decay, kind_BT, plan)
    log_decay = (log_decay * tpu_plan.LOG2E).reshape(plan.groups, plan.together, 1, 1)
    return jnp.broadcast_to(log_decay, (plan.groups, plan.together, 8, 128))


def _forward(q, k, v, log_decay, initial, kind_BT, plan, interpret):
    arguments = q, k, v, log_decay, initial, kind_BT
    q, k, v, g, initial, kind_BT = jax.tree.map(lambda x: x.value, arguments, is_leaf=_is_primal)
    save = plan.blocks > 1
    out, final, *saved = kept(forward(q, k, v, _decay(g, kind_BT, plan), initial, plan, save, interpret))
    saved = saved[0] if save else None if initial is None else initial[:, None]
    # An empty tuple says, statically, that nobody asks for the gradient of the decay.
    return (out, final), (q, k, v, g, initial, kind_BT, saved, None if log_decay.perturbed else ())


def _is_primal(x):
    return isinstance(x, jax.custom_derivatives.CustomVJPPrimal)


def _backward(plan, interpret, residuals, grads):
    q, k, v, log_decay, initial, kind_BT, saved, skip = residuals
    zero = jax.custom_derivatives.SymbolicZero
    grads = [jnp.zeros(g.aval.shape, g.aval.dtype) if isinstance(g, zero) else g for g in grads]
    decay, with_decay = _decay(log_decay, kind_BT, plan), skip is None
    dq, dk, dv, dinitial, *rows = backward(q, k, v, decay, saved, *grads, plan, with_decay, interpret)
    dlog_decay = tpu_plan.decay_gradient(rows[0], log_decay, kind_BT, plan) if with_decay else jnp.zeros_like(log_decay)
    return dq, dk, dv, dlog_decay, None if initial is None else dinitial, None


_retain.defvjp(_forward, _backward, symbolic_zeros=True)

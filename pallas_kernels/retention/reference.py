"""Retention token by token, exactly as its recurrence reads: the slow twin.

B batch, T time, N heads, H head dim, P value dim. S_t = exp(log_decay_t) S_{t-1} + k_t^T v_t, o_t = scale q_t S_t.
"""
import jax
import jax.numpy as jnp

from pallas_kernels.checks import accumulator
from pallas_kernels.retention.summary import Summary


def retain(q_BTNH, k_BTNH, v_BTNP, log_decay, initial_state, segment_ids, chunk_size, scale):
    """(out [B,T,N,P], final state [B,N,H,P], Summary). `chunk_size` has no meaning here."""
    B, T, N, H = q_BTNH.shape
    dtype = accumulator(q_BTNH.dtype)
    log_decay_BTN = jnp.broadcast_to(log_decay.astype(dtype), (B, T, N))
    segment_BT = jnp.ones((B, T), jnp.int32) if segment_ids is None else segment_ids.astype(jnp.int32)
    zeros_BNHP = jnp.zeros((B, N, H, v_BTNP.shape[-1]), dtype)
    nothing_B = jnp.zeros(B, jnp.int32)

    def step(carry, xs):
        (state, alone, passed_BN, first_B, last_B), (q, k, v, g_BN, segment_B) = carry, xs
        real_B, starts_B = segment_B != 0, (segment_B != 0) & (last_B != 0) & (segment_B != last_B)
        write = k.astype(dtype)[..., :, None] * v.astype(dtype)[..., None, :]
        here, there = real_B[:, None, None, None], starts_B[:, None, None, None]
        decay = jnp.exp(g_BN)[..., None, None]
        state, alone = (jnp.where(here, write + jnp.where(there, 0.0, decay * s), s) for s in (state, alone))
        passed_BN = jnp.where(starts_B[:, None], -jnp.inf, passed_BN + jnp.where(real_B[:, None], g_BN, 0.0))
        out = jnp.where(real_B[:, None, None], scale * jnp.einsum("bnh,bnhp->bnp", q.astype(dtype), state, precision="highest"), 0.0)
        first_B, last_B = jnp.where(first_B == 0, segment_B, first_B), jnp.where(real_B, segment_B, last_B)
        return (state, alone, passed_BN, first_B, last_B), out

    initial = zeros_BNHP if initial_state is None else initial_state.astype(dtype)
    start = (initial, zeros_BNHP, jnp.zeros((B, N), dtype), nothing_B, nothing_B)
    xs = jax.tree.map(lambda x: x.swapaxes(0, 1), (q_BTNH, k_BTNH, v_BTNP, log_decay_BTN, segment_BT))
    (state, alone, passed_BN, first_B, last_B), out_TBNP = jax.lax.scan(step, start, xs)
    return out_TBNP.swapaxes(0, 1).astype(q_BTNH.dtype), state, Summary(alone, passed_BN, first_B, last_B)

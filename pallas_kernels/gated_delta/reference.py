"""The gated delta rule token by token, exactly as its recurrence reads: the slow twin.

B batch, T time, N heads, H head dim, P value dim. S' = exp(g_t) S_{t-1}, S_t = S' + beta_t k_t^T (v_t - k_t S'), o_t = scale q_t S_t.
"""
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.checks import accumulator


def delta(q_BTNH, k_BTNH, v_BTNP, log_decay_BTN, beta_BTN, initial_state, segment_ids, chunk_size, scale):
    """(out [B,T,N,P], final state [B,N,H,P]). `chunk_size` has no meaning here."""
    B, T, N, H = q_BTNH.shape
    dtype, multiply = accumulator(q_BTNH.dtype), functools.partial(jnp.einsum, precision="highest")
    segment_BT = jnp.ones((B, T), jnp.int32) if segment_ids is None else segment_ids.astype(jnp.int32)

    def step(carry, xs):
        (state, last_B), (q, k, v, g_BN, beta_BN, segment_B) = carry, xs
        q, k, v = (x.astype(dtype) for x in (q, k, v))
        real_B, starts_B = segment_B != 0, (segment_B != 0) & (last_B != 0) & (segment_B != last_B)
        decayed = jnp.where(starts_B[:, None, None, None], 0.0, jnp.exp(g_BN)[..., None, None] * state)
        change_BNP = beta_BN[..., None] * (v - multiply("bnh,bnhp->bnp", k, decayed))
        state = jnp.where(real_B[:, None, None, None], decayed + k[..., :, None] * change_BNP[..., None, :], state)
        out = jnp.where(real_B[:, None, None], scale * multiply("bnh,bnhp->bnp", q, state), 0.0)
        return (state, jnp.where(real_B, segment_B, last_B)), out

    initial = jnp.zeros((B, N, H, v_BTNP.shape[-1]), dtype) if initial_state is None else initial_state.astype(dtype)
    by_token = (q_BTNH, k_BTNH, v_BTNP, log_decay_BTN.astype(dtype), beta_BTN.astype(dtype), segment_BT)
    (state, _), out_TBNP = jax.lax.scan(step, (initial, jnp.zeros(B, jnp.int32)), jax.tree.map(lambda x: x.swapaxes(0, 1), by_token))
    return out_TBNP.swapaxes(0, 1).astype(q_BTNH.dtype), state

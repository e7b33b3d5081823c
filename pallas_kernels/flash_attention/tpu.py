"""Attention on a TPU: the door of the Pallas kernels and their gradient rule.

B batch, T query, S key, N heads, K kv heads, H head dim, P value dim. Forward: `tpu_forward`; backward: `tpu_backward`; which tiles
they visit: `ranges`.
"""
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention import tpu_backward, tpu_forward
from pallas_kernels.kept import kept


def unsupported(query_BTNH, key_BSKH, value_BSKP, index, sinks_N, spec):
    """Why these inputs cannot run, or None."""
    del key_BSKH, value_BSKP, index, sinks_N, spec
    if query_BTNH.dtype not in (jnp.float32, jnp.bfloat16):
        return f"{query_BTNH.dtype} is not multiplied on a TPU, only float32 and bfloat16 are"
    return None


def attend(query_BTNH, key_BSKH, value_BSKP, index, sinks_N, spec, *, interpret=False):
    """(out [B,T,N,P], logsumexp [B,T,N] float32)."""
    index = type(index)(*(None if x is None else x.astype(jnp.int32) for x in index))
    return _attend(spec, interpret, query_BTNH, key_BSKH, value_BSKP, index, sinks_N)


def gradients(query_BTNH, key_BSKH, value_BSKP, index, lse_BTN, delta_BTN, d_out_BTNP, spec, *, interpret=False):
    """(dq, dk, dv) float32, from a logsumexp over these keys and perhaps others."""
    index = type(index)(*(None if x is None else x.astype(jnp.int32) for x in index))
    d_out_BTNP = d_out_BTNP.astype(query_BTNH.dtype)
    return tpu_backward.backward(spec, query_BTNH, key_BSKH, value_BSKP, index, lse_BTN, d_out_BTNP, delta_BTN, interpret, jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(spec, interpret, q_BTNH, k_BSKH, v_BSKP, index, sinks_N):
    return tpu_forward.forward(spec, q_BTNH, k_BSKH, v_BSKP, index, sinks_N, interpret)


def _attend_fwd(spec, interpret, q_BTNH, k_BSKH, v_BSKP, index, sinks_N):
    out_BTNP, lse_BTN = kept(_attend(spec, interpret, q_BTNH, k_BSKH, v_BSKP, index, sinks_N))
    return (out_BTNP, lse_BTN), (q_BTNH, k_BSKH, v_BSKP, index, sinks_N, out_BTNP, lse_BTN)


def _attend_bwd(spec, interpret, residuals, cotangents):
    q_BTNH, k_BSKH, v_BSKP, index, sinks_N, out_BTNP, lse_BTN = residuals
    do_BTNP, dlse_BTN = cotangents
    delta_BTN = (out_BTNP.astype(jnp.float32) * do_BTNP.astype(jnp.float32)).sum(-1) - dlse_BTN
    do_BTNP = do_BTNP.astype(q_BTNH.dtype)
    dq, dk, dv = tpu_backward.backward(spec, q_BTNH, k_BSKH, v_BSKP, index, lse_BTN, do_BTNP, delta_BTN, interpret)
    dsinks_N = None
    if sinks_N is not None:
        # The sink's share of a row is exp(sink - lse); it takes part in lse and shrinks out. A row that saw nothing has no shares.
        share_BTN = jnp.where(lse_BTN == -jnp.inf, 0.0, jnp.exp(sinks_N.astype(jnp.float32) - lse_BTN))
        dsinks_N = -(share_BTN * delta_BTN).sum((0, 1)).astype(sinks_N.dtype)
    return dq.astype(q_BTNH.dtype), dk.astype(k_BSKH.dtype), dv.astype(v_BSKP.dtype), None, dsinks_N


_attend.defvjp(_attend_fwd, _attend_bwd)

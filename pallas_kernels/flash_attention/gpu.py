"""Attention on Hopper (H100, H200): Mosaic GPU kernels, bfloat16 or float16.

B batch, T query, S key, N heads, K kv heads, H head dim, P value dim. Lengths that are no multiple of 8 and head dims that are no
multiple of 64 are padded in memory (TMA copies tiles of 8 rows x 128 bytes); everything else is masked inside the kernels.
"""
import functools

import jax
import jax.numpy as jnp

from pallas_kernels import gpu
from pallas_kernels.flash_attention import gpu_backward, gpu_forward
from pallas_kernels.flash_attention import gpu_plan as plan
from pallas_kernels.kept import kept

MAX_HEAD_DIM = 256


def unsupported(query_BTNH, key_BSKH, value_BSKP, index, sinks_N, spec):
    """Why these inputs cannot run, or None."""
    widest = max(query_BTNH.shape[3], value_BSKP.shape[3])
    if widest > MAX_HEAD_DIM:
        return f"head dim {widest} is above {MAX_HEAD_DIM}, what the registers of two warpgroups hold"
    if spec.out_dtype is not None and jnp.dtype(spec.out_dtype) != query_BTNH.dtype:
        return f"the output is written in {query_BTNH.dtype}, and {jnp.dtype(spec.out_dtype)} was asked for"
    return gpu.unsupported_dtype(query_BTNH.dtype) or gpu.unsupported_here()


def attend(query_BTNH, key_BSKH, value_BSKP, index, sinks_N, spec, *, interpret=False):
    """(out [B,T,N,P] in the query's dtype, logsumexp [B,T,N])."""
    out_BTNP, lse_BNT = _core(spec, gpu.interpretation(interpret), query_BTNH, key_BSKH, value_BSKP, index, sinks_N)
    return out_BTNP, lse_BNT.swapaxes(1, 2)


def gradients(query_BTNH, key_BSKH, value_BSKP, index, lse_BTN, delta_BTN, d_out_BTNP, spec, *, interpret=False):
    """(dq, dk, dv) in the inputs' dtype, from a logsumexp over these keys and perhaps others."""
    rows = lse_BTN.swapaxes(1, 2), delta_BTN.swapaxes(1, 2)
    arrays = query_BTNH, key_BSKH, value_BSKP, d_out_BTNP.astype(query_BTNH.dtype)
    return _gradients(spec, gpu.interpretation(interpret), *arrays, index, *rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _core(spec, interpret, q_BTNH, k_BSKH, v_BSKP, index, sinks_N):
    T, S, P = q_BTNH.shape[1], k_BSKH.shape[1], v_BSKP.shape[3]
    q, k, v = (_aligned(x) for x in (q_BTNH, k_BSKH, v_BSKP))
    block = gpu_forward.blocks(q.shape[3], v.shape[3], T, S)
    shape = plan.Shape(T, S, gpu.COMPUTE * gpu_forward.Q_ROWS, block.k_rows)
    out, lse2_BNT = gpu_forward.forward(spec, interpret, q, k, v, _ids(index, spec, shape), sinks_N, shape, block)
    return out[:, :T, :, :P], lse2_BNT[:, :, :T] * gpu.LN2


def _core_fwd(spec, interpret, q_BTNH, k_BSKH, v_BSKP, index, sinks_N):
    out_BTNP, lse_BNT = kept(_core(spec, interpret, q_BTNH, k_BSKH, v_BSKP, index, sinks_N))
    return (out_BTNP, lse_BNT), (q_BTNH, k_BSKH, v_BSKP, index, sinks_N, out_BTNP, lse_BNT)


def _core_bwd(spec, interpret, residuals, cotangents):
    q_BTNH, k_BSKH, v_BSKP, index, sinks_N, out_BTNP, lse_BNT = residuals
    do_BTNP, dlse_BNT = cotangents
    delta_BNT = jnp.einsum("btnp,btnp->bnt", out_BTNP, do_BTNP, preferred_element_type=jnp.float32) - dlse_BNT
    dsinks_N = None if sinks_N is None else _sink_gradient(sinks_N, lse_BNT, delta_BNT)
    return *_gradients(spec, interpret, q_BTNH, k_BSKH, v_BSKP, do_BTNP, index, lse_BNT, delta_BNT), None, dsinks_N


def _gradients(spec, interpret, q_BTNH, k_BSKH, v_BSKP, do_BTNP, index, lse_BNT, delta_BNT):
    (T, _, H), (S, _, P) = q_BTNH.shape[1:], v_BSKP.shape[1:]
    q, k, v, do = (_aligned(x) for x in (q_BTNH, k_BSKH, v_BSKP, do_BTNP))
    dq, dk, dv = gpu_backward.backward(spec, interpret, q, k, v, do, lse_BNT, delta_BNT, functools.partial(_ids, index, spec), T, S)
    return dq[:, :T, :, :H], dk[:, :S, :, :H], dv[:, :S, :, :P]


def _sink_gradient(sinks_N, lse_BNT, delta_BNT):
    """The sink is a key whose value is zero."""
    seen = lse_BNT != -jnp.inf
    p_BNT = jnp.where(seen, jnp.exp(sinks_N.astype(jnp.float32)[:, None] - jnp.where(seen, lse_BNT, 0.0)), 0.0)
    return -(p_BNT * delta_BNT).sum((0, 2)).astype(sinks_N.dtype)


_core.defvjp(_core_fwd, _core_bwd)


def _aligned(x_BTNH):
    """Padded as TMA wants it; x itself where it already is."""
    return gpu.pad_axis(gpu.pad_axis(x_BTNH, 1, gpu.ROWS), 3, gpu.COLUMNS)


def _ids(index, spec, shape):
    """Ids padded to whole tiles, or None for a mask known at trace time."""
    if not plan.is_traced(index):
        return None
    up = lambda n, rows: -(-n // rows) * rows  # noqa: E731
    return plan.ids(index, shape.T, shape.S, spec, up(shape.T, shape.q_rows), up(shape.S, shape.k_rows))

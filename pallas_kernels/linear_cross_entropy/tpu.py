"""Cross entropy of a linear head for TPUs: kernels make the logits, forward and again backward; the two products of the backward pass
are plain matmuls over one chunk of the vocabulary at a time.

The gradient needs dlogits twice, for dx = dlogits w^T and for dw = x^T dlogits. One kernel with both sums would hold a [block, D] sum in
16 MiB of memory and move the other through HBM at every step; two kernels would multiply x by w once more. A chunk of dlogits in HBM, no
larger than x, costs neither: of six products of T x D x V flops that are executed, four are XLA's own matmuls.

T tokens, D model, V vocab, J columns of a chunk.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.linear_cross_entropy import tpu_logits
from pallas_kernels.products import product

CHUNK = 4096  # columns of the vocabulary, about, whose dlogits are in memory at a time


def lse_and_label_logit(x_TD, w, labels_T, soft_cap, w_layout, *, interpret):
    """(logsumexp [T], logit of the label [T], 0 where the label is outside [0, V)), float32."""
    return _fused((soft_cap, w_layout, interpret), x_TD, w, labels_T)


def unsupported(x_TD, w, labels_T, soft_cap, w_layout):
    """Why these inputs cannot run on a TPU, or None."""
    if x_TD.dtype not in (jnp.float32, jnp.bfloat16):
        return f"{x_TD.dtype} is not multiplied on a TPU; give float32 or bfloat16"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(static, x_TD, w, labels_T):
    soft_cap, w_layout, interpret = static
    return tpu_logits.statistics(x_TD, w, labels_T, soft_cap, w_layout, interpret=interpret)


def _fused_fwd(static, x_TD, w, labels_T):
    lse_T, label_logit_T = _fused(static, x_TD, w, labels_T)
    return (lse_T, label_logit_T), (x_TD, w, labels_T, lse_T)


def _fused_bwd(static, residuals, cotangents):
    x_TD, w, labels_T, lse_T = residuals
    soft_cap, w_layout, interpret = static
    axis = w_layout.index("V")
    V = w.shape[axis]
    chunk = _chunk(V, tpu_logits.blocks(*x_TD.shape, V, x_TD.dtype.itemsize, x_TD.dtype.itemsize)[2])

    def one_chunk(first, width, sums):
        """Adds what the columns [first, first + width) give to dx, and writes their dw."""
        dx_TD, dw = sums
        dlogits_TJ = tpu_logits.dlogits(x_TD, w, labels_T, lse_T, *cotangents, first, width, soft_cap, w_layout, interpret=interpret)
        w_chunk = jax.lax.dynamic_slice_in_dim(w, first, width, axis)
        letters = w_layout.lower().replace("v", "j")
        dx_TD = dx_TD + product(f"tj,{letters}->td", dlogits_TJ, w_chunk, jnp.float32)
        operands = (x_TD, dlogits_TJ) if axis == 1 else (dlogits_TJ, x_TD)
        dw_chunk = product("td,tj->dj" if axis == 1 else "tj,td->jd", *operands, jnp.float32).astype(w.dtype)
        return dx_TD, jax.lax.dynamic_update_slice_in_dim(dw, dw_chunk, first, axis)

    sums = jnp.zeros(x_TD.shape, jnp.float32), jax.lax.empty(w.shape, w.dtype)
    whole = V // chunk
    sums = jax.lax.fori_loop(0, whole, lambda i, sums: one_chunk(i * chunk, chunk, sums), sums)
    if V % chunk:
        sums = one_chunk(jnp.int32(whole * chunk), V % chunk, sums)
    return sums[0].astype(x_TD.dtype), sums[1], np.zeros(labels_T.shape, jax.dtypes.float0)


_fused.defvjp(_fused_fwd, _fused_bwd)


def _chunk(V, block):
    """Columns of a chunk: whole blocks, from half of CHUNK to one and a half, so that equal chunks make up the vocabulary if possible."""
    if V <= CHUNK:
        return V
    most = max(1, CHUNK // block)
    for number in sorted(range(max(1, most // 2), most + most // 2 + 1), key=lambda n: abs(n - most)):
        if V % (number * block) == 0:
            return number * block
    return most * block

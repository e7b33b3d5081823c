"""Who is measured: our implementations and each rival, as functions of the same arguments.

B batch, T time, N heads, K kv heads, H head dim, P value dim; D in, V vocab.
"""
import dataclasses
import importlib

import jax
import jax.numpy as jnp

import pallas_kernels


def build(contestant, case):
    """(f, shapes of its arguments): the forward pass, or forward and every gradient with the output as its own cotangent.

    Raises NotImplementedError with the reason where a contestant does not do this case.
    """
    forward, arguments = CONTESTANTS[case.op][contestant](case), case.arguments()
    if case.direction == "forward":
        return forward, arguments
    number = sum(jnp.issubdtype(x.dtype, jnp.floating) for x in arguments)

    def backward(*args):
        out, vjp = jax.vjp(lambda *floats: forward(*floats, *args[number:]), *args[:number])
        return out, vjp(out)

    return backward, arguments


def _ours(op, implementation):
    def options(case):
        shape = dict(case.shape)
        if op == "flash_attention":
            return {"is_causal": bool(shape.get("causal", 1)), "local_window_size": shape.get("window")}
        return {}

    def make(case):
        f = getattr(pallas_kernels, op)
        result = lambda *args: f(*args, implementation=implementation, **options(case))  # noqa: E731
        return (lambda *args: result(*args)[0]) if op == "linear_cross_entropy" else result

    return make


def _naive_attention(case):
    shape = dict(case.shape)

    def attend(q, k, v):
        window = shape.get("window")
        return jax.nn.dot_product_attention(q, k, v, is_causal=bool(shape.get("causal", 1)), implementation="xla",
                                            local_window_size=None if window is None else (window, 0))

    return attend


def _splash(case):
    """jax's splash attention, with the blocks that its schedule on v4 likes best."""
    kernel = importlib.import_module("jax.experimental.pallas.ops.tpu.splash_attention")
    shape = dict(case.shape)
    T, N, H = shape["T"], shape["N"], shape["H"]
    block = min(1024 if H <= 128 else 512, T)
    mask = kernel.FullMask((T, T)) if not shape.get("causal", 1) else kernel.CausalMask((T, T))
    if shape.get("window") is not None:
        mask = kernel.LocalMask((T, T), (shape["window"], 0), 0)
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    sizes = kernel.BlockSizes(**dict.fromkeys(names, block), use_fused_bwd_kernel=True)
    make = kernel.make_splash_mha if shape.get("K", N) == N else kernel.make_splash_mqa
    heads = N // shape.get("K", N) if make is kernel.make_splash_mqa else N
    attend = make(kernel.MultiHeadMask([mask] * heads), block_sizes=sizes, head_shards=1, q_seq_shards=1)

    def f(q_BTNH, k_BTKH, v_BTKP):
        q, k, v = ((x.swapaxes(1, 2)) for x in (q_BTNH * H**-0.5, k_BTKH, v_BTKP))
        if heads != N:  # grouped heads: one kv head at a time
            q = q.reshape(q.shape[0], -1, heads, *q.shape[2:])
            return jax.vmap(jax.vmap(attend))(q, k, v).reshape(q.shape[0], N, T, -1).swapaxes(1, 2)
        return jax.vmap(attend)(q, k, v).swapaxes(1, 2)

    return f


def _jax_flash(case):
    module = importlib.import_module("jax.experimental.pallas.ops.tpu.flash_attention")
    shape = dict(case.shape)
    if shape.get("window") is not None or shape.get("K", shape["N"]) != shape["N"]:
        raise NotImplementedError("jax's flash attention has no window and no grouped heads")
    T = shape["T"]
    block, half = min(1024, T), min(512, T)
    sizes = module.BlockSizes(
        block_q=block, block_k_major=block, block_k=half, block_b=1, block_q_major_dkv=block, block_k_major_dkv=block, block_k_dkv=half,
        block_q_dkv=half, block_k_major_dq=block, block_k_dq=half, block_q_dq=block,
    )  # fmt: skip

    def f(q, k, v):
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        out = module.flash_attention(q, k, v, causal=bool(shape.get("causal", 1)), sm_scale=shape["H"] ** -0.5, block_sizes=sizes)
        return out.swapaxes(1, 2)

    return f


def _splash_beside_retention(case):
    """Attention of the same shape: what retention replaces, not the same function."""
    shape = dict(case.shape)
    if shape.get("P", shape["H"]) != shape["H"]:
        raise NotImplementedError("jax's splash attention wants values of the keys' size")
    attend = _splash(dataclasses.replace(case, shape=(*case.shape, ("causal", 1))))
    return lambda q, k, v, decay: attend(q, k, v)


def _parallel_retention(case):
    """The T x T form of RetNet (arXiv:2307.08621, eq. 5)."""
    shape = dict(case.shape)

    def f(q_BTNH, k_BTNH, v_BTNP, log_decay_N):
        gap_TT = jnp.arange(shape["T"])[:, None] - jnp.arange(shape["T"])
        decay_NTT = jnp.where(gap_TT >= 0, jnp.exp(log_decay_N[:, None, None] * gap_TT), 0.0).astype(q_BTNH.dtype)
        scores_BNTT = shape["H"] ** -0.5 * jnp.einsum("btnh,bsnh->bnts", q_BTNH, k_BTNH) * decay_NTT
        return jnp.einsum("bnts,bsnp->btnp", scores_BNTT, v_BTNP)

    return f


def _megablox(case):
    module = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox")

    def f(lhs, rhs, sizes):
        return module.gmm(lhs, rhs, sizes, lhs.dtype, (512, 512, 512))

    return f


def _ragged_dot(case):
    return lambda lhs, rhs, sizes: jax.lax.ragged_dot(lhs, rhs, sizes)


def _plain_cross_entropy(case):
    def f(x_TD, w_DV, labels_T):
        logits_TV = jnp.einsum("td,dv->tv", x_TD, w_DV, preferred_element_type=jnp.float32)
        label = jnp.take_along_axis(logits_TV, labels_T[:, None], axis=1)[:, 0]
        return jax.nn.logsumexp(logits_TV, axis=1) - label

    return f


def _all_of_ours(op):
    return {name: _ours(op, name) for name in ("pallas_tpu", "pallas_gpu", "xla")}


CONTESTANTS = {
    "flash_attention": {
        **_all_of_ours("flash_attention"), "jax splash": _splash, "jax flash": _jax_flash, "materialised": _naive_attention,
    },
    "retention": {
        **_all_of_ours("retention"), "materialised": _parallel_retention, "attention by jax splash": _splash_beside_retention,
    },
    "grouped_matmul": {**_all_of_ours("grouped_matmul"), "jax megablox": _megablox, "jax ragged_dot": _ragged_dot},
    "linear_cross_entropy": {**_all_of_ours("linear_cross_entropy"), "materialised": _plain_cross_entropy},
}  # fmt: skip
TPU_ONLY = ("pallas_tpu", "jax splash", "jax flash", "jax megablox", "attention by jax splash")
GPU_ONLY = ("pallas_gpu",)

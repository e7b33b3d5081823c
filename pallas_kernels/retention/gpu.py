"""Retention on a Hopper GPU: four calls of one kernel (`gpu_scan.scan`), forward, dq, dk and dv. bfloat16.

B batch, T time, N heads, H head dim, P value dim, n chunks, C tokens of a chunk.

With do the cotangent of out, w(t, s) the decay from s to t (RetNet, arXiv:2307.08621, eq. 7; any decay, packed or not):
  out_t = scale sum_{s <= t} w(t,s) (q_t k_s) v_s         dq_t = scale sum_{s <= t} w(t,s) (do_t v_s) k_s
  dk_s = scale sum_{t >= s} w(t,s) (v_s do_t) q_t         dv_s = scale sum_{t >= s} w(t,s) (k_s q_t) do_t
so dq is retention of (do, v, k) from the transposed initial state, and dk and dv are retention of (v, do, q) and (k, q, do) back in time,
from the cotangent of the final state; where dv's scan ends stands the gradient of the initial state.

A decay that is trained makes dq's scan keep the rounded states and dk's scan read them (`_dlog_decay`); a constant one that is not
(retention, lightning attention) costs nothing.

What a chunk's decays, segments and odd end mean is worked out here, in float32, into a small table per chunk that the kernel reads.
Exponents are differences of sums over one chunk of 64 tokens of log decays >= -104: at most 5e-4 off, below bfloat16's rounding.
"""
import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from pallas_kernels import gpu
from pallas_kernels.kept import kept
from pallas_kernels.retention import gpu_scan
from pallas_kernels.retention.gpu_plan import C
from pallas_kernels.retention.summary import Summary, runs

_FLOOR = -104.0  # exp() of less is zero in float32
_NEVER = 1e30  # in an exponent: no weight comes of it
LARGEST_DIM = 256  # a state of [256, 64] fills 128 registers of a thread


def unsupported(q_BTNH, k_BTNH, v_BTNP, log_decay, initial_state, segment_ids, chunk_size, scale):
    """Why this kernel cannot run these inputs, or None."""
    if reason := gpu.unsupported_here() or gpu.unsupported_dtype(q_BTNH.dtype):
        return reason
    if q_BTNH.dtype != jnp.bfloat16:
        return "a float16 state overflows at 65504; give bfloat16"
    if max(q_BTNH.shape[-1], v_BTNP.shape[-1]) > LARGEST_DIM:
        return f"head dims above {LARGEST_DIM} do not fit in registers, got H={q_BTNH.shape[-1]} P={v_BTNP.shape[-1]}"
    return None


def retain(q_BTNH, k_BTNH, v_BTNP, log_decay, initial_state, segment_ids, chunk_size, scale, *, interpret=False):
    """(out [B,T,N,P], final state [B,N,H,P], Summary). `chunk_size` has no meaning here: a chunk is 64 tokens."""
    B, T, N, _ = q_BTNH.shape
    log_decay = log_decay.astype(jnp.float32)
    initial_state = None if initial_state is None else initial_state.astype(jnp.float32)
    run = functools.partial(_retain, (scale, interpret), q_BTNH, k_BTNH, v_BTNP, log_decay)
    out_BTNP, state_BNHP = run(initial_state, segment_ids)
    # Under jit the second run is there only for a caller that uses the summary's state.
    alone_BNHP = state_BNHP if initial_state is None else run(None, segment_ids)[1]
    return out_BTNP, state_BNHP, _summary(alone_BNHP, log_decay, segment_ids, B, T, N)


def _summary(alone_BNHP, log_decay, segment_ids, B, T, N):
    g_BTN = jnp.broadcast_to(jnp.maximum(log_decay, _FLOOR), (B, T, N))
    if segment_ids is None:
        return Summary(alone_BNHP, g_BTN.sum(1), jnp.ones(B, jnp.int32), jnp.ones(B, jnp.int32))
    run_BT, first_B, last_B = runs(segment_ids)
    passed_BN = jnp.where((segment_ids != 0)[..., None], g_BTN, 0.0).sum(1)
    return Summary(alone_BNHP, jnp.where(run_BT[:, -1:] == 0, passed_BN, -jnp.inf), first_B, last_B)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _retain(static, q_BTNH, k_BTNH, v_BTNP, log_decay, initial_BNHP, segment_BT):
    scale, interpret = static
    forward, _ = _tables(log_decay, segment_BT, q_BTNH.shape[1], scale)
    return _scan(q_BTNH, k_BTNH, v_BTNP, forward, initial_BNHP, scale, False, interpret)[:2]


def _retain_fwd(static, *primals):
    trained = primals[3].perturbed
    arguments = jax.tree.map(lambda primal: primal.value, primals, is_leaf=lambda x: hasattr(x, "perturbed"))
    return kept(_retain(static, *arguments)), (arguments, () if trained else None)  # a residual is no bool: an empty tuple is true here


def _retain_bwd(static, residuals, cotangents):
    scale, interpret = static
    (q, k, v, log_decay, initial, segment_BT), trained = residuals
    dout, dstate = (None if isinstance(x, SymbolicZero) else x for x in cotangents)
    dout = jnp.zeros(v.shape, v.dtype) if dout is None else dout
    forward, backward = _tables(log_decay, segment_BT, q.shape[1], scale)
    turned = lambda state: None if state is None else state.swapaxes(2, 3)  # noqa: E731
    asked = trained is not None
    dq, _, at_q = _scan(dout, v, k, forward, turned(initial), scale, False, interpret, (q, None) if asked else None)
    dk, _, at_k = _scan(v, dout, q, backward, turned(dstate), scale, True, interpret, (k, at_q[1]) if asked else None)
    dv, dinitial, _ = _scan(k, q, dout, backward, dstate, scale, True, interpret)
    dlog_decay = _dlog_decay(at_q[0], *at_k, log_decay, segment_BT, T=q.shape[1]) if asked else jnp.zeros_like(log_decay)
    return dq, dk, dv, dlog_decay, None if initial is None else dinitial, None


_retain.defvjp(_retain_fwd, _retain_bwd, symbolic_zeros=True)


def _dlog_decay(ends_BNnC, begins_BNnC, across_BNn, log_decay, segment_BT, T):
    """The gradient of the log decays from the weights x(t,s) = scale w(t,s) (q_t k_s) (do_t v_s) of all pairs, s = 0 for the initial state.

    It is the sum over the pairs with s < u <= t. Over those that start before u's chunk and end in or after it that is the product of the
    state before the chunk with the gradient of that state (`across`); the others differ from them by the pairs that begin, k_s dk_s, and
    end, q_t dq_t, in the chunk before u. So nothing is summed over more than a chunk, and no pair that does not count cancels far away.
    """
    B, N, n, _ = ends_BNnC.shape
    change_BNnC = begins_BNnC - ends_BNnC
    d_BNnC = across_BNn[..., None] + jnp.cumsum(change_BNnC, axis=-1) - change_BNnC
    d_BTN = d_BNnC.transpose(0, 2, 3, 1).reshape(B, n * C, N)[:, :T]
    counts = log_decay > _FLOOR
    if segment_BT is not None:
        counts &= ((segment_BT != 0) & ~_starts(segment_BT))[..., None]
    d_BTN = jnp.where(counts, d_BTN, 0.0)
    return d_BTN.sum((0, 1)) if log_decay.ndim == 1 else d_BTN


def _scan(x, y, z, table, initial, scale, reverse, interpret, joined=None):
    """`gpu_scan.scan` of any length and head dims: time padded to what TMA copies (8 rows), dims to a swizzled row (64)."""
    T, H, P = x.shape[1], x.shape[-1], z.shape[-1]
    pad = lambda a, axis, multiple: gpu.pad_axis(a, axis, multiple)  # noqa: E731
    x, y, z = (pad(pad(a, 1, gpu.ROWS), 3, gpu.COLUMNS) for a in (x, y, z))
    initial = None if initial is None else pad(pad(initial, 2, gpu.COLUMNS), 3, gpu.COLUMNS)
    joined = None if joined is None else (pad(pad(joined[0], 1, gpu.ROWS), 3, gpu.COLUMNS), joined[1])
    out, final, extra = gpu_scan.scan(x, y, z, table, initial, scale=scale, reverse=reverse, interpret=interpret, joined=joined)
    return out[:, :T, :, :P], final[:, :, :H, :P], extra


def _tables(log_decay, segment_BT, T, scale):
    """The kernel's tables, forward and back in time: [1,N,2,5,C] for a constant decay without segments, else [B,N,n,5,C]."""
    g = jnp.maximum(log_decay, _FLOOR)
    n = -(-T // C)
    if log_decay.ndim == 1 and segment_BT is None:
        # Whole chunks, and the last one. A constant decay counts tokens: exact.
        length = jnp.array([C, T - (n - 1) * C])[:, None]
        count = 1 + jnp.arange(C)
        since = (g[:, None, None] * jnp.minimum(count, length))[None]
        valid = (count <= length)[None, None]
    else:
        since, valid = _since(g, segment_BT, T)
    total = since[..., -1:]
    row, column = jnp.where(valid, since, -_NEVER), jnp.where(valid, since, _NEVER)
    from_start = jnp.where(valid, jnp.exp(since), 0.0)
    to_end = jnp.where(valid, jnp.exp(jnp.minimum(total - since, 0.0)), 0.0)
    keeps = jnp.exp(total) * jnp.ones(C)
    stack = lambda *entries: jnp.stack(jnp.broadcast_arrays(*entries), axis=-2)  # noqa: E731
    forward = stack(gpu.LOG2E * row, gpu.LOG2E * column, scale * from_start, to_end, keeps)
    # Back in time the pair (row s, column t) weighs exp(since_t - since_s).
    back_row, back_column = jnp.where(valid, -since, -_NEVER), jnp.where(valid, -since, _NEVER)
    return forward, stack(gpu.LOG2E * back_row, gpu.LOG2E * back_column, to_end, scale * from_start, keeps)


def _since(g, segment_BT, T):
    """(sum of log decays from the start of the chunk [B,N,n,C], which tokens count [B or 1,1,n,C])."""
    if segment_BT is None:
        valid_BT, g_BTN = jnp.ones((1, T), bool), g
    else:
        valid_BT = segment_BT != 0
        g_BTN = jnp.where(valid_BT[..., None], jnp.where(_starts(segment_BT)[..., None], _FLOOR, g), 0.0)
    return jnp.cumsum(_chunks(g_BTN).transpose(0, 3, 1, 2), axis=-1), _chunks(valid_BT)[:, None]


def _starts(segment_BT):
    """The tokens that start from a zero state; the first run has the initial one."""
    run_BT, _, _ = runs(segment_BT)
    return run_BT != jnp.pad(run_BT[:, :-1], ((0, 0), (1, 0)))


def _chunks(x_BT):
    return gpu.pad_axis(x_BT, 1, C).reshape(x_BT.shape[0], -1, C, *x_BT.shape[2:])

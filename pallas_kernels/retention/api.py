"""The public door of retention: checks, defaults, choice of implementation.

B batch, T time, N heads, H head dim, P value dim.
"""
import jax.numpy as jnp

from pallas_kernels import checks, dispatch

_OP = "retention"


def retention(query_BTNH, key_BTNH, value_BTNP, log_decay, *, initial_state=None, output_final_state=False, return_summary=False,
              segment_ids=None, chunk_size=None, scale=None, implementation=None, interpret=None):
    """o_t = scale q_t S_t with S_t = exp(log_decay_t) S_{t-1} + k_t^T v_t (RetNet, arXiv:2307.08621; any decay in [0, 1] per token).

    Packing: a new segment starts from a zero state. Tokens of segment 0 neither decay nor write, and their output is 0; a segment
    continues behind them. The initial state belongs to the first nonzero segment (that of token 0, if token 0 is not padding);
    the final state belongs to the last nonzero segment, and is the initial one if there is none.

    Args:
      query_BTNH, key_BTNH, value_BTNP: same dtype; any T, H, P. Sums and states are float32 (float64 for float64 inputs).
      log_decay: floating, <= 0 (not checked): [N] constant per head, the fast case, or [B,T,N].
      initial_state: floating [B,N,H,P], or None for zeros.
      output_final_state: also return the state after the last token, [B,N,H,P] in the accumulator's dtype.
      return_summary: also return `Summary`: (state from zero, total log decay [B,N], first segment [B], last segment [B]).
      segment_ids: int [B,T] or None for one segment (1).
      chunk_size: tokens of a chunk, or None for the measured default.
      scale: None is H ** -0.5.
      implementation: None, "reference", "xla", "pallas_tpu" or "pallas_gpu".
      interpret: for Pallas kernels; None interprets where the named kernel has no hardware.

    Returns:
      out [B,T,N,P] in the query's dtype; then the final state if asked; then the summary if asked.

    >>> import jax.numpy as jnp
    >>> x = jnp.ones((1, 3, 1, 1))
    >>> retention(x, x, x, jnp.log(jnp.array([0.5])), scale=1.0).ravel().tolist()
    [1.0, 1.5, 1.75]
    """
    _check(query_BTNH, key_BTNH, value_BTNP, log_decay, initial_state, segment_ids, chunk_size, scale)
    query_BTNH, key_BTNH, value_BTNP, log_decay = (jnp.asarray(x) for x in (query_BTNH, key_BTNH, value_BTNP, log_decay))
    initial_state, segment_ids = (None if x is None else jnp.asarray(x) for x in (initial_state, segment_ids))
    scale = query_BTNH.shape[-1] ** -0.5 if scale is None else float(scale)
    arguments = (query_BTNH, key_BTNH, value_BTNP, log_decay, initial_state, segment_ids, chunk_size, scale)
    out_BTNP, state, summary = dispatch.pick(_OP, "retain", implementation, interpret, arguments)(*arguments)
    extra = (state,) * bool(output_final_state) + (summary,) * bool(return_summary)
    return (out_BTNP, *extra) if extra else out_BTNP


def _check(query_BTNH, key_BTNH, value_BTNP, log_decay, initial_state, segment_ids, chunk_size, scale):
    for name, x, letters in (("query_BTNH", query_BTNH, "BTNH"), ("key_BTNH", key_BTNH, "BTNH"), ("value_BTNP", value_BTNP, "BTNP")):
        checks.rank(_OP, name, x, letters)
        checks.floating(_OP, name, x, like=("query_BTNH", query_BTNH))
    B, T, N, H = query_BTNH.shape
    P = value_BTNP.shape[-1]
    checks.shape(_OP, "key_BTNH", key_BTNH, (B, T, N, H), "shape of query_BTNH; retention has no grouped heads, repeat the keys")
    checks.shape(_OP, "value_BTNP", value_BTNP, (B, T, N, P), "batch, length and heads of query_BTNH")
    if T == 0:
        raise ValueError(f"{_OP}: empty sequence, T=0; T must be at least 1.")
    if not hasattr(log_decay, "shape") or tuple(log_decay.shape) not in ((N,), (B, T, N)):
        given = tuple(log_decay.shape) if hasattr(log_decay, "shape") else type(log_decay).__name__
        raise ValueError(f"{_OP}: log_decay must be an array of shape {(N,)} (constant per head) or {(B, T, N)} (per token), got {given}.")
    checks.floating(_OP, "log_decay", log_decay)
    if initial_state is not None:
        checks.shape(_OP, "initial_state", initial_state, (B, N, H, P), "[B,N,H,P] of the inputs")
        checks.floating(_OP, "initial_state", initial_state)
    if segment_ids is not None:
        checks.shape(_OP, "segment_ids", segment_ids, (B, T), "batch and length of query_BTNH")
        checks.integer(_OP, "segment_ids", segment_ids)
    if chunk_size is not None:
        checks.count(_OP, "chunk_size", chunk_size, 1)
    if scale is not None:
        checks.number(_OP, "scale", scale)

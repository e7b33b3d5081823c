"""The public door of the gated delta rule: checks, defaults, choice of implementation.

B batch, T time, N heads, H head dim, P value dim.
"""
import jax.numpy as jnp

from pallas_kernels import checks, dispatch

_OP = "gated_delta"


def gated_delta(query_BTNH, key_BTNH, value_BTNP, log_decay_BTN, beta_BTN, *, initial_state=None, output_final_state=False,
                segment_ids=None, chunk_size=None, scale=None, implementation=None, interpret=None):
    """o_t = scale q_t S_t with S_t = a_t S_{t-1} + b_t k_t^T (v_t - k_t a_t S_{t-1}), a = exp(log_decay) (arXiv:2412.06464, eq. 10).

    Packing: a new segment starts from a zero state. Tokens of segment 0 neither decay nor write, and their output is 0; a segment
    continues behind them. The initial state belongs to the first nonzero segment; the final state to the last one, and is the initial one
    if there is none.

    Args:
      query_BTNH, key_BTNH, value_BTNP: same dtype; any T, H, P. Sums and states are float32 (float64 for float64 inputs). The rule is
        stable for beta |k|^2 <= 2; keys are not normalised here.
      log_decay_BTN: floating, <= 0 (not checked). beta_BTN: floating, how much of the old value of a key is replaced.
      initial_state: floating [B,N,H,P], or None for zeros.
      output_final_state: also return the state after the last token, [B,N,H,P] in the accumulator's dtype.
      segment_ids: int [B,T] or None for one segment (1).
      chunk_size: tokens of a chunk, a power of two; None is 64.
      scale: None is H ** -0.5.
      implementation: None, "reference" or "xla"; there is no Pallas kernel yet, and naming one says so.

    Returns:
      out [B,T,N,P] in the query's dtype; then the final state if asked.

    >>> import jax.numpy as jnp
    >>> x, ones = jnp.ones((1, 3, 1, 1)), jnp.ones((1, 3, 1))
    >>> gated_delta(x, x, 8 * x, 0 * ones, 0.5 * ones, scale=1.0).ravel().tolist()
    [4.0, 6.0, 7.0]
    """
    _check(query_BTNH, key_BTNH, value_BTNP, log_decay_BTN, beta_BTN, initial_state, segment_ids, chunk_size, scale)
    arrays = tuple(jnp.asarray(x) for x in (query_BTNH, key_BTNH, value_BTNP, log_decay_BTN, beta_BTN))
    initial_state, segment_ids = (None if x is None else jnp.asarray(x) for x in (initial_state, segment_ids))
    scale = query_BTNH.shape[-1] ** -0.5 if scale is None else float(scale)
    arguments = (*arrays, initial_state, segment_ids, chunk_size, scale)
    out_BTNP, state = dispatch.pick(_OP, "delta", implementation, interpret, arguments)(*arguments)
    return (out_BTNP, state) if output_final_state else out_BTNP


def _check(query_BTNH, key_BTNH, value_BTNP, log_decay_BTN, beta_BTN, initial_state, segment_ids, chunk_size, scale):
    for name, x, letters in (("query_BTNH", query_BTNH, "BTNH"), ("key_BTNH", key_BTNH, "BTNH"), ("value_BTNP", value_BTNP, "BTNP")):
        checks.rank(_OP, name, x, letters)
        checks.floating(_OP, name, x, like=("query_BTNH", query_BTNH))
    B, T, N, H = query_BTNH.shape
    P = value_BTNP.shape[-1]
    checks.shape(_OP, "key_BTNH", key_BTNH, (B, T, N, H), "shape of query_BTNH; there are no grouped heads here, repeat the keys")
    checks.shape(_OP, "value_BTNP", value_BTNP, (B, T, N, P), "batch, length and heads of query_BTNH")
    if T == 0:
        raise ValueError(f"{_OP}: empty sequence, T=0; T must be at least 1.")
    for name, x in (("log_decay_BTN", log_decay_BTN), ("beta_BTN", beta_BTN)):
        checks.shape(_OP, name, x, (B, T, N), "batch, length and heads of query_BTNH")
        checks.floating(_OP, name, x)
    if initial_state is not None:
        checks.shape(_OP, "initial_state", initial_state, (B, N, H, P), "[B,N,H,P] of the inputs")
        checks.floating(_OP, "initial_state", initial_state)
    if segment_ids is not None:
        checks.shape(_OP, "segment_ids", segment_ids, (B, T), "batch and length of query_BTNH")
        checks.integer(_OP, "segment_ids", segment_ids)
    if chunk_size is not None:
        checks.count(_OP, "chunk_size", chunk_size, 1)
        if chunk_size & (chunk_size - 1):
            raise ValueError(f"{_OP}: chunk_size must be a power of two (the inverse of a chunk is built from halves), got {chunk_size}.")
    if scale is not None:
        checks.number(_OP, "scale", scale)

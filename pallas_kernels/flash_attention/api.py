"""The public door of attention: checks, defaults, choice of implementation.

B batch, T query, S key, N heads, K kv heads (K divides N), H head dim, P value dim.
"""
import jax.numpy as jnp

from pallas_kernels import checks, dispatch
from pallas_kernels.flash_attention.mask import Index, Spec

_OP = "flash_attention"


def flash_attention(query_BTNH, key_BSKH, value_BSKP, *, is_causal=True, local_window_size=None, global_tokens=0, segment_ids=None,
                    kv_segment_ids=None, positions=None, kv_positions=None, logits_soft_cap=None, sinks=None, scale=None,
                    return_residual=False, out_dtype=None, implementation=None, interpret=None):
    """softmax(scale q k^T) v without the T x S matrix; names and meanings follow `jax.nn.dot_product_attention`.

    A key is visible iff `kv_segment == segment != 0`, its position is not -1 (an empty slot), and
    causal: 0 <= q_pos - kv_pos <= local_window_size; not causal: |q_pos - kv_pos| <= local_window_size (the lower bound of the
    causal form falls away, and the window is symmetric as in `jax.nn.dot_product_attention`). A window of w is w keys before the
    query plus itself. A row that sees no key gives exact zeros, a residual of -inf (with sinks too) and no gradient.

    Args:
      query_BTNH, key_BSKH, value_BSKP: K divides N; P may differ from H. Accumulation is float32 (float64 for float64 inputs).
      is_causal: causal order, top-left aligned when T differs from S and no positions are given.
      local_window_size: None (no window) or an integer >= 0.
      global_tokens: the first g tokens of each segment stay visible past the window. First means smallest position among the keys given:
        a caller that passes a part of the keys must see to it that the true first ones are there.
      segment_ids, kv_segment_ids: int [B,T], [B,S]; 0 is padding. kv_segment_ids defaults to segment_ids when S = T.
      positions, kv_positions: int [B,T], [B,S], order indices; both or neither (kv_positions defaults to positions when S = T).
      logits_soft_cap: scores become cap * tanh(score / cap).
      sinks: [N], a learned logit per head that joins the denominator only.
      scale: None is H ** -0.5.
      return_residual: also return logsumexp [B,T,N] float32 (float64 for float64 inputs), sink included; differentiable.
      out_dtype: of the output; None is the query's. Results over parts of the keys stay float32 until they are joined.
      implementation: None, "reference", "xla", "pallas_tpu" or "pallas_gpu" (which rounds to the query's dtype whatever out_dtype is).
      interpret: for Pallas kernels; None interprets where the named kernel has no hardware.

    Returns:
      out [B,T,N,P], or (out, residual).

    >>> import jax.numpy as jnp
    >>> q = k = v = jnp.ones((1, 4, 2, 8))
    >>> flash_attention(q, k, v, local_window_size=1, return_residual=True)[1].shape
    (1, 4, 2)
    """
    _check_arrays(query_BTNH, key_BSKH, value_BSKP, sinks)
    sinks = None if sinks is None else jnp.asarray(sinks)
    out_dtype = None if out_dtype is None else jnp.dtype(out_dtype).name
    spec = _spec(query_BTNH.shape[-1], is_causal, local_window_size, global_tokens, logits_soft_cap, scale, out_dtype)
    index = _index(query_BTNH, key_BSKH, segment_ids, kv_segment_ids, positions, kv_positions)
    arguments = (*(jnp.asarray(x) for x in (query_BTNH, key_BSKH, value_BSKP)), index, sinks, spec)
    out_BTNP, lse_BTN = dispatch.pick(_OP, "attend", implementation, interpret, arguments)(*arguments)
    out_BTNP = out_BTNP.astype(out_dtype or out_BTNP.dtype)
    return (out_BTNP, lse_BTN) if return_residual else out_BTNP


def flash_attention_grads(query_BTNH, key_BSKH, value_BSKP, lse_BTN, delta_BTN, d_out_BTNP, *, is_causal=True, local_window_size=None,
                          global_tokens=0, segment_ids=None, kv_segment_ids=None, positions=None, kv_positions=None, logits_soft_cap=None,
                          scale=None, implementation=None, interpret=None):
    """(dq, dk, dv) float32 (float64 for float64 inputs) of queries that met these keys and others, for who keeps no graph: a ring.

    The probabilities are exp(score - lse): with `lse` the logsumexp over all keys (and the sink), each part of the keys gives its share of
    dq, and its own dk and dv (FlashAttention-2, arXiv:2307.08691, algorithm 2). The forward pass is not run again.

    Args:
      lse_BTN: -inf where a query saw no key at all.
      delta_BTN: rowsum(out * d_out), less the gradient of lse if it has one.
      d_out_BTNP: gradient of the output over all keys.
      All others as in `flash_attention`.
    """
    _check_arrays(query_BTNH, key_BSKH, value_BSKP, None)
    B, T, N, _ = query_BTNH.shape
    for name, x in (("lse_BTN", lse_BTN), ("delta_BTN", delta_BTN)):
        checks.shape(_OP, name, x, (B, T, N), "rows and heads of query_BTNH")
    checks.shape(_OP, "d_out_BTNP", d_out_BTNP, (B, T, N, value_BSKP.shape[3]), "rows and heads of query_BTNH, width of value_BSKP")
    spec = _spec(query_BTNH.shape[-1], is_causal, local_window_size, global_tokens, logits_soft_cap, scale)
    index = _index(query_BTNH, key_BSKH, segment_ids, kv_segment_ids, positions, kv_positions)
    q, k, v, lse_BTN, delta_BTN, d_out_BTNP = (jnp.asarray(x) for x in (query_BTNH, key_BSKH, value_BSKP, lse_BTN, delta_BTN, d_out_BTNP))
    run = dispatch.pick(_OP, "gradients", implementation, interpret, (q, k, v, index, None, spec))
    dtype = checks.accumulator(q.dtype)
    return tuple(x.astype(dtype) for x in run(q, k, v, index, lse_BTN.astype(dtype), delta_BTN.astype(dtype), d_out_BTNP, spec))


def _check_arrays(query_BTNH, key_BSKH, value_BSKP, sinks):
    for name, x, letters in (("query_BTNH", query_BTNH, "BTNH"), ("key_BSKH", key_BSKH, "BSKH"), ("value_BSKP", value_BSKP, "BSKP")):
        checks.rank(_OP, name, x, letters)
        checks.floating(_OP, name, x, like=("query_BTNH", query_BTNH))
    B, T, N, H = query_BTNH.shape
    S, K = key_BSKH.shape[1:3]
    checks.shape(_OP, "key_BSKH", key_BSKH, (B, S, K, H), "batch and head dim of query_BTNH")
    checks.shape(_OP, "value_BSKP", value_BSKP, (B, S, K, value_BSKP.shape[3]), "batch, length and heads of key_BSKH")
    if K == 0 or N % K:
        raise ValueError(f"{_OP}: {N} query heads are not a multiple of {K} kv heads; every kv head serves N / K query heads.")
    if 0 in (T, S):
        raise ValueError(f"{_OP}: empty sequence, T={T} S={S}; both must be at least 1.")
    if sinks is not None:
        checks.shape(_OP, "sinks", sinks, (N,), "one logit per query head")
        checks.floating(_OP, "sinks", sinks)


def _spec(H, is_causal, window, global_tokens, soft_cap, scale, out_dtype=None):
    if isinstance(window, (tuple, list)):
        raise TypeError(f"{_OP}: local_window_size={window!r} must be one integer or None; (w, 0) with is_causal is local_window_size=w.")
    if window is not None:
        checks.count(_OP, "local_window_size", window, 0)
    checks.count(_OP, "global_tokens", global_tokens, 0)
    if soft_cap is not None:
        checks.number(_OP, "logits_soft_cap", soft_cap, positive=True)
    if scale is not None:
        checks.number(_OP, "scale", scale)
    scale = H**-0.5 if scale is None else float(scale)
    return Spec(bool(is_causal), None if window is None else int(window), int(global_tokens), soft_cap, scale, out_dtype)


def _index(query_BTNH, key_BSKH, segment_ids, kv_segment_ids, positions, kv_positions):
    B, T, S = *query_BTNH.shape[:2], key_BSKH.shape[1]
    pairs = []
    for name, x, y in (("segment_ids", segment_ids, kv_segment_ids), ("positions", positions, kv_positions)):
        if x is None and y is not None:
            raise ValueError(f"{_OP}: kv_{name} was given without {name}; give both.")
        if x is not None and y is None:
            if S != T:
                raise ValueError(f"{_OP}: {name} was given for T={T} queries but there are S={S} keys; give kv_{name} too.")
            y = x
        if x is not None:
            for what, array, length in ((name, x, T), (f"kv_{name}", y, S)):
                checks.shape(_OP, what, array, (B, length), "batch and length of the queries or keys")
                checks.integer(_OP, what, array)
        pairs += [None if array is None else jnp.asarray(array) for array in (x, y)]
    return Index(*pairs)

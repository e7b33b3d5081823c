"""The gated delta rule: chunkwise = token by token, packed = alone, in pieces = in one piece, strong decays; float64 and float32."""
import functools

import jax
import numpy as np
import pytest

from pallas_kernels import gated_delta
from pallas_kernels.gated_delta import xla
from tests.numerics import assert_close, assert_trees_close

# Compile time is nearly all of these tests' time.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
SEGMENTS = np.array([[0, 0, 1, 1, 1, 0, 0, 1, 2, 2, 2, 2, 1], [1, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 0, 0]])
NAMES = ("dq", "dk", "dv", "dlog_decay", "dbeta", "dinitial_state")


def inputs(B, T, N, H, P, dtype=np.float64, strength=0.3):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((B, T, N, d)) for d in (H, H, P))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    g, beta = -strength * np.abs(rng.standard_normal((B, T, N))), rng.uniform(0, 1, (B, T, N))
    return tuple(a.astype(dtype) for a in (q, k, v, g, beta, rng.standard_normal((B, N, H, P))))


def oracle(q, k, v, g, beta, state, segments=None, scale=1.0):
    """Equation 10 in numpy float64, one row, head and token at a time: S = S a (I - b k k^T) + b v k^T, with S [P, H] as in the paper."""
    q, k, v, g, beta = (np.asarray(x, np.float64) for x in (q, k, v, g, beta))
    B, T, N, H = q.shape
    out, final = np.zeros((B, T, N, v.shape[-1])), np.array(state, np.float64)
    for b in range(B):
        for n in range(N):
            S, current = final[b, n].T, 0
            for t in range(T):
                segment = 1 if segments is None else segments[b][t]
                if segment == 0:
                    continue
                S = np.zeros_like(S) if current not in (0, segment) else S
                current, key = segment, k[b, t, n]
                S = S @ (np.exp(g[b, t, n]) * (np.eye(H) - beta[b, t, n] * np.outer(key, key))) + beta[b, t, n] * np.outer(v[b, t, n], key)
                out[b, t, n] = scale * S @ q[b, t, n]
            final[b, n] = S.T
    return out, final


def everything(implementation, args, **kwargs):
    """Values and the gradients of a random projection of all of them."""
    def scalar(*args):
        out = gated_delta(*args[:5], initial_state=args[5], output_final_state=True, implementation=implementation, **kwargs)
        rng = np.random.default_rng(7)
        return sum((rng.standard_normal(x.shape).astype(x.dtype) * x).sum() for x in out), out

    (_, values), grads = jax.value_and_grad(scalar, range(6), has_aux=True)(*args)
    return values, dict(zip(NAMES, grads))


@pytest.mark.parametrize("segments", [None, SEGMENTS])
def test_reference_equals_oracle(segments, x64):
    args = inputs(2, 13, 2, 3, 5)
    run = lambda *a: gated_delta(*a[:5], initial_state=a[5], output_final_state=True, segment_ids=segments, scale=0.7,  # noqa: E731
                                 implementation="reference")
    assert_trees_close(jit(run)(*args), oracle(*args, segments, 0.7), rel=1e-13)
    # Gradients of the recurrence by central differences of the oracle along one random direction.
    rng = np.random.default_rng(3)
    weights, steps = [rng.standard_normal(x.shape) for x in (args[2], args[5])], [rng.standard_normal(x.shape) for x in args]
    value = lambda args: sum((w * x).sum() for w, x in zip(weights, oracle(*args, segments, 0.7)))  # noqa: E731
    moved = [value([x + e * s for x, s in zip(args, steps)]) for e in (1e-5, -1e-5)]
    grads = jit(jax.grad(lambda args: sum((w * x).sum() for w, x in zip(weights, run(*args)))))(args)
    assert_close("directional", sum((g * s).sum() for g, s in zip(grads, steps)), (moved[0] - moved[1]) / 2e-5, rel=1e-7)


@pytest.mark.parametrize("T, chunk, packed", [
    (1, None, False), (13, 4, True), (63, 16, False), pytest.param(13, 8, True, marks=pytest.mark.slow),
    pytest.param(13, 1, True, marks=pytest.mark.slow), pytest.param(200, None, False, marks=pytest.mark.slow),
])
def test_chunkwise_equals_recurrent(T, chunk, packed, x64):
    args, segments = inputs(2, T, 3, 5, 4), SEGMENTS[:, :T] if packed else None
    run = jit(lambda args: [everything(name, args, chunk_size=chunk, segment_ids=segments) for name in ("xla", "reference")])
    got, want = run(args)
    assert_trees_close(got, want, rel=1e-12)


def test_long_rows_go_block_by_block(x64, monkeypatch):
    monkeypatch.setattr(xla, "WHOLE", 16)
    monkeypatch.setattr(xla, "BLOCK", 16)
    segments = np.repeat(np.array([[1, 1, 2, 0, 2, 3, 3, 4, 4, 4]]), 5, axis=1)
    args = inputs(1, 50, 2, 3, 4)
    got, want = jit(lambda args: [everything(name, args, chunk_size=4, segment_ids=segments) for name in ("xla", "reference")])(args)
    assert_trees_close(got, want, rel=1e-12)


@pytest.mark.parametrize("strength", [0.01, 40.0])
def test_float32_at_weak_and_strong_decays(strength):
    """No exponent is positive and none a difference of large sums: float32 stays at its rounding whatever the decays."""
    args = inputs(1, 150, 2, 16, 8, np.float32, strength)
    got, grads = jit(lambda args: everything("xla", args))(args)
    assert_trees_close(got, oracle(*args, scale=16**-0.5), rel=2e-6)
    _, want = jit(lambda args: everything("reference", args))(args)
    assert_trees_close(grads, want, rel=1e-5)


def test_the_inverse_of_equal_keys_is_exact():
    """Keys that are all equal and beta = 1 make every power of A large: a sum of powers would lose all digits in float32."""
    a = np.tril(np.ones((64, 64), np.float32), -1)
    want = np.eye(64) - np.eye(64, k=-1)
    assert np.array_equal(np.asarray(jit(xla.unit_lower_inverse)(a)), want)


def test_bad_input_says_what_to_do():
    q, k, v, g, beta, _ = inputs(1, 4, 2, 3, 5, np.float32)
    with pytest.raises(ValueError, match="chunk_size must be a power of two .*, got 6"):
        gated_delta(q, k, v, g, beta, chunk_size=6)
    with pytest.raises(ValueError, match=r"beta_BTN must have shape \(1, 4, 2\)"):
        gated_delta(q, k, v, g, beta[..., 0])
    for name in ("tpu", "gpu"):
        with pytest.raises(NotImplementedError, match=f"gated_delta.pallas_{name}.*there is no {name.upper()} kernel"):
            gated_delta(q, k, v, g, beta, implementation=f"pallas_{name}")

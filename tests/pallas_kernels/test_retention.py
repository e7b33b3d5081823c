"""Retention: chunkwise = token by token, packed = alone, in pieces = in one piece, and strong decays, in float64 and float32."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import retention
from pallas_kernels.retention import Summary, combine, xla
from tests.numerics import assert_close, assert_trees_close

SEGMENTS = np.array([[0, 0, 1, 1, 1, 0, 0, 1, 2, 2, 2, 2, 1], [1, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 0, 0]])


def normal(seed, shape, dtype=np.float32):
    """Draws by numpy: jax would compile a generator for every shape."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def inputs(B, T, N, H, P, per_token, dtype=np.float32, strength=0.3):
    q, k, v, state = (normal(i, s, dtype) for i, s in enumerate(((B, T, N, H), (B, T, N, H), (B, T, N, P), (B, N, H, P))))
    return q, k, v, -strength * np.abs(normal(4, (B, T, N) if per_token else (N,), dtype)), state


def oracle(q, k, v, log_decay, state, segments=None, scale=1.0):
    """The recurrence in numpy float64, one row, head and token at a time: (out, final state)."""
    q, k, v, g, state = (np.array(x, np.float64) for x in (q, k, v, log_decay, state))
    B, T, N, _ = q.shape
    g = np.broadcast_to(g, (B, T, N))
    out = np.zeros((B, T, N, v.shape[-1]))
    for b in range(B):
        current = 0
        for t in range(T):
            segment = 1 if segments is None else segments[b][t]
            if segment == 0:
                continue
            if current not in (0, segment):
                state[b] = 0
            current = segment
            for n in range(N):
                state[b, n] = np.exp(g[b, t, n]) * state[b, n] + np.outer(k[b, t, n], v[b, t, n])
                out[b, t, n] = scale * q[b, t, n] @ state[b, n]
    return out, state


def everything(implementation, args, **kwargs):
    """Values and the gradients of a random projection of all of them."""
    def scalar(*args):
        q, k, v, log_decay, state = args
        out = retention(q, k, v, log_decay, initial_state=state, output_final_state=True, return_summary=True,
                        implementation=implementation, **kwargs)
        leaves = [jnp.where(jnp.isinf(x), 0.0, x) for x in jax.tree.leaves(out) if jnp.issubdtype(x.dtype, jnp.floating)]
        return sum((normal(i, x.shape, x.dtype) * x).sum() for i, x in enumerate(leaves)), out

    (_, values), grads = jax.value_and_grad(scalar, range(5), has_aux=True)(*args)
    return values, dict(zip(("dq", "dk", "dv", "dlog_decay", "dinitial_state"), grads))


@pytest.mark.parametrize("per_token, segments", [(False, None), (True, SEGMENTS)])
def test_reference_equals_oracle(per_token, segments, x64):
    args = inputs(2, 13, 2, 3, 5, per_token, np.float64)
    ids = None if segments is None else jnp.asarray(segments)
    run = jax.jit(lambda q, k, v, g, s: retention(q, k, v, g, initial_state=s, output_final_state=True, segment_ids=ids, scale=0.7,
                                                  implementation="reference"))
    assert_trees_close(run(*args), oracle(*args, segments, 0.7), rel=1e-13)
    # Gradients of the recurrence by central differences of the oracle along one random direction.
    weights = [normal(10, x.shape, x.dtype) for x in (args[2], args[4])]
    steps = [normal(20 + i, x.shape, x.dtype) for i, x in enumerate(args)]
    value = lambda args: sum((w * x).sum() for w, x in zip(weights, oracle(*args, segments, 0.7)))  # noqa: E731
    moved = [value([x + e * s for x, s in zip(args, steps)]) for e in (1e-5, -1e-5)]
    grads = jax.jit(jax.grad(lambda args: sum((w * x).sum() for w, x in zip(weights, run(*args)))))(args)
    assert_close("directional", sum((g * s).sum() for g, s in zip(grads, steps)), (moved[0] - moved[1]) / 2e-5, rel=1e-7)


@pytest.mark.parametrize("T, chunk, per_token, packed", [
    (1, None, False, False), (13, 4, False, True), (13, 5, True, True), (63, 16, True, False),
    pytest.param(200, 64, False, False, marks=pytest.mark.slow),
    pytest.param(200, 32, True, False, marks=pytest.mark.slow), pytest.param(200, 200, False, False, marks=pytest.mark.slow),
    pytest.param(63, 1, True, False, marks=pytest.mark.slow), pytest.param(13, 13, True, True, marks=pytest.mark.slow),
    pytest.param(13, 3, False, True, marks=pytest.mark.slow),
])
def test_chunkwise_equals_recurrent(T, chunk, per_token, packed, x64):
    check_against_recurrence(T, chunk, per_token, packed)


@pytest.mark.parametrize("chunk, per_token, packed", [
    pytest.param(3, True, True, marks=pytest.mark.slow), (2, False, False), pytest.param(4, False, True, marks=pytest.mark.slow),
    pytest.param(4, True, False, marks=pytest.mark.slow),
])
def test_long_rows_go_block_by_block(chunk, per_token, packed, x64, monkeypatch):
    """Three blocks of 4 tokens and one token more: padding first, segments that border inside blocks and between them."""
    monkeypatch.setattr(xla, "WHOLE", 8)
    monkeypatch.setattr(xla, "BLOCK", 4)
    check_against_recurrence(13, chunk, per_token, packed)


@pytest.mark.parametrize("B, per_token", [pytest.param(1, False, marks=pytest.mark.slow), (2, True)])
def test_memory_of_long_rows_is_that_of_a_block(B, per_token):
    """With every gradient, temporaries grow with the length by the states between blocks alone: a tenth of an operand, no copy of one."""
    def temporaries(T):
        q, decay = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((B, T, 2, 16), (B, T, 2) if per_token else (2,)))
        backward = lambda do, *args: jax.vjp(lambda *args: retention(*args, implementation="xla"), *args)[1](do)  # noqa: E731
        return jax.jit(backward).lower(q, q, q, q, decay).compile().memory_analysis().temp_size_in_bytes

    assert xla.WHOLE < 8192
    operand = B * 8192 * 2 * 16 * 4
    assert temporaries(16384) - temporaries(8192) < 0.1 * operand


def check_against_recurrence(T, chunk, per_token, packed):
    ids = jnp.asarray(SEGMENTS) if packed else None
    double = inputs(2, T, 2, 8, 6, per_token, np.float64)
    single = tuple(x.astype(np.float32) for x in double)

    @jax.jit
    def run(double, single):
        got = [everything("xla", args, segment_ids=ids, chunk_size=chunk) for args in (double, single)]
        return everything("reference", double, segment_ids=ids), *got

    (want, want_grads), *both = run(double, single)
    for (got, got_grads), dtype, rel in zip(both, (jnp.float64, jnp.float32), (1e-12, 1e-5)):
        assert got[0].dtype == dtype and got[1].dtype == dtype
        resets = jnp.isinf(want[2].log_decay_BN)
        np.testing.assert_array_equal(jnp.isinf(got[2].log_decay_BN), resets)
        finite = [(o, s, z._replace(log_decay_BN=jnp.where(resets, 0.0, z.log_decay_BN))) for o, s, z in (got, want)]
        assert_trees_close(*finite, rel, floor=1e-6)
        assert_trees_close(got_grads, want_grads, rel, floor=1e-6)


def test_packed_equals_alone_and_padding_is_nothing():
    q, k, v, g, state = inputs(1, 40, 2, 8, 8, True)
    segment_ids = jnp.array([[1] * 15 + [2] * 20 + [0] * 5])
    run = jax.jit(lambda q, k, v, g, **kw: retention(q, k, v, g, chunk_size=8, output_final_state=True, **kw))
    out, final = run(q, k, v, g, initial_state=state, segment_ids=segment_ids)
    first, _ = run(q[:, :15], k[:, :15], v[:, :15], g[:, :15], initial_state=state)
    second, want_final = run(q[:, 15:35], k[:, 15:35], v[:, 15:35], g[:, 15:35])
    assert_close("first", out[:, :15], first, rel=1e-6)
    assert_close("second", out[:, 15:35], second, rel=1e-6)
    assert_close("final", final, want_final, rel=1e-6)
    assert (out[:, 35:] == 0).all()
    out, final = run(q, k, v, g, initial_state=state, segment_ids=jnp.zeros((1, 40), jnp.int32))
    assert (out == 0).all() and (final == state).all()


def test_two_pieces_equal_one(x64):
    """Once by carrying the state, once by combining summaries, cut inside a segment, at its edge and inside padding."""
    args = inputs(2, 13, 2, 4, 4, True, np.float64)
    q, k, v, g, state = args
    ids = jnp.asarray(SEGMENTS)
    run = jax.jit(lambda q, k, v, g, s, ids: retention(q, k, v, g, initial_state=s, segment_ids=ids, chunk_size=4,
                                                       output_final_state=True, return_summary=True))
    _, final, whole = run(q, k, v, g, state, ids)
    first = Summary(state, jnp.zeros((2, 2)), whole.first_segment_B, whole.first_segment_B)
    for cut in (1, 6, 8):
        _, _, left = run(q[:, :cut], k[:, :cut], v[:, :cut], g[:, :cut], state, ids[:, :cut])
        _, _, right = run(q[:, cut:], k[:, cut:], v[:, cut:], g[:, cut:], state, ids[:, cut:])
        joined = combine(left, right)
        for name in Summary._fields:
            got, want = getattr(joined, name), getattr(whole, name)
            np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12, err_msg=f"{name} cut at {cut}")
        for grouping in (combine(combine(first, left), right), combine(first, joined)):  # associative
            assert_close("final", grouping.state_BNHP, final, rel=1e-12)
    cut = 4
    run = jax.jit(lambda q, k, v, s: retention(q, k, v, g[0, 0], initial_state=s, output_final_state=True))
    out, final = run(q, k, v, state)
    left, middle = run(q[:, :cut], k[:, :cut], v[:, :cut], state)
    right, last = run(q[:, cut:], k[:, cut:], v[:, cut:], middle)
    assert_close("out", jnp.concatenate([left, right], 1), out, rel=1e-12)
    assert_close("state", last, final, rel=1e-12)


@pytest.mark.parametrize("decay", [-30.0, -1e30, -jnp.inf, 0.0, "mixed"])
def test_extreme_decays(decay):
    """No overflow and no lost digits: neighbours of strongly decaying tokens keep float32 accuracy. -inf is a reset."""
    q, k, v, g, state = inputs(1, 70, 2, 4, 4, True)
    g = np.where(normal(5, g.shape) > 0, -60.0, -0.01).astype(np.float32) if decay == "mixed" else np.full_like(g, decay)
    run = jax.jit(lambda *a: retention(*a[:4], initial_state=a[4], output_final_state=True, scale=1.0, chunk_size=32))
    assert_trees_close(run(q, k, v, g, state), oracle(q, k, v, g, state), rel=1e-5 if decay == 0.0 else 2e-6)
    grads = jax.jit(jax.grad(lambda a: sum((x**2).sum() for x in run(*a))))((q, k, v, g, state))
    assert all(jnp.isfinite(x).all() for x in grads)
    if decay != "mixed":
        assert_trees_close(run(q, k, v, jnp.full((2,), decay), state), oracle(q, k, v, g, state), rel=1e-5)


def test_bfloat16_and_long_and_repeatable():
    args = inputs(1, 1000, 2, 16, 16, False, strength=0.01)
    run = jax.jit(lambda q, k, v, g, s: retention(q, k, v, g, initial_state=s, output_final_state=True))
    want = run(*args)
    for one, two in zip(want, run(*args)):
        assert (np.asarray(one) == np.asarray(two)).all()
    out, state = run(*(x.astype(jnp.bfloat16) for x in args[:3]), *args[3:])
    assert out.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    assert_close("out", out.astype(jnp.float32), want[0], rel=1e-2)
    assert_close("state", state, want[1], rel=1e-2)


def test_causality_is_exact():
    q, k, v, g, _ = inputs(1, 12, 1, 3, 1, True)
    jacobian = jax.jit(jax.jacrev(lambda v: retention(q, k, v, g, chunk_size=5)[0, :, 0, 0]))(v)[:, 0, :, 0, 0]
    np.testing.assert_array_equal(np.asarray(jacobian != 0), np.tril(np.ones((12, 12), bool)))


@pytest.mark.parametrize("change, error, message", [
    (dict(key_BTNH=jnp.zeros((1, 4, 1, 8))), ValueError, "retention has no grouped heads, repeat the keys"),
    (dict(value_BTNP=jnp.zeros((1, 4, 2, 8), jnp.bfloat16)), TypeError, "value_BTNP has dtype bfloat16 but query_BTNH has float32"),
    (dict(log_decay=jnp.zeros(3)), ValueError, r"log_decay must be an array of shape \(2,\) .* or \(1, 4, 2\) \(per token\), got \(3,\)"),
    (dict(log_decay=0.5), ValueError, "log_decay must be an array .* got float"),
    (dict(initial_state=jnp.zeros((1, 2, 8, 7))), ValueError, r"initial_state must have shape \(1, 2, 8, 8\)"),
    (dict(segment_ids=jnp.zeros((1, 5), int)), ValueError, r"segment_ids must have shape \(1, 4\)"),
    (dict(chunk_size=0), ValueError, "chunk_size must be >= 1, got 0"),
    (dict(chunk_size=2.5), TypeError, "chunk_size must be a Python integer"),
    (dict(implementation="pallas_gpu"), NotImplementedError, r"retention\[pallas_gpu\]: .* Use implementation='xla'"),
])
def test_bad_input_is_refused(change, error, message):
    x = jnp.zeros((1, 4, 2, 8))
    arrays = dict(query_BTNH=x, key_BTNH=x, value_BTNP=x, log_decay=jnp.zeros(2))
    positional = [change.get(name, default) for name, default in arrays.items()]
    with pytest.raises(error, match=message):
        retention(*positional, **{name: value for name, value in change.items() if name not in arrays})

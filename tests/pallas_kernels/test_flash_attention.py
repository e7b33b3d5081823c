"""Attention: reference against an oracle that visits one key at a time, xla against reference, masks and edges exactly."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import flash_attention
from pallas_kernels.flash_attention import xla
from pallas_kernels.flash_attention.mask import Index, Spec
from tests.numerics import assert_close


def normal(seed, shape, dtype=np.float32):
    """Draws by numpy: jax would compile a generator for every shape."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def arrays(B, T, S, N, K, H, P, dtype=np.float32):
    return tuple(normal(i, s, dtype) for i, s in enumerate(((B, T, N, H), (B, S, K, H), (B, S, K, P))))


def sees(b, t, s, T, S, causal, window, first, segments, positions):
    """The contract, word for word, for one query and one key."""
    q_seg, k_seg = (1, 1) if segments is None else (segments[0][b][t], segments[1][b][s])
    q_pos, k_pos = (t, s) if positions is None else (positions[0][b][t], positions[1][b][s])
    if q_seg != k_seg or k_seg == 0 or k_pos == -1:
        return False
    gap = q_pos - k_pos
    if causal and gap < 0:
        return False
    mates = [j for j in range(S) if segments is None or segments[1][b][j] == k_seg]
    order = sorted(j if positions is None else positions[1][b][j] for j in mates if positions is None or positions[1][b][j] >= 0)
    return window is None or abs(gap) <= window or k_pos in order[:first]


def oracle(q, k, v, sinks=None, *, causal=True, window=None, first=0, segments=None, positions=None, cap=None):
    """exp(score) over its sum, as the equation reads: (out, logsumexp)."""
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    rule = (T, S, causal, window, first, segments, positions)
    see = np.array([[[sees(b, t, s, *rule) for s in range(S)] for t in range(T)] for b in range(B)])
    outs, lses = [], []
    for n in range(N):
        scores = jnp.einsum("bth,bsh->bts", q[:, :, n], k[:, :, n * K // N]) / np.sqrt(H)
        weights = see * jnp.exp(scores if cap is None else cap * jnp.tanh(scores / cap))
        total = weights.sum(-1) + (0.0 if sinks is None else jnp.exp(sinks[n]))
        total = jnp.where(see.any(-1), total, 1.0)
        outs.append(jnp.einsum("bts,bsp->btp", weights, v[:, :, n * K // N]) / total[..., None])
        lses.append(jnp.where(see.any(-1), jnp.log(total), -jnp.inf))
    return jnp.stack(outs, 2), jnp.stack(lses, 2)


def value_and_grads(f, args):
    """(out, lse with 0 for -inf, gradients of random projections of both)."""
    def scalar(*args):
        out, lse = f(*args)
        lse = jnp.where(jnp.isinf(lse), 0.0, lse)
        return (normal(8, out.shape, out.dtype) * out).sum() + (normal(9, lse.shape, lse.dtype) * lse).sum(), (out, lse)

    (_, values), grads = jax.value_and_grad(scalar, tuple(range(len(args))), has_aux=True)(*args)
    return (*values, *grads)


PACKED = np.array([[1, 1, 1, 2, 2, 2, 2, 2, 3, 0, 0]])
ORDER = np.array([[4, 0, 10, 2, 8, 6, 1, 3, 5, 7, 9]])


@pytest.mark.parametrize("case", [
    dict(),
    dict(window=3, first=2, segments=(PACKED, PACKED), sinks=True),
    dict(causal=False, window=2, cap=1.5),
    dict(positions=(ORDER, np.where(ORDER == 3, -1, ORDER)), segments=(PACKED, PACKED), window=4, first=1),
])
def test_reference_equals_oracle(case, x64):
    args = arrays(1, 11, 11, 2, 1, 4, 3, np.float64)
    case = dict(case)
    if case.pop("sinks", False):
        args += (normal(3, (2,), np.float64),)
    kwargs = dict(is_causal=case.get("causal", True), local_window_size=case.get("window"), global_tokens=case.get("first", 0),
                  logits_soft_cap=case.get("cap"), return_residual=True, implementation="reference")
    for name in ("segments", "positions"):
        if name in case:
            short = {"segments": "segment_ids", "positions": "positions"}[name]
            kwargs |= {short: jnp.asarray(case[name][0]), f"kv_{short}": jnp.asarray(case[name][1])}
    op = lambda q, k, v, *s: flash_attention(q, k, v, sinks=s[0] if s else None, **kwargs)  # noqa: E731
    got, want = jax.jit(lambda *a: [value_and_grads(f, a) for f in (op, lambda *a: oracle(*a, **case))])(*args)
    for name, g, w in zip(("out", "lse", "dq", "dk", "dv", "dsinks"), got, want):
        assert_close(name, g, w, rel=1e-12)


def packed(B, T, parts=4):
    """Documents of uneven length, padding at the end, another layout in each row."""
    ends = [np.linspace(0, T - 3, parts + 1)[1:].astype(int) - 2 * b for b in range(B)]
    return jnp.array([[int(np.searchsorted(e, t, side="right")) + 1 if t < e[-1] else 0 for t in range(T)] for e in ends], jnp.int32)


# name: (T, S, N, K, H, P, keyword arguments, scanned). A name that starts with "more" runs with the slow tests.
CASES = {
    "one": (1, 1, 2, 2, 8, 8, {}, False),
    "window_sinks": (200, 131, 4, 2, 8, 12, {"local_window_size": 17, "sinks": True, "global_tokens": 3, "logits_soft_cap": 2.0}, False),
    "packed": (200, 200, 2, 1, 8, 8, {"segments": True}, False),
    "scan_permuted": (131, 131, 2, 1, 8, 12, {"segments": True, "permuted": True, "local_window_size": 20, "global_tokens": 2}, True),
    "scan_both_ways": (131, 200, 2, 2, 8, 8, {"is_causal": False, "local_window_size": 30, "logits_soft_cap": 3.0}, True),
    "more_both_ways": (131, 200, 2, 2, 8, 8, {"is_causal": False, "local_window_size": 30}, False),
    "more_grouped": (63, 63, 4, 2, 16, 12, {}, False),
    "more_scan": (200, 200, 2, 1, 8, 12, {}, True),
    "more_scan_packed": (200, 200, 2, 1, 8, 8, {"segments": True, "local_window_size": 9, "global_tokens": 2, "sinks": True}, True),
    "more_scan_longer_queries": (200, 131, 2, 1, 8, 8, {"local_window_size": 9}, True),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * n.startswith("more")) for n in CASES])
def test_xla_equals_reference(name, monkeypatch):
    T, S, N, K, H, P, options, scanned = CASES[name]
    if scanned:  # small blocks, so that there are many
        for constant, value in (("UNROLL_TILES", 0), ("FORWARD_BLOCK", 64), ("BACKWARD_BLOCK", 32)):
            monkeypatch.setattr(xla, constant, value)
    args, options = arrays(2, T, S, N, K, H, P), dict(options)
    if options.pop("sinks", False):
        args += (normal(3, (N,)),)
    if options.pop("segments", False):
        options["segment_ids"] = packed(2, T)
    if options.pop("permuted", False):
        shuffle = np.random.default_rng(4).permutation(T)
        options["segment_ids"] = options["segment_ids"][:, shuffle]
        options["positions"] = jnp.broadcast_to(shuffle, (2, T))
        options["kv_positions"] = options["positions"].at[:, ::7].set(-1)

    def run(implementation):
        f = lambda q, k, v, *s: flash_attention(q, k, v, sinks=s[0] if s else None, return_residual=True,  # noqa: E731
                                                implementation=implementation, **options)
        return jax.jit(lambda *args: value_and_grads(f, args))(*args)

    for what, got, want in zip(("out", "lse", "dq", "dk", "dv", "dsinks"), run("xla"), run("reference")):
        assert_close(what, got, want, rel=1e-5, floor=1e-6)


@pytest.mark.parametrize("scanned", [False, True])
def test_rows_that_see_nothing_are_exact_zeros(monkeypatch, scanned):
    if scanned:
        for constant, value in (("UNROLL_TILES", 0), ("FORWARD_BLOCK", 32), ("BACKWARD_BLOCK", 32)):
            monkeypatch.setattr(xla, constant, value)
    args = arrays(1, 70, 70, 2, 2, 8, 8)
    segment_ids = jnp.where(jnp.arange(70) < 40, 1, 0)[None]
    for implementation in ("reference", "xla"):
        f = jax.jit(lambda q, k, v, i=implementation: flash_attention(q, k, v, segment_ids=segment_ids, sinks=jnp.ones(2),
                                                                      return_residual=True, implementation=i))
        (out, lse), vjp = jax.vjp(f, *args)
        assert (out[:, 40:] == 0).all() and (lse[:, 40:] == -jnp.inf).all() and jnp.isfinite(lse[:, :40]).all()
        for grad in vjp((jnp.ones_like(out), jnp.ones_like(lse))):
            assert (grad[:, 40:] == 0).all() and jnp.isfinite(grad).all() and (grad[:, :40] != 0).any()


@pytest.mark.parametrize("window", [0, 5])
def test_window_edge_is_exact(window):
    """d out[t] / d v[s] is nonzero exactly for t - window <= s <= t."""
    T = 12
    q, k, v = arrays(1, T, T, 1, 1, 4, 1)
    jacobian = jax.jit(jax.jacrev(lambda v: flash_attention(q, k, v, local_window_size=window)[0, :, 0, 0]))(v)[:, 0, :, 0, 0]
    gap = np.arange(T)[:, None] - np.arange(T)
    np.testing.assert_array_equal(np.asarray(jacobian != 0), (gap >= 0) & (gap <= window))


def test_packed_equals_alone():
    q, k, v = arrays(1, 150, 150, 2, 1, 8, 8)
    segment_ids = jnp.where(jnp.arange(150) < 60, 1, 2)[None]
    f = jax.jit(lambda q, k, v, **kwargs: flash_attention(q, k, v, local_window_size=20, global_tokens=2, **kwargs))
    together = f(q, k, v, segment_ids=segment_ids)
    for part in (slice(0, 60), slice(60, 150)):
        assert_close("out", together[:, part], f(q[:, part], k[:, part], v[:, part]), rel=1e-6)


def test_one_query_against_a_ring_of_slots():
    """Decoding: slots in any order, some empty, equal the keys in order."""
    q, k, v = arrays(2, 1, 20, 2, 1, 8, 8)
    slots = np.random.default_rng(4).permutation(20)
    kv_positions = jnp.where(slots < 14, slots, -1)
    f = jax.jit(flash_attention, static_argnames="is_causal")
    got = f(q, k[:, slots], v[:, slots], positions=jnp.full((2, 1), 13), kv_positions=jnp.broadcast_to(kv_positions, (2, 20)))
    assert_close("out", got, f(q, k[:, :14], v[:, :14], is_causal=False), rel=1e-6)


def test_matches_jax_nn_and_keeps_bfloat16():
    q, k, v = arrays(2, 63, 63, 4, 2, 16, 16)
    theirs = jax.jit(jax.nn.dot_product_attention, static_argnames=("is_causal", "local_window_size"))
    ours = jax.jit(flash_attention, static_argnames=("is_causal", "local_window_size"))
    want = theirs(q, k, v, is_causal=True, local_window_size=(9, 0))
    assert_close("out", ours(q, k, v, local_window_size=9), want, rel=1e-6)
    want = theirs(q, k, v, local_window_size=(9, 9))
    assert_close("out", ours(q, k, v, is_causal=False, local_window_size=9), want, rel=1e-6)
    low = ours(*(x.astype(jnp.bfloat16) for x in (q, k, v)), is_causal=False, local_window_size=9)
    assert low.dtype == jnp.bfloat16
    assert_close("bfloat16", low.astype(jnp.float32), want, rel=1e-2)


def test_two_runs_are_bitwise_equal():
    args = arrays(2, 200, 200, 2, 1, 8, 8)
    f = jax.jit(jax.value_and_grad(lambda *a: (flash_attention(*a, segment_ids=packed(2, 200)) ** 2).sum(), (0, 1, 2)))
    for one, two in zip(*(jax.tree.leaves(f(*args)) for _ in range(2))):
        assert (np.asarray(one) == np.asarray(two)).all()


@pytest.mark.parametrize("G", [1, 2])
@pytest.mark.parametrize("with_grads, copies", [(False, 0.1), (True, 1.2)], ids=["forward", "with backward"])
def test_temporaries_do_not_grow_with_length(with_grads, copies, G):
    """Beyond a constant per tile: positions; for the backward pass the output, which it needs, and numbers per row."""
    N, H = 2, 64

    def temporaries(T):
        q, k = (jax.ShapeDtypeStruct((1, T, n, H), jnp.float32) for n in (N, N // G))
        f = lambda *qkv: flash_attention(*qkv, implementation="xla")  # noqa: E731
        g = (lambda do, *qkv: jax.vjp(f, *qkv)[1](do)) if with_grads else (lambda _, *qkv: f(*qkv))
        return jax.jit(g).lower(q, q, k, k).compile().memory_analysis().temp_size_in_bytes

    small, large = temporaries(4096), temporaries(16384)
    assert large - small < copies * (16384 - 4096) * N * H * 4, (small, large)


def test_tiles_that_nobody_sees_are_not_visited():
    plan = lambda T, **kw: xla._unrolled_plan(T, T, xla_spec(**kw), NO_INDEX)  # noqa: E731
    assert [tiles for _, tiles in plan(512)] == [(((0, q1), True),) for q1 in (128, 256, 384, 512)]
    last = plan(512, window=100, global_tokens=4)[-1]
    assert last == ((384, 512), (((0, 4), False), ((284, 512), True)))
    assert plan(16384) is None


def xla_spec(is_causal=True, window=None, global_tokens=0):
    return Spec(is_causal, window, global_tokens, None, 1.0)


NO_INDEX = Index()


@pytest.mark.parametrize("change, error, message", [
    (dict(query_BTNH=jnp.zeros((4, 2, 8))), ValueError, r"query_BTNH must have 4 axes \[B, T, N, H\], got shape \(4, 2, 8\)"),
    (dict(key_BSKH=jnp.zeros((1, 4, 2, 6))), ValueError, r"key_BSKH must have shape \(1, 4, 2, 8\)"),
    (dict(value_BSKP=jnp.zeros((1, 5, 2, 8))), ValueError, r"value_BSKP must have shape \(1, 4, 2, 8\)"),
    (dict(key_BSKH=jnp.zeros((1, 4, 2, 8), jnp.bfloat16)), TypeError, "key_BSKH has dtype bfloat16 but query_BTNH has float32; cast"),
    (dict(key_BSKH=jnp.zeros((1, 4, 3, 8)), value_BSKP=jnp.zeros((1, 4, 3, 8))), ValueError, "2 query heads are not a multiple of 3 kv"),
    (dict(local_window_size=(3, 0)), TypeError, r"local_window_size=\(3, 0\) must be one integer or None"),
    (dict(local_window_size=-1), ValueError, "local_window_size must be >= 0, got -1"),
    (dict(logits_soft_cap=0.0), ValueError, "logits_soft_cap must be above 0, got 0.0; use None"),
    (dict(scale=jnp.ones(())), TypeError, "scale must be a Python number"),
    (dict(sinks=jnp.zeros(3)), ValueError, r"sinks must have shape \(2,\)"),
    (dict(segment_ids=jnp.zeros((1, 4))), TypeError, "segment_ids must be an integer array, got float32"),
    (dict(kv_positions=jnp.zeros((1, 4), int)), ValueError, "kv_positions was given without positions; give both"),
    (dict(key_BSKH=jnp.zeros((1, 5, 2, 8)), value_BSKP=jnp.zeros((1, 5, 2, 8)), segment_ids=jnp.ones((1, 4), int)), ValueError,
     "segment_ids was given for T=4 queries but there are S=5 keys; give kv_segment_ids"),
    (dict(implementation="cudnn"), ValueError, "implementation='cudnn' is unknown; expected None or one of reference, xla"),
    (dict(implementation="xla", interpret=True), ValueError, "only a Pallas kernel can be interpreted"),
])
def test_bad_input_is_refused(change, error, message):
    x = jnp.zeros((1, 4, 2, 8))
    arrays = {name: change.get(name, x) for name in ("query_BTNH", "key_BSKH", "value_BSKP")}
    with pytest.raises(error, match=message):
        flash_attention(*arrays.values(), **{k: v for k, v in change.items() if k not in arrays})

"""Attention's gradients on a TPU, interpreted: against the float64 reference, no further from it than twice a naive implementation."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import flash_attention
from pallas_kernels.flash_attention import tpu_backward, tpu_backward_kernel
from pallas_kernels.flash_attention.mask import Index, Spec, sides, visible
from tests.numerics import assert_as_accurate, assert_close, relative_rms
from tests.pallas_kernels.common import assert_float32_products, assert_no_races

NAMES = ("dq", "dk", "dv", "dsinks")


def normal(seed, shape, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def packed(B, T, parts=4):
    """Documents of uneven length, padding at the end, another layout in each row."""
    ends = [np.linspace(0, T - 3, parts + 1)[1:].astype(int) - 2 * b for b in range(B)]
    return np.array([[int(np.searchsorted(e, t, side="right")) + 1 if t < e[-1] else 0 for t in range(T)] for e in ends], np.int32)


@pytest.fixture
def blocks(monkeypatch):
    """Small blocks, so that short sequences have many: blocks(span, q, kv). Key blocks of 256 are cut in two on the edge of a mask."""
    monkeypatch.setattr(tpu_backward_kernel, "EDGE", 128)
    return lambda *size: monkeypatch.setattr(tpu_backward, "blocks", lambda *_: tpu_backward.Blocks(*size))


def naive(q, k, v, sinks, mask):
    """softmax in one piece, in the inputs' dtype. The mask is [1 or B, T, S]."""
    q = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
    s = jnp.einsum("btkgh,bskh->bkgts", q, k) * q.shape[-1] ** -0.5
    if mask["cap"]:
        s = mask["cap"] * jnp.tanh(s / mask["cap"])
    see = mask["see"][:, None, None]
    s = jnp.where(see, s, -1e9)
    seen = see.any(-1, keepdims=True)
    top = jnp.where(seen, s.max(-1, keepdims=True), 0)
    e = jnp.where(see, jnp.exp(s - top), 0)
    total = e.sum(-1, keepdims=True)
    if sinks is not None:
        total += jnp.exp(sinks.astype(s.dtype).reshape(1, k.shape[2], -1, 1, 1) - top)
    total = jnp.where(seen, total, 1)
    lse = jnp.where(seen, top + jnp.log(total), -jnp.inf)[..., 0]
    out = jnp.einsum("bkgts,bskp->btkgp", (e / total).astype(v.dtype), v)
    return out.reshape(*out.shape[:2], -1, v.shape[3]), lse.transpose(0, 3, 1, 2).reshape(*out.shape[:2], -1)


def gradients(f, args, projections):
    """Of a random projection of the output, and of the logsumexp where it is finite."""
    def scalar(*args):
        out, lse = f(*args)
        dtype = jnp.promote_types(out.dtype, jnp.float32)
        lse = jnp.where(jnp.isinf(lse), 0, lse).astype(dtype)
        return (projections[0].astype(dtype) * out.astype(dtype)).sum() + (projections[1].astype(dtype) * lse).sum()

    return jax.grad(scalar, tuple(i for i, x in enumerate(args) if x is not None))(*args)


# name: (B, T, S, N, K, H, P, dtype, blocks, options). A name that starts with "more" runs with the slow tests.
F32, BF16 = jnp.float32, jnp.bfloat16
CASES = {
    "one": (1, 1, 1, 2, 1, 16, 16, F32, None, {}),
    "direct": (1, 300, 300, 2, 2, 80, 64, F32, (384, 128, 128), {"sinks": True}),
    "more_spans_bfloat16": (1, 500, 500, 4, 2, 64, 64, BF16, (256, 128, 128), {}),
    "more_both_ways_longer_keys": (2, 129, 300, 2, 1, 24, 136, F32, (128, 128, 256), {"is_causal": False, "logits_soft_cap": 2.0}),
    "window_global": (1, 500, 300, 2, 2, 16, 16, F32, (256, 128, 256), {"local_window_size": 60, "global_tokens": 5, "sinks": True}),
    "more_split_heads": (1, 257, 257, 4, 1, 16, 16, F32, (128, 128, 128), {}),
    "packed": (2, 300, 300, 2, 2, 16, 16, F32, (128, 128, 128), {"segments": True, "local_window_size": 40, "global_tokens": 2}),
    "more_permuted": (1, 300, 300, 4, 2, 16, 24, F32, (128, 128, 128), {"segments": True, "permuted": True, "local_window_size": 90}),
    "more_spans_split": (1, 500, 500, 1, 1, 16, 16, F32, (256, 128, 128), {}),
    "more_positions": (2, 300, 300, 2, 2, 16, 16, BF16, (256, 128, 128), {"permuted": True}),
    "more_permuted_both_ways": (2, 300, 300, 2, 2, 16, 16, F32, (384, 128, 128),
                                {"permuted": True, "segments": True, "is_causal": False, "local_window_size": 30, "global_tokens": 2}),
    "more_packed_cap": (2, 300, 300, 4, 1, 16, 16, F32, (256, 128, 128), {"segments": True, "sinks": True, "logits_soft_cap": 3.0}),
    "more_window_both_ways": (1, 700, 500, 2, 1, 16, 16, F32, (256, 128, 256),
                              {"is_causal": False, "local_window_size": 100, "global_tokens": 140}),
    "more_keys_past_queries": (1, 300, 900, 2, 1, 16, 16, F32, (256, 128, 128), {}),
    "more_window_zero": (1, 300, 300, 1, 1, 16, 16, F32, (128, 128, 128), {"local_window_size": 0, "sinks": True}),
    "more_queries_past_keys": (1, 500, 131, 2, 1, 16, 16, F32, (256, 128, 128), {"local_window_size": 50}),
    **{f"more_length_{T}": (1, T, T, 2, 1, 64, 64, F32, None, {}) for T in (63, 64, 100, 127, 128, 129, 500, 1000, 2000)},
    **{f"more_head_{H}_{dtype.__name__}": (1, 257, 257, 2, 1, H, H, dtype, (128, 128, 128), {})
       for H in (16, 64, 80, 96, 128, 192, 256) for dtype in (F32, BF16)},
}


def problem(name):
    """(arrays, projections, keyword arguments, mask for the naive form)."""
    B, T, S, N, K, H, P, dtype, size, options = CASES[name]
    shapes = ((B, T, N, H), (B, S, K, H), (B, S, K, P))
    arrays = [jnp.asarray(normal(i, s)).astype(dtype) for i, s in enumerate(shapes)]
    options = dict(options)
    arrays.append(jnp.asarray(normal(3, (N,))) if options.pop("sinks", False) else None)
    segments = packed(B, T) if options.pop("segments", False) else None
    positions = kv_positions = None
    if options.pop("permuted", False):
        shuffle = np.random.default_rng(4).permutation(T).astype(np.int32)
        segments = None if segments is None else segments[:, shuffle]
        positions = np.broadcast_to(shuffle, (B, T))
        kv_positions = np.where(np.arange(T) % 7 == 3, -1, positions)
        options |= {"positions": jnp.asarray(positions), "kv_positions": jnp.asarray(kv_positions)}
    if segments is not None:
        options["segment_ids"] = jnp.asarray(segments)
    spec = Spec(options.get("is_causal", True), options.get("local_window_size"), options.get("global_tokens", 0), None, 1.0)
    see = visible(*sides(Index(segments, segments, positions, kv_positions), T, S, spec), spec)
    mask = {"see": jnp.atleast_3d(see) if see.ndim == 3 else see[None], "cap": options.get("logits_soft_cap")}
    projections = (normal(8, (B, T, N, P)), normal(9, (B, T, N)))
    return arrays, projections, options, mask, size


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * n.startswith("more")) for n in CASES])
def test_gradients_equal_the_float64_reference(name, blocks):
    arrays, projections, options, mask, size = problem(name)
    if size:
        blocks(*size)
    # The output's cotangent in the inputs' dtype, as a layer above would send it.
    projections = (np.asarray(jnp.asarray(projections[0]).astype(arrays[0].dtype).astype(jnp.float32)), projections[1])

    def run(implementation, args, projections):
        f = lambda q, k, v, s: flash_attention(q, k, v, sinks=s, return_residual=True, implementation=implementation, **options)  # noqa: E731
        return jax.jit(lambda args: gradients(f, args, projections))(args)

    got = run("pallas_tpu", arrays, projections)
    plain = jax.jit(lambda args: gradients(functools.partial(naive, mask=mask), args, projections))(arrays)
    with jax.enable_x64(True):
        wide = [None if x is None else jnp.asarray(np.asarray(x, np.float64)) for x in arrays]
        want = [np.asarray(x) for x in run("reference", wide, [np.float64(x) for x in projections])]
    for what, g, w, p in zip(NAMES, got, want, plain):
        assert np.isfinite(np.asarray(g, np.float32)).all(), what
        assert_as_accurate(what, g, w, p, gradient=True, floor=2**-8 * float(np.sqrt(np.mean(w**2)) + 1e-3))


@functools.cache
def kernel(spec, interpret, size):
    """The kernel by itself, from a forward pass in jnp. `size` is what the blocks were set to: what is compiled depends on it."""
    def run(index, q, k, v, do):
        see = visible(*sides(index, q.shape[1], k.shape[1], spec), spec)
        out, lse = naive(q, k, v, None, {"see": see if see.ndim == 3 else see[None], "cap": None})
        return tpu_backward.backward(spec, q, k, v, index, lse, do, (out * do).sum(-1), interpret)

    return jax.jit(run)


NO_INDEX = Index()


def direct(spec, arrays, index=NO_INDEX, interpret=True):
    size = tpu_backward.blocks(arrays[0].shape[1], arrays[1].shape[1], 128, 128, arrays[0].dtype)
    return kernel(spec, interpret, size)(index, *arrays)


def spec_of(**changes):
    return Spec(**({"is_causal": True, "window": None, "global_tokens": 0, "soft_cap": None, "scale": 0.25} | changes))


def some(B, T, N, K, H):
    return [jnp.asarray(normal(i, s)) for i, s in enumerate(((B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H)))]


@pytest.mark.parametrize("N", [pytest.param(2, marks=pytest.mark.slow), 4])  # sums kept on chip, and in HBM
def test_rows_that_see_nothing_have_exactly_zero_gradients(N, blocks):
    blocks(256, 128, 128)
    segment = jnp.where(jnp.arange(200) < 130, 1, 0)[None]
    dq, dk, dv = direct(spec_of(), some(1, 200, N, 2, 16), Index(segment, segment))
    for grad in (dq, dk, dv):
        assert (grad[:, 130:] == 0).all() and jnp.isfinite(grad).all() and (grad[:, :130] != 0).any()
    nothing = jnp.zeros((1, 200), jnp.int32)
    for grad in direct(spec_of(), some(1, 200, N, 2, 16), Index(nothing, nothing)):
        assert (grad == 0).all()


def test_two_runs_are_bitwise_equal_and_vmap_is_a_longer_batch(blocks):
    blocks(128, 128, 128)
    arrays = some(2, 200, 2, 1, 16)
    segment = jnp.asarray(packed(1, 200))
    index = Index(segment, segment)
    lse, delta = jnp.zeros((2, 200, 2)) + 6, jnp.asarray(normal(5, (2, 200, 2)))
    f = lambda index, q, k, v, do, lse, delta: tpu_backward.backward(spec_of(), q, k, v, index, lse, do, delta, True)  # noqa: E731
    rows = [x[:, None] for x in (*arrays, lse, delta)]
    alone = [jax.jit(f)(index, *(x[i] for x in rows)) for i in (0, 1, 0)]
    together = jax.jit(jax.vmap(f, in_axes=(None, *[0] * 6)))(index, *rows)
    for n in range(3):
        np.testing.assert_array_equal(alone[0][n], alone[2][n])
        for i in range(2):
            assert_close("vmap", together[n][i], alone[i][n], 1e-6)


def test_float32_is_multiplied_as_float32():
    q, k, v, do = some(1, 300, 2, 1, 16)
    row = jnp.zeros((1, 300, 2))
    traced = jax.make_jaxpr(lambda *a: tpu_backward.backward(spec_of(), *a, False))(q, k, v, Index(), row, do, row)
    assert_float32_products(traced.jaxpr, at_least=10)  # five products, masked and not


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_blocks_cover_and_align(dtype):
    for T, S, H, P in ((1, 1, 128, 128), (1000, 300, 128, 256), (5000, 5000, 256, 256), (131072, 131072, 128, 128)):
        size = tpu_backward.blocks(T, S, H, P, dtype)
        assert size.q % 128 == 0 and size.kv % 128 == 0 and size.span % size.q == 0
        assert size.span - size.q < T and size.kv - 128 < S


RACE = """
    import jax, jax.numpy as jnp, numpy as np
    from jax.experimental.pallas import tpu as pltpu
    from pallas_kernels.flash_attention import tpu_backward
    from pallas_kernels.flash_attention.mask import Index
    from tests.pallas_kernels import test_flash_attention_tpu_backward as here
    jax.config.update("jax_enable_compilation_cache", False)
    tpu_backward.blocks = lambda *_: tpu_backward.Blocks(128, 128, 128)
    poisoned = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", num_cores_or_threads=2)
    segment = jnp.asarray(here.packed(1, 200))
    # Two query heads per kv head and two spans: sums in HBM. One kv block: what is read next is still being written.
    for T, index in ((200, Index(segment, segment)), (100, Index())):
        arrays = here.some(1, T, 4, 2, 16)
        got, want = (here.direct(here.spec_of(), arrays, index, interpret) for interpret in (poisoned, True))
        for g, w in zip(got, want):
            np.testing.assert_array_equal(g, w)
"""


@pytest.mark.subprocess
def test_no_races_and_nothing_uninitialised():
    assert_no_races(RACE)


def aot_cases():
    """What has to compile for a TPU: {"production" or "odd": {name: (f, shapes)}}."""
    def case(B, T, S, N, K, H, P, dtype=BF16, segmented=False, positioned=False, **changes):
        shape, ints = jax.ShapeDtypeStruct, jnp.int32
        fields = ((segmented, T), (segmented, S), (positioned, T), (positioned, S))
        index = Index(*(shape((B, n), ints) if given else None for given, n in fields))
        f = functools.partial(tpu_backward.backward, spec_of(scale=H**-0.5, **changes), interpret=False)
        row = shape((B, T, N), F32)
        return f, (shape((B, T, N, H), dtype), shape((B, S, K, H), dtype), shape((B, S, K, P), dtype), index, row,
                   shape((B, T, N, P), dtype), row)

    odd = {
        "one": case(1, 1, 1, 2, 1, 16, 16, F32),
        "63": case(2, 63, 63, 4, 2, 24, 24),
        "100_to_129": case(1, 100, 129, 2, 2, 80, 96, is_causal=False),
        "1000_96": case(1, 1000, 1000, 4, 1, 96, 96, window=100, global_tokens=3),
        "129_256_float32": case(1, 129, 129, 1, 1, 256, 256, F32, soft_cap=30.0),
        "2000_float32": case(1, 2000, 2000, 2, 2, 128, 128, F32, segmented=True),
        "4096_256": case(1, 4096, 4096, 2, 1, 256, 256, segmented=True, positioned=True, window=500, global_tokens=4),
        "4096_256_float32": case(1, 4096, 4096, 2, 1, 256, 256, F32),
        "4096_256_float32_all": case(
            1, 4096, 4096, 2, 1, 256, 256, F32, segmented=True, positioned=True, window=500, global_tokens=4, soft_cap=9.0),
        "192_to_128": case(2, 5000, 4100, 8, 2, 192, 128, positioned=True),
        "single_head": case(1, 8192, 8192, 1, 1, 64, 64, window=1024),
        "131072": case(1, 131072, 131072, 2, 1, 128, 128, window=4096, global_tokens=128),
    }
    production = {"bfloat16_grouped": case(1, 4096, 4096, 16, 4, 128, 128), "packed": case(2, 4096, 4096, 8, 8, 128, 128, segmented=True)}
    return {"production": production, "odd": odd}


@pytest.mark.slow
def test_error_is_measured_against_what_it_says():
    """The tolerance would notice one visible key left out of 257."""
    q, k, v, do = some(1, 257, 1, 1, 16)
    whole = direct(spec_of(), (q, k, v, do))
    less = direct(spec_of(window=255), (q, k, v, do))
    assert all(relative_rms(x, y) > 1e-5 for x, y in zip(less, whole))

"""Attention's forward kernel on a TPU, interpreted, and its visible ranges: against the float64 reference and against brute force."""
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import flash_attention
from pallas_kernels.flash_attention import ranges, tpu, tpu_forward
from pallas_kernels.flash_attention.mask import Index, Spec, sides, visible
from tests.numerics import assert_as_accurate, assert_close, relative_rms
from tests.pallas_kernels.common import assert_float32_products, assert_no_races

F32, BF16 = jnp.float32, jnp.bfloat16


def normal(seed, shape, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def packed(B, T, parts=4):
    """Documents of uneven length, padding at the end, another layout in each row."""
    ends = [np.linspace(0, T - 3, parts + 1)[1:].astype(int) - 2 * b for b in range(B)]
    return np.array([[int(np.searchsorted(e, t, side="right")) + 1 if t < e[-1] else 0 for t in range(T)] for e in ends], np.int32)


@pytest.fixture
def blocks(monkeypatch):
    """Small blocks, so that short sequences have many: blocks(q, kv, keys, part_q, part_kv, sub)."""
    return lambda *size: monkeypatch.setattr(tpu_forward, "blocks", lambda *_: tpu_forward.Blocks(*size))


def spec_of(**changes):
    return Spec(**({"is_causal": True, "window": None, "global_tokens": 0, "soft_cap": None, "scale": 0.25} | changes))


# Visible ranges.


NO_INDEX = Index()


def check_ranges(T, S, spec, block_q, block_kv, index=NO_INDEX, B=1):
    """Every visible tile is visited once, and the tests of tiles tell the truth."""
    plan, tables = ranges.make(index, T, S, spec, block_q, block_kv)
    tables = ranges.Tables(*map(jnp.asarray, tables))
    see = np.broadcast_to(visible(*sides(index, T, S, spec), spec), (B, T, S))
    nq, nk = plan.q_blocks, plan.kv_blocks
    tiles = np.zeros((B, nq * block_q, nk * block_kv), bool)
    tiles[:, :T, :S] = see
    tiles = tiles.reshape(B, nq, block_q, nk, block_kv).swapaxes(2, 3)
    some, all_rows = tiles.any((3, 4)), tiles.all((3, 4))
    below_T = (np.arange(nq * block_q) < T).reshape(nq, 1, block_q, 1)
    all_real = (tiles | ~below_T).all((3, 4))
    b, i, j = np.ogrid[:B, :nq, :nk]
    most = ranges.grid_steps(plan, tables)
    for needed, number, block, steps, rows in ((some, ranges.kv_steps, ranges.kv_block, int(most[0]), i),
                                               (some.swapaxes(1, 2), ranges.q_steps, ranges.q_block, int(most[1]), j.swapaxes(1, 2))):
        count = np.broadcast_to(number(plan, tables, b, rows), np.broadcast_shapes(b.shape, rows.shape))
        blocks = np.asarray(block(plan, tables, b, rows, np.arange(steps + 2)))
        assert count.max() <= steps and (0 <= blocks).all() and (blocks < needed.shape[2]).all()
        visits = np.zeros((B, *needed.shape[1:]), int)
        live = np.broadcast_to(np.arange(steps + 2) < count, (B, needed.shape[1], steps + 2))
        np.add.at(visits, (*np.nonzero(live)[:2], np.broadcast_to(blocks, live.shape)[live]), 1)
        assert (visits <= 1).all() and (visits[needed] == 1).all()
        if plan.static and number is ranges.kv_steps:
            np.testing.assert_array_equal(visits == 1, needed)
        if plan.static:
            assert (count[..., 0] > 0).tolist() == needed.any(-1).tolist()[:1] * (B if plan.batched else 1)
    empty, full, full_rows = (np.broadcast_to(x, some.shape) for x in (
        ranges.part_is_empty(plan, tables, b, i, j), ranges.tile_is_full(plan, tables, b, i, j),
        ranges.tile_is_full(plan, tables, b, i, j, rows=True)))
    assert not (empty & some).any() and not (full & ~all_real).any() and not (full_rows & ~all_rows).any()
    if plan.static and not spec.global_tokens:
        np.testing.assert_array_equal(full, all_real)
        np.testing.assert_array_equal(empty, ~some)


@pytest.mark.parametrize("T, S, sizes", [(61, 61, (8, 16)), (61, 40, (16, 8)), (40, 61, (8, 8))])
def test_static_ranges_equal_brute_force(T, S, sizes):
    for causal in (True, False):
        for window, first in ((None, 0), (0, 0), (9, 0), (20, 3), (5, 18)):
            check_ranges(T, S, spec_of(is_causal=causal, window=window, global_tokens=first), *sizes)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_static_ranges_equal_brute_force_anywhere(seed):
    draw = np.random.default_rng(seed)
    for _ in range(4):
        T, S, window, first = (int(draw.integers(low, high)) for low, high in ((1, 70), (1, 70), (0, 40), (0, 12)))
        causal, window = bool(draw.integers(2)), None if draw.integers(3) == 0 else window
        spec = spec_of(is_causal=causal, window=window, global_tokens=first * int(draw.integers(2)))
        check_ranges(T, S, spec, *(int(x) for x in draw.choice([4, 8, 16], 2)))


@pytest.mark.parametrize(
    "segmented, positioned", [(True, True), *(pytest.param(*c, marks=pytest.mark.slow) for c in ((True, False), (False, True)))]
)
def test_dynamic_ranges_cover_brute_force(segmented, positioned):
    for seed in range(2 + positioned):
        draw = np.random.default_rng(seed)
        B, T, S = 2, 61, 40
        index = [None] * 4
        if segmented:
            index[:2] = (jnp.asarray(np.sort(draw.integers(-1, 4, (B, n)), -1)) for n in (T, S))
        if positioned:
            index[2:] = (jnp.asarray(np.stack([draw.permutation(n) for _ in range(B)])) for n in (T, S))
            index[3] = jnp.where(index[3] % 7 == 3, -1, jnp.sort(index[3]) if seed else index[3])
        spec = spec_of(is_causal=seed != 1, window=None if seed == 2 else 9, global_tokens=2 * seed)
        check_ranges(T, S, spec, 8, 16, Index(*index), B)


def test_ranges_of_long_sequences_are_quick_and_small():
    for changes in ({}, {"window": 4096, "global_tokens": 100}, {"is_causal": False, "window": 4096}):
        start = time.perf_counter()
        _, tables = ranges._static.__wrapped__(131072, 131072, spec_of(**changes), 512, 512)
        assert time.perf_counter() - start < 0.1
        assert sum(x.size for x in tables) <= 4 * 131072 // 512 + 2


# Values.


def naive(q, k, v, sinks, mask):
    """softmax in one piece, in the inputs' dtype. The mask is [1 or B, T, S]."""
    q = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
    s = jnp.einsum("btkgh,bskh->bkgts", q, k) * q.shape[-1] ** -0.5
    if mask["cap"]:
        s = mask["cap"] * jnp.tanh(s / mask["cap"])
    see = mask["see"][:, None, None]
    s = jnp.where(see, s, -1e9)
    top = jnp.maximum(s.max(-1, keepdims=True), -1e8)
    e = jnp.where(see, jnp.exp(s - top), 0)
    total = e.sum(-1, keepdims=True)
    if sinks is not None:
        total += jnp.exp(sinks.astype(s.dtype).reshape(1, k.shape[2], -1, 1, 1) - top)
    total = jnp.where(see.any(-1, keepdims=True), total, 1)
    lse = jnp.where(see.any(-1, keepdims=True), top + jnp.log(total), -jnp.inf)[..., 0]
    out = jnp.einsum("bkgts,bskp->btkgp", (e / total).astype(v.dtype), v)
    return out.reshape(*out.shape[:2], -1, v.shape[3]), lse.transpose(0, 3, 1, 2).reshape(*out.shape[:2], -1)


# name: (B, T, S, N, K, H, P, dtype, blocks, options). A name that starts with "more" runs with the slow tests.
SMALL = (256, 256, 128, 128, 128, 128)  # two chunks in a block
CORNER = (256, 512, 256, 128, 128, 128)  # four parts of a chunk, two sub-chunks
WIDE = (512, 1024, 512, 256, 512, 256)  # sub-chunks of more keys than a register has lanes
CASES = {
    "one": (1, 1, 1, 1, 1, 16, 16, F32, None, {}),
    "diagonal": (1, 600, 600, 2, 2, 80, 64, F32, CORNER, {"sinks": True}),
    "more_diagonal_wide": (1, 1100, 1100, 1, 1, 16, 16, F32, WIDE, {}),
    "grouped_bfloat16": (1, 500, 500, 4, 2, 64, 64, BF16, SMALL, {}),
    "both_ways_longer_keys": (1, 129, 300, 2, 1, 24, 136, F32, SMALL, {"is_causal": False, "logits_soft_cap": 2.0}),
    "window_global": (1, 700, 500, 2, 2, 16, 16, F32, SMALL, {"local_window_size": 60, "global_tokens": 5, "sinks": True}),
    "packed": (2, 300, 300, 2, 2, 16, 16, F32, SMALL, {"segments": True, "local_window_size": 140, "global_tokens": 2}),
    "permuted": (1, 300, 300, 4, 2, 16, 24, F32, SMALL, {"segments": True, "permuted": True, "local_window_size": 90}),
    "heads_in_one_block": (1, 100, 100, 2, 1, 16, 16, F32, SMALL, {}),
    "decode": (2, 1, 300, 8, 2, 64, 64, F32, (16, 256, 256, 16, 128, 128), {"ring": True, "sinks": True}),
    "more_decode_bfloat16": (2, 3, 129, 4, 1, 64, 80, BF16, None, {"is_causal": False}),
    "more_decode_heads": (2, 1, 500, 4, 4, 96, 96, BF16, None, {"ring": True}),
    "more_few_queries": (2, 9, 50, 8, 2, 64, 64, F32, None, {"local_window_size": 5, "sinks": True}),
    "more_positions": (2, 300, 300, 2, 2, 16, 16, BF16, SMALL, {"permuted": True}),
    "more_permuted_both_ways": (2, 300, 300, 2, 2, 16, 16, F32, SMALL,
                                {"permuted": True, "segments": True, "is_causal": False, "local_window_size": 30, "global_tokens": 2}),
    "more_packed_corner": (2, 600, 600, 4, 1, 16, 16, F32, CORNER, {"segments": True, "sinks": True, "logits_soft_cap": 3.0}),
    "more_window_both_ways": (1, 700, 500, 2, 1, 16, 16, F32, SMALL, {"is_causal": False, "local_window_size": 100, "global_tokens": 140}),
    "more_window_corner": (1, 700, 700, 2, 1, 16, 16, F32, CORNER, {"local_window_size": 300, "global_tokens": 7}),
    "more_window_zero": (1, 300, 300, 1, 1, 16, 16, F32, SMALL, {"local_window_size": 0, "sinks": True}),
    "more_queries_past_keys": (1, 500, 131, 2, 1, 16, 16, F32, SMALL, {"local_window_size": 50}),
    **{f"more_length_{T}": (1, T, T, 2, 1, 64, 64, F32, None, {}) for T in (63, 64, 100, 127, 128, 129, 500, 1000, 2000)},
    **{f"more_head_{H}_{dtype.__name__}": (1, 257, 257, 2, 1, H, H, dtype, SMALL, {})
       for H in (16, 64, 80, 96, 128, 192, 256) for dtype in (F32, BF16)},
}


def problem(name):
    """(arrays, keyword arguments, mask for the naive form, blocks)."""
    B, T, S, N, K, H, P, dtype, size, options = CASES[name]
    arrays = [jnp.asarray(normal(i, s)).astype(dtype) for i, s in enumerate(((B, T, N, H), (B, S, K, H), (B, S, K, P)))]
    options = dict(options)
    arrays.append(jnp.asarray(normal(3, (N,))) if options.pop("sinks", False) else None)
    segments = packed(B, T) if options.pop("segments", False) else None
    positions = kv_positions = None
    if options.pop("permuted", False):
        shuffle = np.random.default_rng(4).permutation(T).astype(np.int32)
        segments = None if segments is None else segments[:, shuffle]
        positions = np.broadcast_to(shuffle, (B, T))
        kv_positions = np.where(np.arange(T) % 7 == 3, -1, positions)
    if options.pop("ring", False):  # slots in any order, some empty
        slots = np.random.default_rng(4).permutation(S).astype(np.int32)
        positions, kv_positions = np.full((B, T), S - 20, np.int32), np.broadcast_to(np.where(slots <= S - 20, slots, -1), (B, S))
    if positions is not None:
        options |= {"positions": jnp.asarray(positions), "kv_positions": jnp.asarray(kv_positions)}
    if segments is not None:
        options["segment_ids"] = jnp.asarray(segments)
    window, first = options.get("local_window_size"), options.get("global_tokens", 0)
    spec = spec_of(is_causal=options.get("is_causal", True), window=window, global_tokens=first)
    see = visible(*sides(Index(segments, segments, positions, kv_positions), T, S, spec), spec)
    return arrays, options, {"see": see if see.ndim == 3 else see[None], "cap": options.get("logits_soft_cap")}, size


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * n.startswith("more")) for n in CASES])
def test_values_equal_the_float64_reference(name, blocks):
    arrays, options, mask, size = problem(name)
    if size:
        blocks(*size)

    def run(implementation, args):
        f = lambda q, k, v, s: flash_attention(q, k, v, sinks=s, return_residual=True, implementation=implementation, **options)  # noqa: E731
        return jax.jit(f)(*args)

    got = run("pallas_tpu", arrays)
    plain = jax.jit(functools.partial(naive, mask=mask))(*arrays)
    with jax.enable_x64(True):
        want = [np.asarray(x) for x in run("reference", [None if x is None else jnp.asarray(np.asarray(x, np.float64)) for x in arrays])]
    seen = np.isfinite(want[1])
    assert got[0].dtype == arrays[0].dtype and got[1].dtype == F32
    assert (np.isfinite(got[1]) == seen).all() and (np.asarray(got[0], np.float32)[~seen] == 0).all()
    assert_as_accurate("out", *(x if x.dtype == BF16 else np.asarray(x) for x in (got[0], want[0], plain[0])), floor=1e-3)
    # Of bfloat16 inputs, logsumexp is as accurate as they are: the scaled queries are rounded once more.
    cast = (lambda x: jnp.asarray(x, BF16)) if arrays[0].dtype == BF16 else np.asarray
    lse, exact, plain_lse = (np.where(seen, np.asarray(x[1], np.float64), 0) for x in (got, want, plain))
    assert_as_accurate("lse", cast(lse.astype(np.float32)), exact, plain_lse, floor=1e-2)


@functools.cache
def attend(spec, size, interpret=True):
    """The forward kernel by itself; `size` is what the blocks were set to: what is compiled depends on it."""
    return jax.jit(lambda index, *arrays: tpu_forward.forward(spec, *arrays, index, None, interpret))


def some(B, T, N, K, H):
    return [jnp.asarray(normal(i, s)) for i, s in enumerate(((B, T, N, H), (B, T, K, H), (B, T, K, H)))]


def test_tiles_that_nobody_sees_are_not_visited(blocks):
    """A NaN times zero is a NaN, so the values of a visited tile would show."""
    blocks(128, 128, 128, 128, 128, 128)
    q, k, v = some(1, 512, 1, 1, 16)
    blind = v.at[:, 256:].set(jnp.nan), v.at[:, :128].set(jnp.nan)
    out, _ = attend(spec_of(), SMALL)(Index(), q, k, blind[0])
    assert jnp.isfinite(out[:, :256]).all() and jnp.isnan(out[:, 256:]).all()
    out, _ = attend(spec_of(window=100), SMALL)(Index(), q, k, blind[1])
    assert jnp.isfinite(out[:, 256:]).all() and jnp.isnan(out[:, :128]).all()
    segment = jnp.where(jnp.arange(512) < 256, 1, 2)[None]
    out, _ = attend(spec_of(is_causal=False), SMALL)(Index(segment, segment), q, k, blind[0])
    assert jnp.isfinite(out[:, :256]).all()


def test_two_runs_are_bitwise_equal_and_vmap_is_a_longer_batch(blocks):
    blocks(*SMALL)
    rows = [x[:, None] for x in some(2, 300, 2, 1, 16)]
    segment = jnp.asarray(packed(1, 300))
    f = lambda q, k, v: flash_attention(q, k, v, segment_ids=segment, implementation="pallas_tpu")  # noqa: E731
    run = jax.jit(f)
    alone = [run(*(x[i] for x in rows)) for i in (0, 1, 0)]
    np.testing.assert_array_equal(alone[0], alone[2])
    together = jax.jit(jax.vmap(f))(*rows)
    for i in range(2):
        assert_close("vmap", together[i], alone[i], 1e-6)


def test_residuals_merge():
    """Two halves of the keys, merged by their residuals, are the whole: what a ring of chips does."""
    q, k, v = some(1, 140, 2, 1, 16)
    f = lambda k, v, p: flash_attention(q, k, v, positions=jnp.arange(140)[None], kv_positions=p[None], return_residual=True,  # noqa: E731
                                        implementation="pallas_tpu")
    parts = [jax.jit(f)(k[:, s], v[:, s], jnp.arange(140)[s]) for s in (slice(0, 70), slice(70, 140))]
    lse = jnp.logaddexp(parts[0][1], parts[1][1])
    merged = sum(out * jnp.exp(part - lse)[..., None] for out, part in parts)
    want = flash_attention(q, k, v, return_residual=True, implementation="reference")
    assert_close("out", merged, want[0], 1e-6)
    assert_close("lse", lse, want[1], 1e-6)


def test_float32_is_multiplied_as_float32():
    traced = jax.make_jaxpr(lambda *a: tpu_forward.forward(spec_of(window=300), *a, Index(), None, False))(*some(1, 700, 2, 1, 16))
    assert_float32_products(traced.jaxpr, at_least=4)  # two products, masked and not


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_dtypes_are_refused(dtype, x64):
    q, k, v = (x.astype(dtype) for x in some(1, 8, 1, 1, 8))
    with pytest.raises(NotImplementedError, match=rf"flash_attention\[pallas_tpu\]: {np.dtype(dtype).name} is not multiplied on a TPU"):
        flash_attention(q, k, v, implementation="pallas_tpu")
    assert tpu.unsupported(q.astype(F32), k, v, Index(), None, spec_of()) is None


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_blocks_cover_and_align(dtype):
    for rows, S, H, P in ((1, 1, 16, 16), (8, 5000, 128, 128), (1000, 300, 128, 256), (5000, 5000, 256, 256), (131072, 131072, 128, 128)):
        size = tpu_forward.blocks(rows, S, H, P, dtype)
        assert size.q % size.part_q == 0 and size.kv % size.keys == 0 and size.keys % size.part_kv == 0
        assert size.part_kv % size.sub == 0 and size.sub % 128 == 0
        assert size.q % (128 if rows >= 128 else 8) == 0 and size.q < 2 * max(rows, 64) and size.kv < 2 * max(S, 65)


RACE = """
    import jax, jax.numpy as jnp, numpy as np
    from jax.experimental.pallas import tpu as pltpu
    from pallas_kernels.flash_attention import tpu_forward
    from pallas_kernels.flash_attention.mask import Index
    from tests.pallas_kernels import test_flash_attention_tpu as here
    jax.config.update("jax_enable_compilation_cache", False)
    tpu_forward.blocks = lambda *_: tpu_forward.Blocks(*here.SMALL)
    poisoned = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", num_cores_or_threads=2)
    segment = jnp.asarray(here.packed(1, 300))
    for index, changes in ((Index(segment, segment), {}), (Index(), {"window": 90})):
        arrays = here.some(1, 300, 2, 2, 16)
        got, want = (here.attend(here.spec_of(**changes), here.SMALL, interpret)(index, *arrays) for interpret in (poisoned, True))
        for g, w in zip(got, want):
            np.testing.assert_array_equal(g, w)
"""


@pytest.mark.subprocess
def test_no_races_and_nothing_uninitialised():
    assert_no_races(RACE)


def test_error_is_measured_against_what_it_says():
    """The tolerance would notice one visible key left out of 257."""
    arrays = some(1, 257, 1, 1, 16)
    whole, less = (attend(spec_of(window=window), None)(Index(), *arrays) for window in (None, 255))
    assert all(relative_rms(x, y) > 1e-5 for x, y in zip(less, whole))


def aot_cases():
    """What has to compile for a TPU: {"production" or "odd": {name: (f, shapes)}}."""
    def case(B, T, S, N, K, H, P, dtype=BF16, segmented=False, positioned=False, sinks=False, **changes):
        shape, ints = jax.ShapeDtypeStruct, jnp.int32
        fields = ((segmented, T), (segmented, S), (positioned, T), (positioned, S))
        index = Index(*(shape((B, n), ints) if given else None for given, n in fields))
        f = lambda q, k, v, index, sinks: tpu.attend(q, k, v, index, sinks, spec_of(scale=H**-0.5, **changes))  # noqa: E731
        arrays = shape((B, T, N, H), dtype), shape((B, S, K, H), dtype), shape((B, S, K, P), dtype)
        return f, (*arrays, index, shape((N,), F32) if sinks else None)

    odd = {
        "one": case(1, 1, 1, 1, 1, 16, 16, F32),
        "decode": case(4, 1, 1000, 8, 2, 128, 128, positioned=True, sinks=True),
        "decode_heads": case(2, 1, 129, 4, 4, 80, 80),
        "few_float32": case(2, 20, 77, 12, 2, 40, 72, F32, window=5),
        "63_float32": case(2, 63, 63, 4, 2, 24, 24, F32, segmented=True),
        "100_to_129": case(1, 100, 129, 2, 2, 96, 80, is_causal=False, window=17, global_tokens=3),
        "500_all": case(1, 500, 2000, 2, 2, 64, 64, is_causal=False, segmented=True, positioned=True, window=32, global_tokens=1),
        "1000_packed": case(2, 1000, 1000, 4, 2, 192, 128, segmented=True, sinks=True, window=100, global_tokens=4),
        "2000_256_float32": case(1, 2000, 2000, 2, 1, 256, 256, F32, soft_cap=20.0),
        "3000_256_float32_all": case(
            1, 2000, 3000, 2, 1, 256, 256, F32, segmented=True, positioned=True, window=64, global_tokens=4, soft_cap=9.0),
        "4096_256": case(1, 4096, 4096, 2, 1, 256, 256, segmented=True, positioned=True, window=500, global_tokens=4),
        "131072": case(1, 131072, 131072, 2, 1, 128, 128, window=4096, global_tokens=128),
    }
    production = {"grouped": case(1, 4096, 4096, 16, 4, 128, 128), "packed": case(2, 4096, 4096, 8, 8, 128, 128, segmented=True)}
    kinds = (("production", production), ("odd", odd))
    return {kind: {f"attention_forward_{name}": x for name, x in cases.items()} for kind, cases in kinds}

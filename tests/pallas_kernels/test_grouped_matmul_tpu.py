"""The TPU kernels of the grouped matmul, interpreted: against a float64 oracle with every gradient; poison, races, borders, tables."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import grouped_matmul
from pallas_kernels.grouped_matmul import reference, tpu_blocks, tpu_visits
from tests.numerics import assert_as_accurate
from tests.pallas_kernels.common import assert_float32_products, assert_no_races

kernel = functools.partial(grouped_matmul, implementation="pallas_tpu", interpret=True)


@pytest.fixture
def small_blocks(monkeypatch):
    """Many tiles at small sizes: 32 rows in sub-tiles of 16, 128 columns."""
    use_small_blocks(monkeypatch.setattr)


def use_small_blocks(set_attribute):
    set_attribute(tpu_blocks, "SUB", 16)
    set_attribute(tpu_blocks, "row_blocks", lambda M, C, O, *_: (32, min(C, 128), min(O, 128)))
    set_attribute(tpu_blocks, "matrix_blocks", lambda M, K, N, *_: (32, min(K, 128), min(N, 128)))


def operands(sizes, M, K, N, dtype, weights):
    """(lhs, rhs, scale or None, dout), rounded to the dtype. weights: "plain", "turned", "scaled" or "int8"."""
    rng = np.random.default_rng(len(sizes) + M)
    lhs, rhs, dout = (jnp.asarray(rng.standard_normal(s), jnp.float32).astype(dtype) for s in ((M, K), (len(sizes), K, N), (M, N)))
    if weights == "int8":
        rhs = jnp.asarray(rng.integers(-127, 128, rhs.shape), jnp.int8)
    scale = None if weights in ("plain", "turned") else jnp.asarray(rng.standard_normal((len(sizes), N)) / 50, jnp.float32)
    return lhs, rhs, scale, dout


def naive(lhs, rhs, sizes, scale):
    """One masked matmul per expert, in the dtype of lhs."""
    rhs = rhs.astype(lhs.dtype)
    if scale is not None:
        rhs = rhs * scale.astype(lhs.dtype)[:, None]
    ends = jnp.cumsum(sizes)
    row = jnp.arange(lhs.shape[0])[:, None]
    return sum(jnp.where((row >= ends[e] - sizes[e]) & (row < ends[e]), lhs @ rhs[e], 0) for e in range(rhs.shape[0]))


def values_and_gradients(f, lhs, rhs, scale, dout):
    """{name: tensor}: out and the gradient of every float input."""
    inputs = {name: x for name, x in (("lhs", lhs), ("rhs", rhs), ("scale", scale)) if x is not None}
    learned = {name: x for name, x in inputs.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    out, vjp = jax.vjp(lambda learned: f(**{**inputs, **learned}), learned)
    return {"out": out} | {f"d{name}": x for name, x in vjp(dout.astype(out.dtype))[0].items()}


def check(sizes, M, K, N, dtype="float32", weights="plain"):
    """The kernel, with nan in the rows of no expert, against the reference in float64 and beside the naive form."""
    lhs, rhs, scale, dout = operands(sizes, M, K, N, jnp.dtype(dtype), weights)
    used, group_sizes = sum(sizes), jnp.array(sizes, jnp.int32)

    def op(lhs, rhs, scale=None):
        if weights == "turned":
            return kernel(lhs, rhs.swapaxes(1, 2), group_sizes, rhs_layout="ENK")
        return kernel(lhs, rhs, group_sizes, rhs_scale_EN=scale)

    run = jax.jit(functools.partial(values_and_gradients, op))

    got = run(lhs.at[used:].set(jnp.nan), rhs, scale, dout.at[used:].set(jnp.nan))
    wide = [x if x is None or x.dtype == jnp.int8 else x.astype(jnp.float64) for x in (lhs, rhs, scale, dout)]
    of = lambda f: jax.jit(functools.partial(values_and_gradients, lambda lhs, rhs, scale=None: f(lhs, rhs, group_sizes, scale)))  # noqa: E731
    want, plain = of(reference.multiply)(*wide), of(naive)(lhs, rhs, scale, dout)
    for name in want:
        assert got[name].dtype == plain[name].dtype
        assert_as_accurate(name, got[name], want[name], plain[name], gradient=name != "out")
    for name in ("out", "dlhs"):
        assert (np.asarray(got[name], np.float32)[used:] == 0).all(), f"{name}: a row of no expert is not zero"
    for name in got.keys() - {"out", "dlhs"}:
        assert all((np.asarray(got[name], np.float32)[e] == 0).all() for e, size in enumerate(sizes) if size == 0), f"{name}: empty expert"


RAGGED = [100, 0, 33, 64, 3, 31]


@pytest.mark.parametrize("sizes, M, K, N, dtype, weights", [
    (RAGGED, 300, 200, 300, "float32", "plain"),  # odd K and N: masked last blocks of the contractions
    pytest.param(RAGGED, 300, 200, 300, "float32", "turned", marks=pytest.mark.slow),
    (RAGGED, 300, 128, 512, "bfloat16", "turned"),
    (RAGGED, 300, 128, 512, "bfloat16", "plain"),  # two blocks of columns per core: the chain of fetches goes on
    (RAGGED, 300, 200, 140, "float32", "scaled"),
    (RAGGED, 300, 200, 140, "bfloat16", "int8"),
    ([0, 0], 40, 16, 16, "float32", "scaled"),  # nothing to multiply
    ([1], 1, 5, 7, "bfloat16", "plain"),
])
def test_equals_oracle(sizes, M, K, N, dtype, weights, x64, small_blocks):
    check(sizes, M, K, N, dtype, weights)


@pytest.mark.parametrize("sizes, M, K, N, dtype, weights", [
    ([0, 400, 1, 512, 37], 1000, 96, 80, "float32", "plain"),
    pytest.param([63, 0, 1, 0, 0, 64], 129, 192, 256, "bfloat16", "int8", marks=pytest.mark.slow),
])
def test_equals_oracle_with_the_blocks_of_the_chip(sizes, M, K, N, dtype, weights, x64):
    check(sizes, M, K, N, dtype, weights)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("M", [1, 63, 64, 100, 127, 128, 129, 500, 1000, 2000])
def test_lengths(M, dtype, x64):
    rng = np.random.default_rng(M)
    ends = np.sort(rng.integers(0, M + 1, 5))
    check(np.diff(ends, prepend=0).tolist(), M, 64, 48, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_drawn_shapes(seed, x64, small_blocks):
    rng = np.random.default_rng(seed)
    M, E = int(rng.integers(1, 200)), int(rng.integers(1, 9))
    sizes = np.diff(np.sort(rng.integers(0, M + 1, E)), prepend=0) * rng.integers(0, 2, E)
    weights, dtype = rng.choice(["plain", "turned", "scaled", "int8"]), rng.choice(["float32", "bfloat16"])
    check(sizes.tolist(), M, *(int(x) for x in rng.integers(1, 400, 2)), str(dtype), str(weights))


@pytest.mark.parametrize("sizes, M, rows", [([0, 5, 0, 9, 3], 20, 4), ([0, 0, 0], 3, 8), *(
    pytest.param(*c, marks=pytest.mark.slow) for c in (([8, 8], 16, 8), ([1] * 7, 7, 2), ([16], 16, 8)))])
def test_visits_cover_every_row_once(sizes, M, rows):
    """Played in order: each row is stored by one visit, with its expert; tiles are written in order; experts are opened and closed once."""
    visits = jax.tree.map(np.asarray, tpu_visits.row_visits(jnp.array(sizes), M, rows))
    expert = np.repeat([*range(len(sizes)), -1], [*sizes, M - sum(sizes)])
    seen = np.full(M, -2)
    assert (np.diff(visits.out_tile) >= 0).all() and (np.diff(visits.in_tile) >= 0).all() and (np.diff(visits.matrix) >= 0).all()
    for out_tile, in_tile, matrix, start, stop, live, *_ in zip(*visits):
        assert not live or in_tile == out_tile
        for m in range(out_tile * rows + start, min(out_tile * rows + stop, M)):
            assert seen[m] == -2
            seen[m] = matrix if live else -1
    assert (seen == expert).all()
    opening = np.flatnonzero(visits.opens)
    assert visits.matrix[opening].tolist() == [e for e, size in enumerate(sizes) if size]
    assert visits.following[opening].tolist() == [*visits.matrix[opening][1:], -1][: len(opening)]
    assert visits.turn[opening].tolist() == [i % 2 for i in range(len(opening))] and (visits.experts == len(opening)).all()
    assert not sum(sizes) or (visits.turn == visits.turn[opening[np.cumsum(visits.opens) - 1]]).all()

    visits = jax.tree.map(np.asarray, tpu_visits.matrix_visits(jnp.array(sizes), M, rows))
    assert [visits.matrix[i] for i in np.flatnonzero(visits.first)] == list(range(len(sizes)))
    assert [visits.matrix[i] for i in np.flatnonzero(visits.last)] == list(range(len(sizes)))
    rows_of = [[] for _ in sizes]
    for tile, matrix, start, stop, *_ in zip(*visits):
        rows_of[matrix] += range(tile * rows + start, tile * rows + stop)
    assert rows_of == [np.flatnonzero(expert == e).tolist() for e in range(len(sizes))]


def test_two_runs_are_bitwise_equal_and_vmap_is_one_problem_after_the_other(small_blocks):
    lhs, rhs, _, _ = operands([5, 30], 40, 20, 24, jnp.float32, "plain")
    sizes = jnp.array([[5, 30], [12, 3]], jnp.int32)
    both = jnp.stack([rhs, 2 * rhs])
    grad = jax.grad(lambda x, w, g: (kernel(x, w, g) ** 2).sum(), (0, 1))
    together = jax.jit(jax.vmap(grad, (None, 0, 0)))(lhs, both, sizes)
    of_sum = jax.jit(jax.grad(lambda x, w: (jax.vmap(kernel, (None, 0, 0))(x, w, sizes) ** 2).sum(), (0, 1)))(lhs, both)
    alone = jax.jit(grad)
    for i in range(2):
        for one, two, vmapped in zip(alone(lhs, both[i], sizes[i]), alone(lhs, both[i], sizes[i]), together):
            assert (np.asarray(one) == np.asarray(two)).all()
            np.testing.assert_allclose(one, vmapped[i], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(of_sum[1], together[1], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("weights", ["plain", "int8"])
def test_float32_is_multiplied_as_float32(weights):
    lhs, rhs, scale, dout = operands([5, 30], 40, 20, 24, jnp.float32, weights)
    f = lambda lhs, rhs, scale=None: kernel(lhs, rhs, jnp.array([5, 30]), rhs_scale_EN=scale)  # noqa: E731
    traced = jax.make_jaxpr(functools.partial(values_and_gradients, f))(lhs, rhs, scale, dout)
    assert_float32_products(traced.jaxpr, at_least=6)  # three kernels, each with a whole and a cut tile


RACES = """
import jax, jax.numpy as jnp, numpy as np
from jax.experimental.pallas import tpu as pltpu
from tests.pallas_kernels import test_grouped_matmul_tpu as t
t.use_small_blocks(setattr)
params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", num_cores_or_threads=2)
sizes = [20, 0, 13, 0, 30]
lhs, rhs, scale, dout = t.operands(sizes, 80, 40, 512, jnp.float32, "scaled")
f = lambda lhs, rhs, scale: t.grouped_matmul(lhs, rhs, jnp.array(sizes), rhs_scale_EN=scale, implementation="pallas_tpu", interpret=params)
g = lambda lhs, rhs, scale: t.naive(lhs, rhs, jnp.array(sizes), scale)
run = lambda f: jax.jit(lambda *operands: t.values_and_gradients(f, *operands))
got, want = run(f)(lhs.at[63:].set(jnp.nan), rhs, scale, dout.at[63:].set(jnp.nan)), run(g)(lhs, rhs, scale, dout)
for name in want:
    np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=1e-4, err_msg=name)
"""


@pytest.mark.subprocess
def test_no_race_and_no_uninitialised_memory():
    """Two simulated cores, memory that starts as nan. In a process of its own: a race leaves the interpreter in a bad state."""
    assert_no_races(RACES)


@pytest.mark.parametrize("dtype", [jnp.float16])
def test_what_a_tpu_does_not_multiply_is_refused(dtype):
    with pytest.raises(NotImplementedError, match=r"grouped_matmul\[pallas_tpu\]: float16 is not multiplied on a TPU; .* Use impl"):
        kernel(jnp.zeros((4, 3), dtype), jnp.zeros((2, 3, 5), dtype), jnp.zeros(2, jnp.int32))


def aot_case(M, K, N, E, dtype="bfloat16", weights="plain", wanted="all"):
    """(f, shapes) for the TPU compiler: the op ("out"), its gradients ("gradients"), or both."""
    shape = jax.ShapeDtypeStruct
    lhs, dout, sizes = shape((M, K), jnp.dtype(dtype)), shape((M, N), jnp.dtype(dtype)), shape((E,), jnp.int32)
    rhs = shape((E, N, K) if weights == "turned" else (E, K, N), jnp.int8 if weights == "int8" else jnp.dtype(dtype))
    scale = None if weights in ("plain", "turned") else shape((E, N), jnp.float32)

    def op(sizes, lhs, rhs, scale=None):
        layout = "ENK" if weights == "turned" else "EKN"
        return grouped_matmul(lhs, rhs, sizes, rhs_scale_EN=scale, rhs_layout=layout, implementation="pallas_tpu", interpret=False)

    if wanted == "out":
        return op, (sizes, lhs, rhs) if scale is None else (sizes, lhs, rhs, scale)

    def gradients(sizes, lhs, rhs, scale, dout):
        return {name: x for name, x in values_and_gradients(functools.partial(op, sizes), lhs, rhs, scale, dout).items()
                if wanted == "all" or name != "out"}

    return gradients, (sizes, lhs, rhs, scale, dout)


def aot_cases():
    """{"production" or "odd": {name: (f, shapes)}}."""
    return {
        "production": {
            "grouped_matmul": aot_case(8192, 2048, 8192, 8, wanted="out"),
            "grouped_matmul gradients": aot_case(8192, 2048, 8192, 8, wanted="gradients"),
        },
        "odd": {f"grouped_matmul M={M} K={K} N={N} E={E} {dtype} {weights}": aot_case(M, K, N, E, dtype, weights)
                for M, K, N, E, dtype, weights in [
                    (1, 1, 1, 1, "float32", "plain"), (63, 24, 80, 3, "bfloat16", "plain"),
                    (100, 96, 80, 4, "float32", "scaled"), (129, 200, 300, 3, "float32", "plain"),
                    (500, 1000, 2050, 16, "float32", "plain"), (1000, 4864, 1536, 8, "bfloat16", "plain"),
                    (2000, 640, 1100, 5, "bfloat16", "scaled"), (4096, 2048, 1024, 16, "bfloat16", "int8"),
                    (8, 2048, 768, 128, "bfloat16", "plain"), (1000, 1024, 4096, 8, "bfloat16", "turned"),
                    (129, 200, 300, 3, "float32", "turned"), (4096, 7168, 2048, 4, "float32", "scaled"),
                    (127, 80, 192, 2, "float32", "int8"), (65536, 2048, 768, 128, "bfloat16", "plain"),
                ]},
    }

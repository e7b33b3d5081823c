"""Grouped matmul on a GPU: interpreted against a float64 loop over groups, compiled for a Hopper GPU that is not here, and run on one.

jax interprets it from 0.12 on; before that the kernel refuses where there is no GPU, and that is what is tested there.
"""
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import grouped_matmul
from pallas_kernels.grouped_matmul import gpu, gpu_products
from tests.numerics import assert_as_accurate

INTERPRETED = jax.__version_info__ >= (0, 12)
interpreted = pytest.mark.skipif(not INTERPRETED, reason="jax has no GPU interpreter that runs this before 0.12")
NAMES = ("out", "dlhs", "drhs")


@pytest.fixture
def two_blocks(monkeypatch):
    """Two multiprocessors instead of 132: a block then walks over several tiles, and the interpreter over few blocks."""
    monkeypatch.setattr(gpu_products, "MULTIPROCESSORS", 2)


def operands(M, K, N, sizes, dtype=jnp.bfloat16):
    """lhs, rhs, dout and sizes; rows of no group are nan in lhs and dout."""
    rng = np.random.default_rng(0)
    lhs, rhs, dout = (rng.standard_normal(s) for s in ((M, K), (len(sizes), K, N), (M, N)))
    lhs[sum(sizes) :] = dout[sum(sizes) :] = np.nan
    return *(jnp.asarray(x, dtype) for x in (lhs, rhs, dout)), jnp.asarray(sizes, jnp.int32)


def oracle(lhs, rhs, dout, sizes):
    """One group at a time in float64: (out, dlhs, drhs)."""
    lhs, rhs, dout = (np.asarray(x, np.float64) for x in (lhs, rhs, dout))
    out, dlhs, drhs = np.zeros((len(lhs), rhs.shape[2])), np.zeros_like(lhs), np.zeros_like(rhs)
    for e, end in enumerate(np.cumsum(sizes)):
        m = slice(end - sizes[e], end)
        out[m], dlhs[m], drhs[e] = lhs[m] @ rhs[e], dout[m] @ rhs[e].T, lhs[m].T @ dout[m]
    return out, dlhs, drhs


def naive(lhs, rhs, dout, sizes):
    """Every row with its own copy of its matrix, in the dtype of the inputs."""
    group = np.repeat(np.arange(len(sizes)), sizes)
    used = jnp.asarray(np.arange(len(lhs)) < len(group))[:, None]
    group = jnp.asarray(np.pad(group, (0, len(lhs) - len(group))))
    lhs, dout = jnp.where(used, lhs, 0), jnp.where(used, dout, 0)
    f = lambda lhs, rhs: jnp.where(used, jnp.einsum("mk,mkn->mn", lhs, rhs[group]), 0)  # noqa: E731
    out, vjp = jax.vjp(f, lhs, rhs)
    return out, *vjp(dout)


def run(lhs, rhs, dout, sizes, turned=False, **kwargs):
    """turned: the kernel is given transposed matrices."""
    layout = "ENK" if turned else "EKN"

    @jax.jit
    def both(lhs, rhs, dout, sizes):
        f = lambda x, w: grouped_matmul(x, w, sizes, rhs_layout=layout, implementation="pallas_gpu", **kwargs)  # noqa: E731
        out, vjp = jax.vjp(lambda x, w: f(x, w.swapaxes(1, 2) if turned else w), lhs, rhs)
        return out, *vjp(dout)

    return both(lhs, rhs, dout, sizes)


def compare(M, K, N, sizes, dtype=jnp.bfloat16, **kwargs):
    args = operands(M, K, N, sizes, dtype)
    got, want = run(*args, **kwargs), oracle(*args[:3], sizes)
    for i, (name, *tensors) in enumerate(zip(NAMES, got, want, naive(*args[:3], sizes), strict=True)):
        assert_as_accurate(name, *tensors, gradient=i > 0)
    used = sum(sizes)
    assert (got[0][used:] == 0).all() and (got[1][used:] == 0).all(), "rows of no group"
    assert all((got[2][e] == 0).all() for e, size in enumerate(sizes) if size == 0), "matrices of groups without rows"
    return got


@interpreted
@pytest.mark.parametrize("M, K, N, sizes, dtype, turned", [
    (200, 136, 72, [0, 5, 0, 130, 3, 50], jnp.bfloat16, False),  # groups of parts of tiles, shared tiles, nan behind the last group
    (200, 136, 72, [0, 5, 0, 130, 3, 50], jnp.bfloat16, True),
    (9, 64, 64, [9], jnp.float16, False),
])
def test_interpreted_equals_loop_over_groups(M, K, N, sizes, dtype, turned, two_blocks):
    compare(M, K, N, sizes, dtype, turned=turned)


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("M, K, N, sizes", [
    (1, 16, 24, [1]), (7, 64, 64, [0, 0]), (300, 64, 320, [128, 128, 44]), (257, 200, 64, [1, 63, 64, 65, 64]), (520, 64, 128, [500, 0, 3]),
])
def test_interpreted_equals_loop_over_groups_at_more_shapes(M, K, N, sizes, two_blocks):
    compare(M, K, N, sizes)


@pytest.mark.parametrize("sizes, M", [([0, 5, 0, 130, 3, 50], 200), ([0, 0], 7), ([128, 128], 256), ([1] * 40, 300), ([300], 300)])
def test_schedule(sizes, M):
    """Each tile's range holds exactly the groups with rows in it, each group its rows."""
    tiles, groups = (np.asarray(x) for x in gpu._schedule(jnp.asarray(sizes, jnp.int32), M))
    ends = np.cumsum(sizes)
    for i, (first, stop) in enumerate(tiles):
        low, high = i * gpu_products.ROWS, min((i + 1) * gpu_products.ROWS, M)
        want = [(e, ends[e] - size, ends[e]) for e, size in enumerate(sizes) if size and ends[e] > low and ends[e] - size < high]
        assert [tuple(g) for g in groups[first:stop]] == want


@pytest.mark.parametrize("row_tiles, column_tiles", [(1, 1), (8, 3), (9, 2), (20, 5), (3, 7)])
def test_the_walk_visits_every_tile_once(row_tiles, column_tiles):
    seen = {tuple(map(int, gpu_products._band(i, row_tiles, column_tiles))) for i in range(row_tiles * column_tiles)}
    assert seen == {(r, c) for r in range(row_tiles) for c in range(column_tiles)}


@interpreted
@pytest.mark.subprocess
def test_no_races_and_no_uninitialised_reads():
    """More steps than ring slots, shared tiles, masking in place, both kernels, under the interpreter's vector clocks."""
    program = (
        "import jax, jax.numpy as jnp, numpy as np\n"
        "from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call\n"
        "from jax.experimental.pallas import mosaic_gpu as plgpu\n"
        "from pallas_kernels.grouped_matmul import gpu, gpu_products\n"
        "gpu_products.MULTIPROCESSORS, gpu_products.stages = 1, lambda columns: 2\n"
        "draw = lambda *s: jax.random.normal(jax.random.key(len(s)), s, jnp.bfloat16)\n"
        "x, w, dy = draw(192, 128), draw(3, 128, 128), draw(192, 128)\n"
        "sizes, params = jnp.array([70, 0, 100]), plgpu.InterpretGPUParams(detect_races=True)\n"
        "for f in (lambda: gpu._rows(x, w, sizes, False, params), lambda: gpu._matrices(x, dy, sizes, params)):\n"
        "    assert jnp.isfinite(f().astype(jnp.float32)).all()\n"
        "    print('races', interpret_pallas_call.get_races().races_found)\n")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.split() == ["races", "False"] * 2, done.stdout + done.stderr[-2000:]


X, W, G = jnp.zeros((4, 3), jnp.bfloat16), jnp.zeros((2, 3, 5), jnp.bfloat16), jnp.zeros(2, jnp.int32)


@pytest.mark.parametrize("x, w, scale, message", [
    (X.astype(jnp.float32), W.astype(jnp.float32), None, "float32 as tf32"),
    (X, W.astype(jnp.int8), jnp.ones((2, 5)), "int8 matrices are not widened"),
    (X, W, jnp.ones((2, 5)), "a scale per column is not applied"),
])
def test_refusals(x, w, scale, message):
    if not INTERPRETED:
        message = "is below 0.12"
    with pytest.raises(NotImplementedError, match=rf"grouped_matmul\[pallas_gpu\]: .*{message}.* Use implementation='xla'"):
        grouped_matmul(x, w, G, rhs_scale_EN=scale, implementation="pallas_gpu")


def test_shared_memory_of_every_tile_width():
    for N in range(64, 2048, 64):
        columns = gpu_products.columns_of_tile(N)
        assert columns % 64 == 0 and columns <= 256 and gpu_products.stages(columns) >= 4


COMPILED = [(8192, 4096, 14336, 8), (65536, 2048, 1408, 64), (1000, 192, 320, 5), (100, 40, 24, 3), (1, 64, 64, 1)]


@pytest.mark.gpu_compile
@pytest.mark.parametrize("M, K, N, E", COMPILED)
def test_compiles_for_hopper(M, K, N, E):
    from tests.pallas_kernels import h200

    sharding = jax.sharding.NamedSharding(h200.device_mesh(), jax.sharding.PartitionSpec())
    struct = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)  # noqa: E731

    def both(lhs, rhs, dout, sizes):
        out, vjp = jax.vjp(lambda x, w: gpu.multiply(x, w, sizes, None), lhs, rhs)
        return out, *vjp(dout)

    text = jax.jit(both).lower(struct(M, K), struct(E, K, N), struct(M, N), struct(E, dtype=jnp.int32)).compile().as_text()
    assert text.count("mosaic_gpu") >= 3, "out, dlhs and drhs are three kernels"


@pytest.mark.gpu
@pytest.mark.parametrize("M, K, N, sizes", [
    (1, 64, 64, [1]), (100, 40, 24, [30, 0, 60]), (1000, 192, 320, [0, 5, 0, 630, 3, 300]), (2048, 512, 1408, [17 * i for i in range(15)]),
    (4096, 512, 512, [4096]), (4096, 512, 768, [128] * 32), (2000, 256, 2304, [1] * 500), (777, 128, 256, [0, 0, 0]),
])
def test_on_a_gpu_equals_loop_over_groups(M, K, N, sizes):
    one = compare(M, K, N, sizes, interpret=False)
    for name, x, y in zip(NAMES, one, run(*operands(M, K, N, sizes), interpret=False)):
        assert (np.asarray(x) == np.asarray(y)).all(), f"{name}: two runs differ"

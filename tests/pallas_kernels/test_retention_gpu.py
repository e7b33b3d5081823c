"""Retention on a GPU: interpreted against the reference in float64, compiled for a Hopper GPU that is not here, and run on one.

jax interprets it from 0.12 on; before that the kernel refuses where there is no GPU, and that is what is tested there.
"""
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import retention
from pallas_kernels.retention import gpu, gpu_plan, gpu_scan, reference
from tests.numerics import assert_as_accurate, assert_close, relative_rms

INTERPRETED = jax.__version_info__ >= (0, 12)
interpreted = pytest.mark.skipif(not INTERPRETED, reason="jax has no GPU interpreter that runs this before 0.12")
NAMES = ("out", "state", "dq", "dk", "dv", "dlog_decay", "dinitial_state")


def inputs(B, T, N, H, P, per_token, strength=0.1, seed=0):
    """bfloat16 q, k, v, float32 log decay and state, all drawn by numpy."""
    rng = np.random.default_rng(seed)
    q, k, v = (jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for s in ((B, T, N, H), (B, T, N, H), (B, T, N, P)))
    g = -strength * np.abs(rng.standard_normal((B, T, N) if per_token else (N,)))
    return q, k, v, jnp.asarray(g, jnp.float32), jnp.asarray(rng.standard_normal((B, N, H, P)), jnp.float32)


def segments(B, T, seed=0):
    """A few documents per row in order, padding inside and at the end."""
    rng = np.random.default_rng(seed)
    ids = np.sort(rng.integers(1, 4, (B, T)), axis=1)
    ids[:, T // 3], ids[:, T - T // 8 :] = 0, 0
    return jnp.asarray(ids, jnp.int32)


def naive(q, k, v, log_decay, state, segment_ids, scale):
    """The parallel form with every product in the dtype of the inputs: (out, final state)."""
    B, T, N, _ = q.shape
    dtype = q.dtype
    ids = jnp.ones((B, T), jnp.int32) if segment_ids is None else segment_ids
    real = ids != 0
    g = jnp.where(real[..., None], jnp.broadcast_to(log_decay, (B, T, N)), 0.0)
    since = jnp.cumsum(g, axis=1)
    same = real[:, :, None] & real[:, None, :] & (ids[:, :, None] == ids[:, None, :]) & jnp.tril(jnp.ones((T, T), bool))
    first = jnp.take_along_axis(ids, jnp.argmax(real, axis=1)[:, None], axis=1)
    last = jnp.take_along_axis(ids, T - 1 - jnp.argmax(real[:, ::-1], axis=1)[:, None], axis=1)
    weight = jnp.where(same[..., None], jnp.exp(jnp.where(same[..., None], since[:, :, None] - since[:, None], 0.0)), 0.0)
    scores = (jnp.einsum("btnh,bsnh->btsn", q, k) * weight * scale).astype(dtype)
    reads = jnp.where((ids == first) & real, 1.0, 0.0)[..., None] * jnp.exp(since) * scale
    read = jnp.einsum("btnh,bnhp->btnp", (q * reads[..., None]).astype(dtype), state.astype(dtype))
    out = jnp.einsum("btsn,bsnp->btnp", scores, v) + read
    writes = jnp.where((ids == last) & real, 1.0, 0.0)[..., None] * jnp.exp(since[:, -1:] - since)
    kept = jnp.where(first == last, jnp.exp(since[:, -1]), 0.0)[..., None, None] * state
    return out.astype(dtype), kept + jnp.einsum("btnh,btnp->bnhp", (k * writes[..., None]).astype(dtype), v).astype(jnp.float32)


def everything(run, args, seed=1):
    """(out, state, gradients of a random projection of both), jitted."""
    q, _, v, _, state = args
    rng = np.random.default_rng(seed)
    to_out, to_state = rng.standard_normal((*q.shape[:-1], v.shape[-1])), rng.standard_normal(state.shape)

    def scalar(*args):
        out, state = run(*args)
        projected = (jnp.asarray(to_out, out.dtype) * out).sum(dtype=state.dtype) + (jnp.asarray(to_state, state.dtype) * state).sum()
        return projected, (out, state)

    (_, values), grads = jax.jit(jax.value_and_grad(scalar, range(5), has_aux=True))(*args)
    return *values, *grads


def compare(args, segment_ids, **kwargs):
    scale = args[0].shape[-1] ** -0.5
    door = lambda *a: retention(*a[:4], initial_state=a[4], segment_ids=segment_ids, output_final_state=True,  # noqa: E731
                                implementation="pallas_gpu", **kwargs)
    got = everything(door, args)
    # One decay per token there, so that the gradient of a constant one can be judged by the terms that it is the sum of.
    args = (*args[:3], jnp.broadcast_to(args[3], args[0].shape[:3]), args[4])
    plain = everything(lambda *a: naive(*a, segment_ids, scale), args)
    with jax.enable_x64(True):
        double = tuple(jnp.asarray(np.asarray(x, np.float64)) for x in args)
        want = everything(lambda *a: reference.retain(*a, segment_ids, None, scale)[:2], double)
    for i, (name, *tensors) in enumerate(zip(NAMES, got, want, plain, strict=True)):
        as_accurate(name, *tensors, gradient=i >= 2)
    return got


def as_accurate(name, got, want, plain, gradient):
    """The two rules of `assert_as_accurate`; a float32 sum of products of bfloat16 values is held to bfloat16's bounds."""
    if name == "dlog_decay" and got.ndim == 1:
        # The rounding of one pair counts for every token between its ends: the root of a window times the error of a token's term, 2e-3.
        terms = np.sqrt((np.asarray(want, np.float64) ** 2).sum((0, 1)).mean())
        return assert_close(name, got, np.asarray(want, np.float64).sum((0, 1)), 3e-2, floor=terms)
    if got.dtype == jnp.bfloat16:
        return assert_as_accurate(name, got, want, plain, gradient=gradient)
    error = relative_rms(plain, want)
    assert_close(name, got, want, max(4e-3, 2 * error) if gradient else 4e-3)
    assert_close(name, got, want, 2 * error + 2**-7)


CASES = {
    "constant decay, both warpgroups": (1, 100, 1, 64, 128, False, False),
    "per token, packed, two rows, odd dims": (2, 70, 1, 80, 24, True, True),
}


@interpreted
@pytest.mark.parametrize("case", [pytest.param(name, marks=() if "packed" in name else pytest.mark.slow) for name in CASES])
def test_interpreted_equals_reference(case):
    B, T, N, H, P, per_token, packed = CASES[case]
    compare(inputs(B, T, N, H, P, per_token), segments(B, T) if packed else None)


LONG = [
    (1, T, 1, H, P, per_token, packed)
    for T, (H, P), per_token, packed in [
        (1, (16, 16), False, False), (63, (64, 64), True, False), (64, (96, 192), False, True), (127, (128, 128), True, True),
        (129, (192, 64), False, False), (128, (256, 64), False, False), (200, (64, 256), True, True), (500, (16, 64), False, False),
    ]
]


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("B, T, N, H, P, per_token, packed", LONG)
def test_interpreted_equals_reference_at_more_shapes(B, T, N, H, P, per_token, packed):
    compare(inputs(B, T, N, H, P, per_token), segments(B, T) if packed else None)


@interpreted
def test_resets_are_exact_and_runs_repeat():
    """Documents are as alone; a document of values near 1e30 does not change one bit of the next, nor does a second run."""
    q, k, v, g, _ = inputs(1, 128, 1, 64, 64, True)
    ids = jnp.asarray([[1] * 64 + [2] * 64], jnp.int32)
    run = jax.jit(lambda q, k, v, g, ids: gpu.retain(q, k, v, g, None, ids, None, 0.125, interpret=True)[:2])
    out, state = run(q, k, v, g, ids)
    alone, state_alone = run(*(x[:, 64:] for x in (q, k, v, g)), ids[:, 64:])
    assert_close("second document", out[:, 64:], alone, 2e-3)
    assert_close("its state", state, state_alone, 2e-3)
    for one, two in zip((out, state), run(q, k, v, g, ids)):
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(two, np.float32))
    loud, loud_state = run(q, k, v.at[:, :64].mul(1e30), g, ids)
    np.testing.assert_array_equal(np.asarray(loud[:, 64:], np.float32), np.asarray(out[:, 64:], np.float32))
    np.testing.assert_array_equal(loud_state, state)


@pytest.mark.parametrize("decay", [-30.0, -1e30, -np.inf, 0.0, "mixed"])
def test_tables_of_extreme_decays(decay):
    """What the kernel multiplies by is finite and as the recurrence says, whatever the decay."""
    T = 70
    g = np.where(np.arange(T) % 3 == 0, -60.0, -0.01) if decay == "mixed" else np.full(T, decay)
    forward, backward = gpu._tables(jnp.asarray(g, jnp.float32)[None, :, None], None, T, 1.0)
    held = np.maximum(g.astype(np.float64), -104.0)
    for c, chunk in enumerate((held[:64], held[64:])):
        L = len(chunk)
        want = np.array([[np.exp(chunk[s + 1 : t + 1].sum()) if s <= t else 0.0 for s in range(L)] for t in range(L)])
        for table, pairs in ((forward, want), (backward, want.T)):
            row, column, reads, writes, keeps = np.asarray(table[0, 0, c], np.float64)
            seen = pairs > 0
            with np.errstate(over="ignore"):
                np.testing.assert_allclose(np.exp2(row[:, None] - column[None])[:L, :L][seen], pairs[seen], rtol=2e-3, atol=1e-38)
                assert (np.exp2(np.minimum(row[:, None] - column[None], 0))[L:, :L] == 0).all()
            np.testing.assert_allclose(keeps, np.exp(chunk.sum()), rtol=1e-3, atol=1e-38)
            assert (reads[L:] == 0).all() and (writes[L:] == 0).all()
        np.testing.assert_allclose(np.asarray(forward[0, 0, c, gpu_scan.WRITES])[:L], want[-1], rtol=1e-3, atol=1e-38)
        np.testing.assert_allclose(np.asarray(forward[0, 0, c, gpu_scan.READS])[:L], np.exp(np.cumsum(chunk)), rtol=1e-3, atol=1e-38)


@interpreted
@pytest.mark.slow
def test_summary_is_that_of_the_state_from_zero():
    q, k, v, g, state = inputs(1, 65, 1, 16, 16, True)
    ids = jnp.asarray([[0] + [3] * 40 + [0] * 24], jnp.int32)
    run = lambda name: retention(q, k, v, g, initial_state=state, segment_ids=ids, return_summary=True, implementation=name)[1]  # noqa: E731
    got, want = run("pallas_gpu"), run("reference")
    np.testing.assert_allclose(got.state_BNHP, want.state_BNHP, rtol=0.02, atol=0.05)
    np.testing.assert_allclose(got.log_decay_BN, want.log_decay_BN, rtol=1e-5)
    assert (got.first_segment_B == 3).all() and (got.last_segment_B == 3).all()


@interpreted
@pytest.mark.subprocess
def test_no_races_and_no_uninitialised_reads():
    """More chunks than ring slots, both warpgroups, both directions, under the interpreter's vector clocks; unwritten memory reads nan."""
    program = (
        "import jax, jax.numpy as jnp\n"
        "from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call\n"
        "from jax.experimental.pallas import mosaic_gpu as plgpu\n"
        "from pallas_kernels.retention import gpu, gpu_plan\n"
        "gpu_plan.plan = lambda *_: gpu_plan.Plan(warpgroups=2, heads=1, stages=2, slices=1)\n"
        "q, k, v = (jax.random.normal(jax.random.key(i), (1, 130, 1, d), jnp.bfloat16) for i, d in enumerate((64, 64, 128)))\n"
        "table = gpu._tables(jnp.array([-0.1]), None, 130, 0.1)\n"
        "states = None\n"
        "for reverse in (False, True):\n"
        "    params, joined = plgpu.InterpretGPUParams(detect_races=True), (v, states)\n"
        "    out, state, (rows, states) = gpu._scan(q, k, v, table[reverse], None, 0.1, reverse, params, joined)\n"
        "    assert all(jnp.isfinite(x.astype(jnp.float32)).all() for x in (out, state, rows, states))\n"
        "    print('races', interpret_pallas_call.get_races().races_found)\n")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.split() == ["races", "False"] * 2, done.stdout + done.stderr[-2000:]


@interpreted
@pytest.mark.slow
def test_vmap():
    q, k, v, g, _ = inputs(2, 9, 1, 16, 16, False)
    run = lambda q, k, v: gpu.retain(q, k, v, g, None, None, None, 0.25, interpret=True)[0]  # noqa: E731
    together = jax.jit(jax.vmap(run))(*(x[:, None] for x in (q, k, v)))[:, 0]
    np.testing.assert_array_equal(np.asarray(together, np.float32), np.asarray(run(q, k, v), np.float32))


X = jnp.zeros((1, 4, 2, 8), jnp.bfloat16)


@pytest.mark.parametrize("x, message", [
    (X.astype(jnp.float32), "float32 as tf32"), (X.astype(jnp.float16), "float16 state overflows"),
    (jnp.zeros((1, 4, 2, 264), jnp.bfloat16), "head dims above 256 do not fit in registers"),
])
def test_refusals(x, message):
    if not INTERPRETED:
        message = "is below 0.12"
    with pytest.raises(NotImplementedError, match=rf"retention\[pallas_gpu\]: .*{message}.* Use implementation='xla'"):
        retention(x, x, x, jnp.zeros(2), implementation="pallas_gpu")


def test_plans():
    """Every shape has a plan that divides heads, columns and chunks; few heads are made up for by cutting the sequence."""
    for B, T, N, H, P in [(1, 1, 1, 64, 64), (1, 8192, 96, 128, 128), (1, 8192, 3, 256, 256), (3, 1000, 6, 192, 64)]:
        plan = gpu_plan.plan(B, T, N, H, P)
        assert gpu_plan.plan(B, T, N, H, P, joined=True).stages >= 1
        assert plan.stages >= 2 and N % plan.heads == 0 and P // gpu_plan.TILE * plan.heads % plan.warpgroups == 0
        assert plan.slices == 1 or T % (plan.slices * gpu_plan.C) == 0
    assert gpu_plan.plan(1, 8192, 96, 128, 128)[::3] == (2, 1)  # 96 blocks of two warpgroups, each sequence whole
    assert gpu_plan.plan(2, 16384, 16, 128, 128).slices == 4  # 32 blocks alone would leave 100 multiprocessors idle


@interpreted
@pytest.mark.parametrize("plan, N, P, per_token, gradients", [
    ((2, 2, 2, 2), 2, 64, True, False),
    pytest.param((2, 1, 3, 2), 1, 128, False, True, marks=pytest.mark.slow),
    pytest.param((1, 1, 2, 4), 1, 64, True, True, marks=pytest.mark.slow),
])
def test_ways_to_share_out(plan, N, P, per_token, gradients, monkeypatch):
    """Two heads in a block, a sequence cut into slices of time: the same numbers."""
    monkeypatch.setattr(gpu_plan, "plan", lambda *_: gpu_plan.Plan(*plan))
    args, ids = inputs(1, 256, N, P, P, per_token), segments(1, 256) if per_token else None
    if gradients:
        compare(args, ids)
        return
    got = jax.jit(lambda *args: gpu.retain(*args, ids, None, 0.125, interpret=True)[:2])(*args)
    want = reference.retain(*(x.astype(jnp.float32) for x in args), ids, None, 0.125)[:2]
    assert_close("out", got[0], want[0], 4e-3)
    assert_close("state", got[1], want[1], 4e-3)


def shapes(B, T, N, H, P, sharding=None):
    struct = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)  # noqa: E731
    return struct(B, T, N, H), struct(B, T, N, H), struct(B, T, N, P), struct(N, dtype=jnp.float32), struct(B, N, H, P, dtype=jnp.float32)


def forward_and_backward(q, k, v, g, state):
    values, vjp = jax.vjp(lambda *args: gpu.retain(*args, None, None, 0.1)[:2], q, k, v, g, state)
    return values, vjp(values)


COMPILED = [
    (1, 8192, 96, 128, 128), (2, 16384, 16, 128, 128), (1, 8192, 192, 64, 64), (1, 4096, 8, 256, 256), (2, 1000, 4, 64, 64),
    (1, 100, 3, 80, 192), (1, 1, 1, 16, 16),
]


@pytest.mark.gpu_compile
@pytest.mark.parametrize("shape", COMPILED)
def test_compiles_for_hopper(shape):
    from tests.pallas_kernels import h200

    sharding = jax.sharding.NamedSharding(h200.device_mesh(), jax.sharding.PartitionSpec())
    text = jax.jit(forward_and_backward).lower(*shapes(*shape, sharding=sharding)).compile().as_text()
    assert text.count("mosaic_gpu") >= 4, "forward, dq, dk and dv are kernels"


GRID = [
    (B, T, N, H, P, per_token, packed)
    for T in (1, 63, 64, 100, 127, 128, 129, 500, 1000, 2000)
    for B, N, H, P, per_token, packed in ((1, 2, 128, 128, False, False), (2, 3, 64, 64, True, True), (1, 1, 80, 192, True, False))
] + [
    (1, 777, 2, 256, 256, False, True), (1, 8192, 2, 128, 128, False, False), (1, 8192, 2, 64, 64, True, True),
    (1, 300, 2, 16, 96, False, True), (1, 65, 2, 192, 256, True, True), (4, 1024, 64, 64, 64, False, False),
]


@pytest.mark.gpu
@pytest.mark.parametrize("B, T, N, H, P, per_token, packed", GRID)
def test_on_a_gpu_equals_reference(B, T, N, H, P, per_token, packed):
    args, ids = inputs(B, T, N, H, P, per_token), segments(B, T) if packed and T > 8 else None
    one = compare(args, ids, interpret=False)
    door = lambda *a: retention(*a[:4], initial_state=a[4], segment_ids=ids, output_final_state=True, implementation="pallas_gpu")  # noqa: E731
    for name, x, y in zip(NAMES, one, everything(door, args)):
        assert (np.asarray(x) == np.asarray(y)).all(), f"{name}: two runs differ"

"""The TPU kernels of retention, interpreted: every value and gradient against the float64 reference; block sizes, races, programs."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effmodels.plan.topology import compile_for
from pallas_kernels import retention
from pallas_kernels.retention import tpu, tpu_plan
from tests.numerics import assert_as_accurate, assert_close, relative_rms
from tests.pallas_kernels.common import assert_float32_products, assert_no_races, equations
from tests.pallas_kernels.test_retention import inputs, normal, oracle

SCALE = 0.4
NAMES = ("dq", "dk", "dv", "dlog_decay", "dinitial_state")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Two chunks to a block: several blocks, and a ragged one, at small lengths."""
    monkeypatch.setattr(tpu_plan, "BLOCK", 256)


def segments(B, T, seed=0):
    """Segments of random lengths, some of them padding, ids that come back."""
    generator = np.random.default_rng(seed)
    lengths = [generator.integers(1, T // 3 + 2, T) for _ in range(B)]
    return np.stack([np.repeat(np.arange(T) % 5, n)[:T] for n in lengths]).astype(np.int32)


def naive(q, k, v, log_decay, state, ids, scale):
    """(out, final state) by the quadratic form in the dtype of q, one head's [T, T] decays at once."""
    B, T, N, _ = q.shape
    ids = jnp.ones((B, T), jnp.int32) if ids is None else ids
    real = ids != 0
    latest = jax.lax.cummax(jnp.where(real, jnp.arange(T), -1), axis=1)
    filled = jnp.where(latest >= 0, jnp.take_along_axis(ids, jnp.maximum(latest, 0), axis=1), 0)
    before = jnp.pad(filled[:, :-1], ((0, 0), (1, 0)))
    run = jnp.cumsum((before != 0) & (filled != before), axis=1)
    total = jnp.cumsum(jnp.where(real[..., None], jnp.broadcast_to(log_decay, (B, T, N)), 0), axis=1)
    see = (run[:, :, None] == run[:, None]) & real[:, None] & real[:, :, None] & jnp.tril(jnp.ones((T, T), bool))
    decay = jnp.exp(jnp.where(see[..., None], total[:, :, None] - total[:, None], -jnp.inf)).astype(q.dtype)
    read = jnp.exp(jnp.where((real & (run == 0))[..., None], total, -jnp.inf)).astype(q.dtype)
    write = jnp.exp(jnp.where((real & (run == run[:, -1:]))[..., None], total[:, -1:] - total, -jnp.inf)).astype(q.dtype)
    keep = jnp.where((run[:, -1] == 0)[:, None], jnp.exp(total[:, -1]), 0)
    einsum = functools.partial(jnp.einsum, precision="highest")
    scores = einsum("btnh,bsnh->btsn", q, k) * decay * scale
    out = einsum("btsn,bsnp->btnp", scores, v) + einsum("btnh,bnhp->btnp", q * read[..., None] * scale, state.astype(q.dtype))
    final = keep[..., None, None] * state + einsum("bsnh,bsnp->bnhp", k * write[..., None], v).astype(state.dtype)
    return out.astype(q.dtype), final


def kernel(implementation, q, k, v, log_decay, state, ids, scale, **kwargs):
    return retention(q, k, v, log_decay, initial_state=state, segment_ids=ids, scale=scale, output_final_state=True,
                     implementation=implementation, **kwargs)


def values_and_gradients(f, args, ids):
    """(out, final state) and the gradients of a random projection of both."""
    def scalar(*args):
        results = f(*args, ids, SCALE)
        return sum((jnp.asarray(normal(i, x.shape), x.dtype) * x).sum(dtype=state_dtype) for i, x in enumerate(results)), results

    state_dtype = args[4].dtype
    (_, results), grads = jax.value_and_grad(scalar, range(5), has_aux=True)(*args)
    return dict(zip(("out", "final_state", *NAMES), (*results, *grads)))


def check(B, T, N, H, P, per_token=False, packed=False, dtype=jnp.float32, seed=0, strength=0.1, chunk_size=None, floor=1e-6):
    arrays = inputs(B, T, N, H, P, per_token, np.float32, strength)
    # The float64 reference starts from what the kernel is given: rounded inputs.
    args = [jnp.asarray(x, dtype) for x in arrays[:3]] + [jnp.asarray(x) for x in arrays[3:]]
    ids = jnp.asarray(segments(B, T, seed)) if packed else None
    got = jax.jit(lambda a: values_and_gradients(functools.partial(kernel, "pallas_tpu", chunk_size=chunk_size), a, ids))(args)
    plain = jax.jit(lambda a: values_and_gradients(naive, a, ids))(args)
    with jax.enable_x64(True):
        exact = [np.asarray(x, np.float64) for x in args]
        want = jax.jit(lambda a: values_and_gradients(functools.partial(kernel, "reference"), a, ids))(exact)
    for name, x in got.items():
        if x.dtype == dtype:
            assert_as_accurate(name, x, want[name], plain[name], gradient=name.startswith("d"), floor=floor)
        else:  # a float32 state or decay gradient made of bfloat16 products: the rule of bfloat16
            assert_close(name, x, want[name], max(4e-3, 2 * relative_rms(plain[name], want[name], floor)), floor)
    if packed:
        assert (np.asarray(got["out"], np.float32)[np.asarray(ids) == 0] == 0).all()


@pytest.mark.parametrize("case", [
    dict(B=1, T=300, N=2, H=128, P=128, per_token=True, packed=True),
    dict(B=1, T=500, N=1, H=128, P=256, dtype=jnp.bfloat16),
    pytest.param(dict(B=2, T=129, N=4, H=64, P=32, packed=True), marks=pytest.mark.slow),
    pytest.param(dict(B=1, T=100, N=2, H=24, P=80, per_token=True, dtype=jnp.bfloat16), marks=pytest.mark.slow),
    dict(B=2, T=1, N=2, H=64, P=64),
], ids=str)
def test_equals_reference(case):
    check(**case)


LENGTHS, DIMS = (1, 63, 64, 100, 127, 128, 129, 500, 1000, 2000), (16, 64, 80, 96, 128, 192, 256)


@pytest.mark.slow
@pytest.mark.parametrize("i, T", list(enumerate(LENGTHS)))
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_grid(i, T, dtype):
    """Every length and head dim, every feature beside both; the combination changes along the grid."""
    per_token, packed = [(False, False), (True, False), (False, True), (True, True)][(i + (dtype == jnp.bfloat16)) % 4]
    H, P = DIMS[i % len(DIMS)], DIMS[(3 * i + 1) % len(DIMS)]
    # The gradient of a constant decay is one number per head: over two of them a relative RMS is one draw of rounding, not a statistic.
    N = 16 if dtype == jnp.bfloat16 and not per_token else 2
    check(1, T, N, H, P, per_token, packed, dtype, seed=i, strength=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_random_shapes(seed):
    draw = np.random.default_rng(seed)
    B, T, N = (int(draw.integers(1, n)) for n in (3, 400, 5))
    H, P = (int(draw.integers(1, 140)) for _ in range(2))
    per_token, packed, half = (bool(draw.integers(2)) for _ in range(3))
    check(B, T, N, H, P, per_token, packed, jnp.bfloat16 if half else jnp.float32, seed, float(draw.choice([0.01, 0.3, 2.0])),
          chunk_size=int(draw.choice([1, 128, 200, 512])))


@pytest.mark.slow
def test_cut_states(monkeypatch):
    """States too large for the chip are cut along both dims."""
    monkeypatch.setattr(tpu_plan, "_KEY_DIM", 16)
    monkeypatch.setattr(tpu_plan, "_VALUE_DIM", 8)
    check(2, 140, 2, 40, 20, packed=True)
    check(1, 140, 2, 40, 20, per_token=True)


@pytest.mark.parametrize(
    "per_token, decay", [(True, -30.0), (True, "mixed"), (True, -np.inf), pytest.param(False, -30.0, marks=pytest.mark.slow)]
)
def test_extreme_decays(per_token, decay):
    """Strong decays beside weak ones cost no digits, neither in values nor in the gradient of the decay itself."""
    q, k, v, g, state = inputs(1, 200, 1, 16, 16, per_token)
    g = np.where(normal(5, g.shape) > 0, -60.0, -0.01).astype(np.float32) if decay == "mixed" else np.full_like(g, decay)
    ids = None
    run = jax.jit(lambda *a: values_and_gradients(functools.partial(kernel, "pallas_tpu"), a, ids))
    got = run(q, k, v, g, state)
    want_out, want_state = oracle(q, k, v, g, state, scale=SCALE)
    assert_close("out", got["out"], want_out, rel=2e-6)
    assert_close("final state", got["final_state"], want_state, rel=2e-6)
    with jax.enable_x64(True):
        exact = [np.asarray(x, np.float64) for x in (q, k, v, np.maximum(g, -700), state)]
        want = jax.jit(lambda a: values_and_gradients(functools.partial(kernel, "reference"), a, ids))(exact)
    # The gradient of a constant decay adds 200 terms of either sign, each about scale * 16 * exp(decay).
    floor = 2**-8 * 200 * SCALE * 16 * np.exp(decay) if decay == -30.0 else 1e-30
    for name in NAMES:
        assert_close(name, got[name], want[name], rel=1e-5, floor=floor)


def test_summary_repeatability_and_no_initial_state():
    """The Summary is that of the xla form, with and without an initial state; two runs are bitwise equal."""
    q, k, v, g, state = inputs(2, 140, 2, 16, 24, True)
    ids = jnp.asarray(segments(2, 140))

    @functools.partial(jax.jit, static_argnums=0)
    def run(implementation, *args):
        options = dict(output_final_state=True, return_summary=True, segment_ids=ids, implementation=implementation)
        with_state = retention(*args[:4], initial_state=args[4], **options)
        return with_state, retention(*args[:4], **options)

    got, want = run("pallas_tpu", q, k, v, g, state), run("xla", q, k, v, g, state)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        finite = np.isfinite(np.asarray(y))
        np.testing.assert_array_equal(np.isfinite(np.asarray(x)), finite)
        assert_close("leaf", np.where(finite, x, 0), np.where(finite, y, 0), rel=2e-6)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(run("pallas_tpu", q, k, v, g, state))):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_under_transformations():
    """vmap, scan and remat give what one call gives, with the decay among the differentiated and without it."""
    q, k, v, g, _ = inputs(2, 20, 2, 16, 16, False)

    def loss(q, g):
        return (retention(q[None], k[:1], v[:1], g, implementation="pallas_tpu") ** 2).sum()

    @jax.jit
    def run(q, g):
        scan = lambda c, xs: (c + jax.checkpoint(loss)(*xs), None)  # noqa: E731
        scanned = jax.grad(lambda q: jax.lax.scan(scan, 0.0, (q, g))[0])(q)
        return jax.grad(loss, (0, 1))(q[1], g[1]), jax.vmap(jax.grad(loss, (0, 1)))(q, g), scanned

    alone, mapped, scanned = run(q, jnp.stack([g, 2 * g]))
    for x, y in zip((mapped[0][1], mapped[1][1], scanned[1]), (*alone, alone[0])):
        assert_close("gradient", x, y, rel=1e-6)


def test_float32_is_multiplied_as_float32():
    """The MXU would round float32 operands to bfloat16, which interpretation hides."""
    x = jnp.zeros((1, 200, 2, 64))
    gradients = jax.grad(lambda *a: retention(*a, implementation="pallas_tpu").sum(), range(4))
    assert_float32_products(jax.make_jaxpr(gradients)(x, x, x, jnp.zeros((1, 200, 2))).jaxpr, at_least=21)


def test_gradient_of_a_constant_decay_is_left_out():
    """The backward kernel computes the decay's gradient only where somebody asks for it."""
    x, g = jnp.zeros((1, 200, 2, 64)), jnp.zeros(2)
    call = lambda x, g: retention(x, x, x, g, implementation="pallas_tpu").sum()  # noqa: E731
    results = []
    for argnums in (0, 1):
        kernels = [e for e in equations(jax.make_jaxpr(jax.grad(call, argnums))(x, g).jaxpr) if e.primitive.name == "pallas_call"]
        results.append(max(len(e.outvars) for e in kernels))
    assert results == [4, 5]


@pytest.mark.aot
def test_unused_results_cost_no_kernel():
    """A Summary beside an initial state is a second kernel, which the compiler drops if nobody uses it."""
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, 300, 2, 64), (2,), (1, 2, 64, 64))]

    def run(x, g, state, summary):
        results = tpu.retain(x, x, x, g, state, None, None, 1.0, interpret=False)
        return results if summary else results[:2]

    for f, kernels in (
        (functools.partial(run, summary=False), 1), (functools.partial(run, summary=True), 2),
        (jax.grad(lambda *a: sum(x.sum() for x in run(*a, False))), 2),
    ):  # fmt: skip
        assert compile_for("v4", f, *shapes).as_text().count('custom_call_target="tpu_custom_call"') == kernels


_RACES = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"
os.environ.setdefault("NPROC", "8")
import jax, jax.numpy as jnp, numpy as np
from jax.experimental.pallas import tpu as pltpu
from pallas_kernels import retention
from pallas_kernels.retention import tpu_plan
tpu_plan.BLOCK = 128
cores = {name: 2 for name in ("num_cores_or_threads", "num_cores_per_device") if name in pltpu.InterpretParams.__dataclass_fields__}
params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", **cores)
x = [jnp.asarray(np.random.default_rng(i).standard_normal((1, 150, 2, 96)), jnp.float32) for i in range(3)]
def loss(*a, **kw):
    return (retention(*a, **kw) ** 2).sum()
args = *x, jnp.full((1, 150, 2), -0.1)
got = jax.jit(jax.grad(lambda *a: loss(*a, implementation="pallas_tpu", interpret=params), range(4)))(*args)
want = jax.jit(jax.grad(lambda *a: loss(*a, implementation="xla"), range(4)))(*args)
for a, b in zip(got, want):
    error = np.linalg.norm(a - b) / np.linalg.norm(b)
    assert error < 1e-5, error
"""


@pytest.mark.subprocess
def test_no_races_and_no_uninitialised_memory():
    """A race raises on newer jax and sets a flag on older; NaN-filled scratch and outputs would show in the gradients."""
    assert_no_races(_RACES)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float16])
def test_refuses(dtype, x64):
    x = jnp.zeros((1, 4, 2, 8), dtype)
    with pytest.raises(NotImplementedError, match=rf"retention\[pallas_tpu\]: {jnp.dtype(dtype)} is not multiplied on a TPU"):
        retention(x, x, x, jnp.zeros(2), implementation="pallas_tpu")


def test_plans_fit_and_honour_chunk_size(monkeypatch):
    given = ((1, None), (17, None), (64, 999), (65, 1), (4096, None), (4096, 129), (4096, 4096))
    assert [tpu_plan.chunk_tokens(*x) for x in given] == [16, 32, 64, 128, 128, 256, 512]
    monkeypatch.undo()
    sizes = {
        (8192, 96, 96, 128, 128, 2): (128, 8, 1),  # eight chunks overlap
        (8192, 32, 16, 256, 512, 2): (128, 4, 1),
        (8192, 96, 96, 128, 128, 4): (128, 2, 1),
        (8192, 32, 16, 256, 512, 4): (128, 1, 1),
        (1, 1024, 16, 128, 128, 2): (16, 1, 16),  # decoding: sixteen heads in a step
        (1, 6, 3, 128, 128, 2): (16, 1, 1),
        (200, 64, 8, 128, 128, 2): (128, 2, 4),
    }
    assert {given: tpu_plan.sizes(*given, None) for given in sizes} == sizes
    assert [tpu_plan.parts(H, P) for H, P in ((256, 512), (257, 512), (64, 1025))] == [(1, 1), (2, 1), (1, 3)]
    assert [tpu_plan.heads_together(*x) for x in ((4, 64, 64), (3, 64, 64), (8, 16, 16), (6, 40, 40), (4, 64, 128))] == [2, 1, 8, 3, 1]


def aot_cases():
    """{kind: {name: (f, shapes)}} of programs that must compile for every TPU generation."""
    def program(B, T, N, H, P, dtype=jnp.bfloat16, per_token=False, packed=False, initial=True, gradient=True, decay=True):
        arrays = [((B, T, N, H), dtype), ((B, T, N, H), dtype), ((B, T, N, P), dtype), ((B, T, N) if per_token else (N,), jnp.float32)]
        arrays += [((B, N, H, P), jnp.float32)] * initial + [((B, T), jnp.int32)] * packed

        def run(q, k, v, g, *rest):
            rest = list(rest)
            state = rest.pop(0) if initial else None
            return tpu.retain(q, k, v, g, state, rest[0] if packed else None, None, H**-0.5, interpret=False)[:2]

        def gradients(q, k, v, g, *rest):
            wanted = (0, 1, 2) + (3,) * decay + (4,) * initial
            return jax.grad(lambda *a: sum(x.astype(jnp.float32).sum() for x in run(*a)), wanted)(q, k, v, g, *rest)

        return gradients if gradient else run, [jax.ShapeDtypeStruct(*x) for x in arrays]

    production = dict(B=1, T=8192, N=16, H=128, P=128, initial=False)
    odd = [
        dict(B=2, T=1, N=4, H=128, P=128, gradient=False), dict(B=1, T=63, N=3, H=16, P=16),
        dict(B=1, T=100, N=4, H=64, P=128, packed=True),
        dict(B=2, T=129, N=6, H=80, P=96, per_token=True), dict(B=1, T=1000, N=8, H=24, P=24, dtype=jnp.float32, per_token=True),
        dict(B=1, T=1000, N=2, H=256, P=512, packed=True), dict(B=1, T=1000, N=2, H=256, P=512, dtype=jnp.float32, per_token=True),
        dict(B=1, T=500, N=2, H=192, P=192, dtype=jnp.float32), dict(B=1, T=300, N=2, H=300, P=700, packed=True),
        dict(B=3, T=17, N=5, H=33, P=7, per_token=True), dict(B=1, T=2000, N=4, H=64, P=64, dtype=jnp.float32, packed=True),
        dict(B=1, T=4096, N=2, H=128, P=128, per_token=True, packed=True),
    ]
    named = lambda x: " ".join(f"{key}={getattr(value, '__name__', value)}" for key, value in x.items())  # noqa: E731
    return {
        "production": {"forward": program(**production, gradient=False), "backward": program(**production, decay=False)},
        "odd": {named(x): program(**x) for x in odd},
    }

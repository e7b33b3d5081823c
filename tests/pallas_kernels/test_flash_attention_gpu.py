"""Attention on Hopper without one: kernels interpreted (jax 0.12) against the float64 reference, refusals, plans of blocks.

Where jax has no GPU interpreter that runs them, the tests of values assert that the kernel refuses with that reason.
`gpu_compile` compiles for an H200 that is not here; `gpu` is the grid for a machine that has one.
"""
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import flash_attention, target
from pallas_kernels.flash_attention import gpu_plan, xla
from pallas_kernels.flash_attention.mask import Index, Spec, sides, visible
from tests.numerics import assert_as_accurate

INTERPRETER = jax.__version_info__ >= (0, 12)


def normal(seed, shape, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def arrays(B, T, S, N, K, H, P, dtype=jnp.bfloat16):
    return tuple(jnp.asarray(normal(i, s), dtype) for i, s in enumerate(((B, T, N, H), (B, S, K, H), (B, S, K, P))))


def packed(B, T, parts=3):
    """Segments of ragged lengths, numbers from 1 that repeat in no row, padding at the end."""
    cuts = np.sort(np.random.default_rng(T).integers(1, T + 1, (B, parts)), 1)
    ids = 1 + (np.arange(T)[None, :, None] >= cuts[:, None]).sum(-1)
    return np.where(ids == parts + 1, 0, ids).astype(np.int32)


def shuffled(B, T, empty=0.1):
    """Order indices as a permuted shard has them, some slots empty."""
    rng = np.random.default_rng(T + 1)
    order = np.stack([rng.permutation(T) for _ in range(B)]).astype(np.int32)
    return np.where(rng.random((B, T)) < empty, -1, order).astype(np.int32)


def naive(q, k, v, index, sinks, spec):
    """The formula as written, in the dtype of the inputs: products rounded to it, softmax in float32."""
    G = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, G, 2) for x in (k, v))
    s = spec.scale * jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32)
    s = s if spec.soft_cap is None else spec.soft_cap * jnp.tanh(s / spec.soft_cap)
    see = visible(*sides(index, q.shape[1], k.shape[1], spec), spec)
    see = jnp.broadcast_to(see if see.ndim == 2 else see[:, None], s.shape)
    s = jnp.where(see, s, -1e30)
    sink = jnp.full((q.shape[2],), -jnp.inf) if sinks is None else sinks.astype(jnp.float32)
    lse = jnp.logaddexp(jax.nn.logsumexp(s, -1), sink[:, None])
    p = jnp.where(see, jnp.exp(s - lse[..., None]), 0.0).astype(q.dtype)
    lse = jnp.where(see.any(-1), lse, -jnp.inf).swapaxes(1, 2)
    return jnp.einsum("bnts,bsnp->btnp", p, v, preferred_element_type=jnp.float32).astype(q.dtype), lse


def case(B, T, N, H, S=None, K=None, P=None, dtype=jnp.bfloat16, sinks=False, **kwargs):
    return dict(sizes=(B, T, S or T, N, K or N, H, P or H), dtype=dtype, sinks=sinks, kwargs=kwargs)


def check(case, interpret, gradients=True):
    """Values and every gradient of the kernel against the float64 reference, next to the naive form's error."""
    q, k, v = arrays(*case["sizes"], dtype=case["dtype"])
    kwargs = case["kwargs"]
    sinks = (jnp.asarray(normal(3, (q.shape[2],))),) if case["sinks"] else ()
    B, T, N, P = (*q.shape[:3], v.shape[3])
    weights, lse_weights = normal(8, (B, T, N, P)), normal(9, (B, T, N))

    def graded(f):
        def scalar(q, k, v, *sinks):
            out, lse = f(q, k, v, *sinks)
            finite = jnp.where(jnp.isinf(lse), 0.0, lse)
            return (jnp.asarray(weights, q.dtype) * out).sum(dtype=lse.dtype) + (lse_weights * finite).sum(), (out, lse)

        def run(*args):
            if not gradients:
                return f(*args)
            grads, values = jax.grad(scalar, tuple(range(len(args))), has_aux=True)(*args)
            return (*values, *grads)

        return jax.jit(run)

    call = lambda implementation, **more: lambda q, k, v, *sinks: flash_attention(  # noqa: E731
        q, k, v, sinks=sinks[0] if sinks else None, return_residual=True, implementation=implementation, **kwargs, **more)
    if interpret and not INTERPRETER:
        with pytest.raises(NotImplementedError, match="pallas_gpu.*has no GPU interpreter"):
            call("pallas_gpu")(q, k, v, *sinks)
        return
    got = graded(call("pallas_gpu", interpret=interpret))(q, k, v, *sinks)
    plain = graded(lambda q, k, v, *sinks: call_naive(q, k, v, sinks[0] if sinks else None, kwargs))(q, k, v, *sinks)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in (q, k, v, *sinks)]
        weights = np.asarray(jnp.asarray(weights, q.dtype), np.float64)
        want = [np.asarray(x) for x in graded(call("reference"))(*wide)]
    dead = np.isinf(want[1])
    np.testing.assert_array_equal(np.isinf(np.asarray(got[1])), dead)
    assert not np.asarray(got[0], np.float32)[dead].any(), "a row that sees nothing is not zero"
    finite = lambda x: np.where(dead, 0.0, np.asarray(x))  # noqa: E731
    assert_as_accurate("lse", jnp.asarray(finite(got[1])), finite(want[1]), finite(plain[1]))
    for i, name in enumerate(("out", "dq", "dk", "dv", "dsinks")[: len(got) - 1]):
        at = i if i == 0 else i + 1
        floor = 2.0**-8 * (1.0 if name == "dsinks" else 0.1)  # of terms of order one, and of tenths
        g, w, p = got[at], want[at], plain[at]
        if name == "dsinks":
            g, p = g.astype(case["dtype"]), p.astype(case["dtype"])  # a sum of products that were rounded to it
        assert_as_accurate(name, g, w, p, gradient=i > 0, floor=floor)


def call_naive(q, k, v, sinks, kwargs):
    """`naive` behind the arguments of the public function."""
    index, spec = described(q, kwargs)
    return naive(q, k, v, index, sinks, spec)


def described(q, kwargs):
    """(Index, Spec) of a call."""
    pairs = ((name, kwargs.get(name)) for name in ("segment_ids", "positions"))
    index = [None if x is None else jnp.asarray(x) for name, own in pairs for x in (own, kwargs.get(f"kv_{name}", own))]
    field = lambda name, default=None: kwargs.get(name, default)  # noqa: E731
    return Index(*index), Spec(field("is_causal", True), field("local_window_size"), field("global_tokens", 0), field("logits_soft_cap"),
                               field("scale", q.shape[-1] ** -0.5))


SMALL = {
    "causal, two heads per kv head": case(1, 200, 2, 64, K=1),
    "window, global, cap": case(1, 130, 1, 64, local_window_size=20, global_tokens=3, logits_soft_cap=3.0),
    "packed, sinks": case(1, 200, 2, 64, K=1, sinks=True, segment_ids=packed(1, 200)),
}
FURTHER = {
    "one token": case(1, 1, 2, 64),
    "not causal, one query": case(1, 1, 2, 80, S=70, is_causal=False),
    "more queries than keys": case(1, 140, 1, 64, S=9),
    "more keys than queries": case(2, 9, 1, 16, S=140),
    "head dim 128": case(1, 129, 2, 128, K=1),
    "head dim 256": case(1, 129, 1, 256),
    "head dim 192, value dim 128": case(1, 70, 1, 192, P=128),
    "value dim above head dim": case(1, 70, 1, 96, P=256, is_causal=False),
    "float16": case(1, 100, 1, 64, dtype=jnp.float16),
    "symmetric window, global": case(1, 200, 1, 64, is_causal=False, local_window_size=9, global_tokens=5),
    "window 0": case(1, 130, 1, 64, local_window_size=0),
    "packed, window, global": case(2, 200, 1, 64, segment_ids=packed(2, 200), local_window_size=17, global_tokens=2),
    "permuted, empty slots, window, sinks": case(2, 200, 2, 64, K=1, positions=shuffled(2, 200), local_window_size=30, sinks=True),
    "permuted, packed, not causal": case(1, 140, 1, 64, positions=shuffled(1, 140), segment_ids=packed(1, 140), is_causal=False,
                                         logits_soft_cap=2.0),
    "negative scale": case(1, 100, 1, 64, scale=-0.2),
    "scale 0": case(1, 100, 1, 64, scale=0.0),
}


@pytest.mark.parametrize("name", SMALL)
def test_interpreted_values_and_gradients(name):
    check(SMALL[name], True)


@pytest.mark.slow
@pytest.mark.parametrize("name", FURTHER)
def test_interpreted_further_values_and_gradients(name):
    check(FURTHER[name], True)


RACES = """
import jax, jax.numpy as jnp, numpy as np, sys
from jax.experimental.pallas import mosaic_gpu as plgpu
from pallas_kernels import flash_attention, gpu
if sys.argv[1] == "broken":  # gives the slot back before it is read
    wait, gpu.Ring.release_late = gpu.Ring.wait, gpu.Ring.release
    def early(ring, step):
        slot = wait(ring, step)
        ring.release_late(step)
        return slot
    gpu.Ring.wait, gpu.Ring.release = early, lambda ring, step: None
q, k, v = (jnp.asarray(np.random.default_rng(i).standard_normal((1, 700, n, 64)), jnp.bfloat16) for i, n in enumerate((2, 1, 1)))
segments = jnp.asarray(np.arange(700)[None] // 300 + 1, jnp.int32)
f = lambda *x: flash_attention(*x, segment_ids=segments, implementation="pallas_gpu", interpret=plgpu.InterpretGPUParams(detect_races=True))
g = jax.jit(jax.grad(lambda *x: f(*x).astype(jnp.float32).sum(), (0, 1, 2)))(q[:, :, :], k, v)
assert all(bool(jnp.isfinite(x.astype(jnp.float32)).all()) for x in g)
print("no race")
"""


@pytest.mark.slow
@pytest.mark.subprocess
@pytest.mark.parametrize("how", ["right", "broken"])
def test_interpreted_without_races(how):
    """Memory that nothing wrote is NaN in the interpreter, so this also shows that no such byte reaches a gradient."""
    done = subprocess.run([sys.executable, "-c", RACES, how], capture_output=True, text=True, timeout=600, check=False)
    if not INTERPRETER:
        assert "interpret" in done.stderr.lower() and done.returncode != 0
    elif how == "right":
        assert done.stdout.strip() == "no race", done.stderr[-3000:]
    else:
        assert "race" in done.stderr.lower(), "the detector does not see a slot that is given back before it is read"


# Refusals: before anything is traced, with the reason and the alternative.


def on(monkeypatch, kind, platform="gpu", version=(0, 12, 0)):
    """The program is for this device, traced by this jax."""
    from pallas_kernels import dispatch, gpu

    for module in (dispatch, gpu):
        monkeypatch.setattr(module, "target", lambda: target.Target(platform, kind))
    monkeypatch.setattr(jax, "__version_info__", version)


@pytest.mark.parametrize("kind, reason", [
    ("NVIDIA A100-SXM4-80GB", "needs a Hopper GPU .*this is NVIDIA A100"),
    ("NVIDIA B200", "needs a Hopper GPU .*this is NVIDIA B200"),
    ("Tesla V100-SXM2-32GB", "needs a Hopper GPU"),
])
def test_other_gpus_are_refused(kind, reason, monkeypatch):
    on(monkeypatch, kind)
    with pytest.raises(NotImplementedError, match=rf"flash_attention\[pallas_gpu\]: it {reason}.*Use implementation='xla'"):
        flash_attention(*arrays(1, 8, 8, 1, 1, 64, 64), implementation="pallas_gpu")


@pytest.mark.parametrize("version", [(0, 11, 2), (0, 12, 0)])
@pytest.mark.parametrize("kind", ["NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA H200", "NVIDIA H20", "NVIDIA GH200 480GB"])
def test_hopper_is_taken(kind, version, monkeypatch):
    from pallas_kernels.flash_attention import gpu

    on(monkeypatch, kind, version=version)
    q, k, v = arrays(1, 8, 8, 1, 1, 64, 64)
    assert gpu.unsupported(q, k, v, Index(), None, Spec(True, None, 0, None, 1.0)) is None


def test_other_dtypes_and_sizes_are_refused(monkeypatch):
    on(monkeypatch, "NVIDIA H200")
    with pytest.raises(NotImplementedError, match="float32 as tf32"):
        flash_attention(*arrays(1, 8, 8, 1, 1, 64, 64, jnp.float32), implementation="pallas_gpu")
    with pytest.raises(NotImplementedError, match="head dim 320 is above 256"):
        flash_attention(*arrays(1, 8, 8, 1, 1, 64, 320), implementation="pallas_gpu")


@pytest.mark.parametrize("platform, kind, version, reason", [
    ("cpu", "cpu", (0, 11, 2), "is below 0.12: it has no GPU interpreter that runs them"),
    ("gpu", "NVIDIA H200", (0, 11, 1), "is below 0.11.2: older than all that these kernels were compiled with"),
])
def test_old_jax_is_refused_with_the_reason(platform, kind, version, reason, monkeypatch):
    on(monkeypatch, kind, platform, version)
    with pytest.raises(NotImplementedError, match=reason):
        flash_attention(*arrays(1, 8, 8, 1, 1, 64, 64), implementation="pallas_gpu")


def test_none_picks_no_gpu_kernel_that_was_not_seen_right(monkeypatch):
    from pallas_kernels import dispatch

    on(monkeypatch, "NVIDIA H200")
    q, k, v = arrays(1, 8, 8, 1, 1, 64, 64)
    picked = dispatch.pick("flash_attention", "attend", None, None, (q, k, v, Index(), None, Spec(True, None, 0, None, 1.0)))
    assert ("flash_attention" in dispatch.SEEN_RIGHT_ON_A_GPU) or picked is xla.attend


# Plans: which blocks are visited, against the whole mask.


def blocks_of(see, rows, columns, whole):
    """bool per block: any entry, or (whole) every entry, of the mask padded with its neutral value."""
    pad = [(0, -n % size) for n, size in zip(see.shape, (rows, columns))]
    see = np.pad(see, pad, constant_values=whole)
    tiles = see.reshape(see.shape[0] // rows, rows, see.shape[1] // columns, columns)
    return tiles.all((1, 3)) if whole else tiles.any((1, 3))


@pytest.mark.parametrize("seed", range(20))
def test_static_plans_visit_what_is_seen_and_mask_what_needs_it(seed):
    draw = np.random.default_rng(seed).choice
    T, S = draw([1, 16, 63, 100, 300], 2)
    window = draw([None, 0, 5, 70, 1000])
    spec = Spec(bool(draw([True, False])), window, 0 if window is None else int(draw([0, 3, 40])), None, 1.0)
    shape = gpu_plan.Shape(int(T), int(S), int(draw([16, 32])), int(draw([16, 32])))
    see = np.asarray(visible(*sides(Index(), T, S, spec), spec))
    size = shape.q_rows, shape.k_rows
    for plan, any_, all_ in (
        (gpu_plan.keys_of, blocks_of(see, *size, False), blocks_of(see, *size, True)),
        (gpu_plan.queries_of, blocks_of(see, *size, False).T, blocks_of(see, *size, True).T),
    ):
        ranges = jax.vmap(lambda t: plan(t, shape, spec))(jnp.arange(len(any_), dtype=jnp.int32))  # noqa: B023
        for tile in range(len(any_)):
            one = gpu_plan.Ranges(*(np.asarray(x)[tile] for x in ranges))
            masked, total = (int(x) for x in one.counts())
            steps = [int(x) for x in one.block(np.arange(total, dtype=np.int32))]
            assert len(set(steps)) == total and set(np.flatnonzero(any_[tile])) <= set(steps)
            assert total <= any_[tile].sum() + 1, "blocks that nobody sees are visited"
            whole = set(steps[masked:])
            assert all(all_[tile][j] for j in whole)
            if plan is gpu_plan.keys_of and S % shape.k_rows:  # keys past S need the mask, queries past T do not
                assert len(any_[tile]) - 1 not in whole


@pytest.mark.parametrize("seed", range(4))
def test_traced_plans_visit_what_is_seen_and_mask_what_needs_it(seed):
    rng = np.random.default_rng(seed)
    B, T = 2, int(rng.choice([5, 70, 200]))
    segments, positions = (f(B, T) if rng.random() < 0.7 else None for f in (packed, shuffled))
    if segments is None and positions is None:
        positions = shuffled(B, T)
    window = rng.choice([None, 0, 20])
    spec = Spec(bool(rng.random() < 0.5), window, 0 if window is None else int(rng.choice([0, 3])), None, 1.0)
    index = Index(*(None if x is None else jnp.asarray(x) for x in (segments, segments, positions, positions)))
    q_rows, k_rows, up = 16, 32, -(-T // 32) * 32
    ids = gpu_plan.ids(index, T, T, spec, up, up)
    see = np.zeros((B, up, up), bool)
    see[:, :T, :T] = visible(*sides(index, T, T, spec), spec)
    q, k = np.asarray(ids.q_B2T)[:, :, :, None], np.asarray(ids.k_B3S)[:, :, None, :]
    np.testing.assert_array_equal(gpu_plan.see_by_ids([q[:, i] for i in range(2)], [k[:, i] for i in range(3)]), see)
    for of_keys in (False, True):
        visits = gpu_plan.visits(ids, q_rows, k_rows, of_keys)
        for b in range(B):
            any_, all_ = (blocks_of(see[b], q_rows, k_rows, whole) for whole in (False, True))
            any_, all_ = (any_.T, all_.T) if of_keys else (any_, all_)
            for tile, (masked, total) in enumerate(np.asarray(visits.count_BX2)[b]):
                steps = np.asarray(visits.order_BXY)[b, tile, :total].tolist()
                assert set(np.flatnonzero(any_[tile])) <= set(steps) and len(set(steps)) == total
                assert set(steps[masked:]) == set(np.flatnonzero(all_[tile]))


# For a GPU that is not here, and for one that is.


def forward(**kwargs):
    return lambda q, k, v, *ids: flash_attention(q, k, v, implementation="pallas_gpu", interpret=False, return_residual=True, **kwargs,
                                                 **dict(zip(("segment_ids", "positions"), ids)))


def backward(**kwargs):
    def f(q, k, v, *ids):
        out, pull = jax.vjp(lambda q, k, v: forward(**kwargs)(q, k, v, *ids)[0], q, k, v)
        return pull(out)

    return f


def deep(q, k, v):
    """Three layers as a model runs them: shard_map inside remat inside scan."""
    mesh, rows = jax.sharding.get_abstract_mesh(), jax.sharding.PartitionSpec("x")
    attend = jax.shard_map(lambda *x: forward()(*x)[0], mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    layer = jax.checkpoint(lambda x, _: (x + attend(x, k, v), None))
    return jax.lax.scan(layer, q, None, length=3)[0].astype(jnp.float32).sum()


def shapes(B, T, N, H, S=None, K=None, P=None, ids=0, dtype=jnp.bfloat16):
    S, K, P = S or T, K or N, P or H
    return (((B, T, N, H), dtype), ((B, S, K, H), dtype), ((B, S, K, P), dtype), *[((B, T), jnp.int32)] * ids)


def gpu_cases():
    """{kind: {name: (function, shapes)}} for the sm_90a compile test."""
    production = {f"attention {'backward' if f is backward else 'forward'} {H}": (f(), shapes(1, 16384, 8, H, K=4))
                  for H in (64, 128, 256) for f in (forward, backward)}
    odd = {
        "one token": (backward(), shapes(1, 1, 2, 64)),
        "odd lengths, window, cap": (backward(local_window_size=20, global_tokens=3, logits_soft_cap=30.0), shapes(2, 1001, 2, 80, S=999)),
        "not causal, P > H": (backward(is_causal=False), shapes(1, 129, 2, 96, P=256)),
        "192 and 128": (backward(), shapes(1, 2000, 2, 192, P=128)),
        "packed": (backward(), shapes(2, 1000, 4, 128, K=1, ids=1)),
        "packed, permuted, window 256": (backward(local_window_size=100, global_tokens=2), shapes(1, 500, 2, 256, ids=2)),
        "float16": (backward(), shapes(1, 512, 2, 64, dtype=jnp.float16)),
        "sharded, scanned, rematerialised": (jax.grad(deep, (0, 1, 2)), shapes(2, 512, 2, 64)),
        "vmap": (jax.vmap(backward()), tuple(((3, *shape), dtype) for shape, dtype in shapes(2, 200, 2, 64))),
    }
    return {"production": production, "odd": odd}


COMPILED = {name: entry for kind in gpu_cases().values() for name, entry in kind.items()}


@pytest.mark.gpu_compile
@pytest.mark.parametrize("name", COMPILED)
def test_compiles_for_sm_90a(name):
    from tests.pallas_kernels.h200 import compile_for_h200

    f, arguments = COMPILED[name]
    text = compile_for_h200(f, *arguments).as_text()
    wide = arguments[0][0][-1] + arguments[2][0][-1] > 256
    backward_kernels = () if "forward" in name else ("dq", "dk", "dv") if wide else ("dq", "dk_dv")
    assert set(re.findall(r"flash_attention_(\w+)_mosaic_gpu", text)) == {"forward", *backward_kernels}


GRID = {f"{T} x {H} {label}": case(2, T, 4, H, K=2, **kwargs)
        for T in (1, 63, 64, 100, 127, 128, 129, 500, 1000, 2000) for H in (16, 64, 80, 96, 128, 192, 256)
        for label, kwargs in {
            "causal": {}, "full": dict(is_causal=False), "window": dict(local_window_size=100, global_tokens=5),
            "cap": dict(logits_soft_cap=5.0), "packed": dict(segment_ids=packed(2, T), sinks=True),
            "permuted": dict(positions=shuffled(2, T), local_window_size=200)}.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*SMALL, *FURTHER, *GRID])
def test_on_a_gpu(name):
    assert jax.default_backend() == "gpu", "no GPU: JAX_PLATFORMS=cuda python -m pytest -m gpu"
    check({**SMALL, **FURTHER, **GRID}[name], False)


@pytest.mark.gpu
@pytest.mark.parametrize("H", [64, 128, 256])
def test_two_runs_on_a_gpu_are_bitwise_equal(H):
    assert jax.default_backend() == "gpu", "no GPU: JAX_PLATFORMS=cuda python -m pytest -m gpu"
    args = arrays(2, 1000, 1000, 4, 2, H, H)
    run = jax.jit(backward())
    for a, b in zip(run(*args), run(*args)):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))

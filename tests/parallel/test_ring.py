"""Attention over a split sequence equals attention on one device, values and every gradient, in every form and layout.

Letters: B batch, T time, c tokens of one shard, N heads, K kv heads, H head dim, P value dim, n shards of time.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

import pallas_kernels
from effmodels.config import ConfigError
from effmodels.parallel import axes, layouts, mesh, ops, ring, ulysses
from effmodels.parallel.options import LAYOUTS, Options
from tests.contract.cases import draw, jit
from tests.numerics import assert_close, assert_trees_close, relative_rms

FORMS = {"ring": ring.attend, "ulysses": ulysses.attend}
FEATURES = {
    "causal": {},
    "both ways": {"is_causal": False},
    "packed": {"packed": True},
    "gqa": {"kv_heads": 2},
    "mqa": {"kv_heads": 1},
    "window": {"local_window_size": 4},
    "window both ways": {"local_window_size": 4, "is_causal": False},
    "soft cap": {"logits_soft_cap": 1.5},
    "sinks": {"sinks": True},
    "all": {"packed": True, "kv_heads": 2, "local_window_size": 9, "logits_soft_cap": 1.5, "sinks": True, "scale": 0.7},
}
Q = PartitionSpec(None, "seq")


def shards(n):
    return Mesh(np.array(jax.devices()[:n]), ("seq",), axis_types=(AxisType.Auto,))


def case(T, packed=False, kv_heads=8, sinks=False, dtype=np.float64, **options):
    """(arrays q, k, v, sinks or None; segments or None; options of the kernel)."""
    B, N, H, P = 2, 8, 5, 3
    arrays = [draw(B, T, N, H), draw(B, T, kv_heads, H, seed=1), draw(B, T, kv_heads, P, seed=2), draw(N, seed=3) if sinks else None]
    # Padding in front and behind, documents that cross shards, and one of a single token.
    place = np.arange(T)
    segments = np.stack([place * 3 // T, np.where(place == T // 2, 2, place < T - 3)]).astype(np.int32) if packed else None
    return [None if x is None else x.astype(dtype) for x in arrays], segments, options


def value_and_gradients(f, weights_seed=7):
    def loss(arrays):
        out = f(*arrays)
        return jnp.sum(out * draw(*out.shape, seed=weights_seed).astype(out.dtype)), out

    return jax.value_and_grad(loss, has_aux=True)


def one_device(arrays, segments, options):
    arrays = [None if x is None else x.astype(np.float64) for x in arrays]
    f = functools.partial(pallas_kernels.flash_attention, segment_ids=segments, implementation="reference", **options)
    return jit(value_and_gradients(lambda q, k, v, sinks: f(q, k, v, sinks=sinks)))(arrays)


def split(form, layout, n, segments, options, placed=True, implementation="xla"):
    """f(q, k, v, sinks) of whole arrays in the order of the row."""

    def local(q, k, v, sinks, segments, positions):
        ids = {} if placed else {"positions": positions, "kv_positions": positions}
        if segments is not None:
            ids |= {"segment_ids": segments, "kv_segment_ids": segments}
        return FORMS[form](q, k, v, axis=("seq",), layout=layout, sinks=sinks, implementation=implementation, **ids, **options)

    def f(q, k, v, sinks):
        B, T = q.shape[:2]
        there = functools.partial(layouts.to_layout, layout=layout, pieces=n)
        positions = np.broadcast_to(layouts.order(layout, T, n), (B, T))
        specs = (Q, Q, Q, PartitionSpec(), Q, Q)
        run = jax.shard_map(local, mesh=shards(n), in_specs=specs, out_specs=Q, check_vma=False)
        out = run(there(q), there(k), there(v), sinks, None if segments is None else there(jnp.asarray(segments)), positions)
        return layouts.from_layout(out, layout, n)

    return f


def check(form, layout, n, feature, implementation="xla", c=6, dtype=np.float64, rel=1e-11, **how):
    arrays, segments, options = case(c * n, dtype=dtype, **FEATURES[feature])
    want = one_device(arrays, segments, options)
    got = jit(value_and_gradients(split(form, layout, n, segments, options, implementation=implementation, **how)))(arrays)
    assert_trees_close(got, want, rel=rel)


@pytest.mark.parametrize(
    "layout, n, feature, how",
    [
        ("contiguous", 8, "causal", {"c": 5}),
        ("contiguous", 4, "window", {"c": 3}),  # three neighbours, and the last shard is not met
        ("contiguous", 8, "window both ways", {}),
        ("zigzag", 8, "all", {}),
        pytest.param("zigzag", 4, "all", {"placed": False}, marks=pytest.mark.slow),
        ("zigzag", 2, "sinks", {"implementation": "reference"}),
        ("striped", 4, "all", {"c": 5}),
        ("striped", 8, "packed", {"implementation": "reference", "placed": False}),
        pytest.param("contiguous", 1, "all", {}, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_ring_equals_one_device(layout, n, feature, how, x64):
    check("ring", layout, n, feature, **how)


@pytest.mark.parametrize(
    "layout, n, feature, how",
    [
        ("zigzag", 4, "all", {}),
        ("striped", 8, "mqa", {"c": 5}),
        pytest.param("contiguous", 2, "all", {"placed": False}, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_ulysses_equals_one_device(layout, n, feature, how, x64):
    check("ulysses", layout, n, feature, **how)


@pytest.mark.slow
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_every_feature_in_every_layout(form, layout, n, feature, x64):
    check(form, layout, n, feature, "reference" if n == 4 else "xla", c=5 if layout != "zigzag" else 6, placed=n != 2)


@pytest.mark.parametrize("form, layout", [("ring", "zigzag"), ("ulysses", "contiguous")])
def test_float32(form, layout):
    check(form, layout, 4, "all", dtype=np.float32, rel=1e-5)


def test_bfloat16_is_as_accurate_as_on_one_device():
    """Parts are joined, and gradients summed, in float32: a ring of eight adds nothing to the rounding of operands and results.

    dq and dk know of the output what was kept of it, which is rounded.
    """
    arrays, segments, options = case(96, **FEATURES["gqa"])
    arrays = [None if x is None else x.astype(jnp.bfloat16) for x in arrays]
    whole = functools.partial(pallas_kernels.flash_attention, segment_ids=segments, implementation="xla", **options)
    one = value_and_gradients(lambda q, k, v, sinks: whole(q, k, v, sinks=sinks))
    many = value_and_gradients(split("ring", "zigzag", 8, segments, options))
    run = jit(lambda x: (one(jax.tree.map(lambda a: a.astype(jnp.float32), x)), one(x), many(x)))
    want, alone, ring_of_eight = ((out, *gradients[:3]) for ((_, out), gradients) in run(arrays))
    for name, exact, a, b, times in zip(("out", "dq", "dk", "dv"), want, alone, ring_of_eight, (1.05, 1.5, 1.5, 1.05)):
        assert b.dtype == jnp.bfloat16
        assert_close(name, b, exact, times * relative_rms(a, exact))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_a_result_in_float32(implementation):
    q, k, v = (jnp.asarray(draw(1, 9, 2, 4, seed=i), jnp.bfloat16) for i in range(3))
    run = functools.partial(pallas_kernels.flash_attention, implementation=implementation)
    f = functools.partial(run, out_dtype=jnp.float32)
    narrow, wide, gradients = jit(lambda *a: (run(*a), f(*a), jax.grad(lambda *a: (f(*a) ** 2).sum(), (0, 1, 2))(*a)))(q, k, v)
    assert wide.dtype == jnp.float32 and relative_rms(wide.astype(jnp.bfloat16), narrow) == 0 < relative_rms(wide, narrow)
    assert all(x.dtype == jnp.bfloat16 and jnp.abs(x).max() > 0 for x in gradients)


def test_the_tpu_kernel_in_a_ring():
    check("ring", "zigzag", 2, "gqa", "pallas_tpu", c=8, dtype=np.float32, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_tpu_kernel_in_a_larger_ring(layout):
    check("ring", layout, 4, "all", "pallas_tpu", c=130, dtype=np.float32, rel=1e-5)


# Through the door, beside other axes.


@pytest.mark.parametrize(
    "form, layout", [("ring", "zigzag"), ("ulysses", "contiguous"), ("all_gather", "zigzag"), ("all_gather", "striped")]
)
def test_beside_data_and_tensor_in_scanned_rematerialised_layers(form, layout, x64):
    B, T, N, K, H = 4, 12, 8, 2, 4
    x, w, sinks = draw(B, T, N * H), draw(2, N * H, N * H, seed=1) / 6, draw(N, seed=3)
    segments = np.minimum(np.arange(T) // 5 + np.arange(B)[:, None] % 2, 2).astype(np.int32)

    def layers(x, w, sinks, n=1):
        to = functools.partial(layouts.to_layout, layout=layout if n > 1 else "contiguous", pieces=n)
        positions = jnp.broadcast_to(to(np.arange(T, dtype=np.int32), axis=0), (B, T))

        @jax.checkpoint
        def layer(x, w):
            q = (x @ w).reshape(B, T, N, H)
            y = ops.attention(q, q[:, :, :K], q[:, :, K : 2 * K], sinks=sinks, segment_ids=to(segments), positions=positions,
                              local_window_size=7, implementation="reference")  # fmt: skip
            return x + y.reshape(x.shape), None

        out = jax.lax.scan(layer, to(x), w)[0]
        return layouts.from_layout(out, layout if n > 1 else "contiguous", n)

    want = jit(value_and_gradients(layers))([x, w, sinks])
    with axes.use(mesh.make_mesh({"data": 2, "seq": 2, "tensor": 2}), None, Options(layout=layout, attention=form)):
        got = jit(value_and_gradients(functools.partial(layers, n=2)))([x, w, sinks])
    assert_trees_close(got, want, rel=1e-11)


def test_under_vmap_over_stages(x64):
    """The pipeline maps its stages over a mesh axis."""
    arrays = [draw(2, 2, 12, 4, 5, seed=i) for i in range(3)]
    run = lambda q, k, v: ops.attention(q, k, v, implementation="reference")  # noqa: E731
    want = jit(value_and_gradients(jax.vmap(run)))(arrays)
    with axes.use(mesh.make_mesh({"stage": 2, "seq": 4}), None, Options(layout="contiguous")):
        got = jit(value_and_gradients(jax.vmap(run, spmd_axis_name="stage")))(arrays)
    assert_trees_close(got, want, rel=1e-11)


def test_keys_of_another_length(x64):
    """Cross-attention: keys of a memory, split likewise."""
    q, k, v = draw(2, 12, 4, 5), draw(2, 20, 4, 5, seed=1), draw(2, 20, 4, 3, seed=2)
    local = functools.partial(ring.attend, axis=("seq",), layout="contiguous", is_causal=False, implementation="xla")
    got = jit(value_and_gradients(jax.shard_map(local, mesh=shards(4), in_specs=(Q, Q, Q), out_specs=Q, check_vma=False)))([q, k, v])
    whole = functools.partial(pallas_kernels.flash_attention, is_causal=False, implementation="reference")
    assert_trees_close(got, jit(value_and_gradients(whole))([q, k, v]), rel=1e-11)


def test_an_axis_of_several_mesh_axes(x64):
    arrays = [draw(1, 16, 2, 4, seed=i) for i in range(3)]
    two = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "seq"), axis_types=(AxisType.Auto,) * 2)
    spec = PartitionSpec(None, ("data", "seq"))
    local = functools.partial(ring.attend, axis=("data", "seq"), layout="contiguous", implementation="reference")
    got = jit(jax.shard_map(local, mesh=two, in_specs=(spec,) * 3, out_specs=spec, check_vma=False))(*arrays)
    want = jit(functools.partial(pallas_kernels.flash_attention, implementation="reference"))(*arrays)
    assert_trees_close(got, want, rel=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_gpu"])
def test_kernels_give_gradients_of_parts_of_the_keys(implementation):
    q, d_out, k, v = (jnp.asarray(draw(1, 40, heads, 64, seed=heads + i), jnp.bfloat16) for i, heads in enumerate((2, 2, 1, 1)))
    whole = functools.partial(pallas_kernels.flash_attention, return_residual=True, out_dtype="float32", implementation="reference")
    out, lse = jit(whole)(q, k, v)
    place = np.arange(40, dtype=np.int32)[None]

    def part(implementation, keys=slice(0, 13)):
        where = {"positions": place, "kv_positions": place[:, keys]}
        run = functools.partial(pallas_kernels.flash_attention_grads, implementation=implementation, **where)
        return jit(run)(q, k[:, keys], v[:, keys], lse, (out * d_out).sum(-1), d_out)

    if implementation == "pallas_gpu" and jax.__version_info__ < (0, 12):
        with pytest.raises(NotImplementedError, match="no GPU interpreter"):
            part(implementation)
        return
    got = part(implementation)
    assert all(x.dtype == jnp.float32 for x in got)
    assert_trees_close(got, part("reference"), rel=4e-3)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_gradients_of_parts_of_the_keys_add_up(implementation, x64):
    """The kernels' own door for rings: with the final logsumexp, dq of two parts of the keys add up, dk and dv lie side by side."""
    (q, k, v, sinks), segments, options = case(14, **FEATURES["all"])
    whole = functools.partial(pallas_kernels.flash_attention, segment_ids=segments, implementation="reference", **options)
    d_out, place = draw(2, 14, 8, 3, seed=5), np.broadcast_to(np.arange(14, dtype=np.int32), (2, 14))

    def part(keys, lse, delta):
        return pallas_kernels.flash_attention_grads(
            q, k[:, keys], v[:, keys], lse, delta, d_out, segment_ids=segments, kv_segment_ids=segments[:, keys],
            positions=place, kv_positions=place[:, keys], implementation=implementation, **options,
        )  # fmt: skip

    @jit
    def run():
        out, lse = whole(q, k, v, sinks=sinks, return_residual=True)
        delta = (out * d_out).sum(-1)
        (dq_a, *a), (dq_b, *b) = part(slice(0, 5), lse, delta), part(slice(5, 14), lse, delta)
        got = dq_a + dq_b, *(jnp.concatenate(x, axis=1) for x in zip(a, b))
        return got, jax.vjp(lambda *a: whole(*a, sinks=sinks), q, k, v)[1](d_out)

    assert_trees_close(*run(), rel=1e-11)


# Refusals.


def test_refusals():
    q, k = jnp.zeros((1, 8, 6, 4)), jnp.zeros((1, 8, 2, 4))

    def run(form, **options):
        local = functools.partial(FORMS[form], axis=("seq",), layout="contiguous", **options)
        return jax.shard_map(local, mesh=shards(4), in_specs=(Q, Q, Q), out_specs=Q, check_vma=False)(q, k, k)

    with pytest.raises(ConfigError, match="global_tokens=2 needs the first tokens.*parallel.attention='all_gather'"):
        run("ring", global_tokens=2, local_window_size=3)
    with pytest.raises(ConfigError, match="6 heads .* cannot be exchanged over 4 sequence shards; valid sequence shards: 2, 3, 6"):
        run("ulysses")
    with pytest.raises(ValueError, match="come in pairs"):
        run("ring", positions=jnp.zeros((1, 2), jnp.int32))
    with pytest.raises(ValueError, match=r"lse_BTN must have shape \(1, 8, 6\)"):
        pallas_kernels.flash_attention_grads(q, k, k, jnp.zeros((1, 8)), jnp.zeros((1, 8, 6)), q)


def test_a_window_counts_the_positions_that_are_given(x64):
    """Padding inside a row makes positions lag behind slots: keys of a far shard are near."""
    T, n = 32, 4
    arrays, _, _ = case(T)
    valid = (np.arange(T) < 4) | (np.arange(T) > 23)
    positions = np.broadcast_to(np.cumsum(valid) - valid, (2, T)).astype(np.int32)
    ids = {"segment_ids": np.broadcast_to(valid, (2, T)).astype(np.int32), "positions": positions}
    q, k, v, _ = arrays
    want = pallas_kernels.flash_attention(q, k, v, local_window_size=5, implementation="reference", **ids)
    with axes.use(mesh.make_mesh({"seq": n}, jax.devices()[:n]), None, Options(layout="contiguous")):
        got = jit(lambda q, k, v: ops.attention(q, k, v, local_window_size=5, implementation="xla", **ids))(q, k, v)
    assert_close("out", got, want, rel=1e-11)


def test_keys_that_are_split_on_their_own_are_refused():
    q = jnp.zeros((1, 8, 2, 4))
    with axes.use(mesh.make_mesh({"seq": 8}), {"kv_seq": "seq", "seq": None}), pytest.raises(ConfigError, match="rules.kv_seq: no form"):
        ops.attention(q, q, q)

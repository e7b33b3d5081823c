"""Retention over a split sequence equals retention on one device: values and every gradient; and what it sends and keeps.

Letters: B batch, T time, D model, N heads, H key dim, P value dim, n shards.
"""
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from effmodels.config import ConfigError
from effmodels.layers.context import Ctx
from effmodels.models import state as model_state
from effmodels.parallel import axes, layouts, mesh, ops
from effmodels.parallel.options import Options
from effmodels.plan import topology
from tests.contract.cases import D_MODEL, draw, jit, make
from tests.numerics import assert_trees_close

B, T, N, H, P = 4, 48, 2, 3, 5
# Shards of 6, 12, 16 and 24 tokens, and stretches of half of that. Documents that end at a border, inside and next to one; padding on the
# left, longer than a shard inside a document, on the right; one document over everything; a document that comes back, with padding between.
SEGMENTS = np.array([
    [1] * 6 + [2] * 5 + [3] * 13 + [4] * 1 + [5] * 23,
    [0] * 7 + [1] * 4 + [0] * 8 + [1] * 2 + [2] * 14 + [3] * 4 + [0] * 9,
    [1] * 48,
    [0] * 25 + [3] * 4 + [1] * 7 + [0] * 2 + [3] * 10,
], np.int32)  # fmt: skip


def inputs(per_token, packed, heads=N):
    log_decay = -0.05 * np.abs(draw(B, T, heads, seed=3) if per_token else draw(heads, seed=3))  # some of it passes through every shard
    arrays = draw(B, T, heads, H), draw(B, T, heads, H, seed=1), draw(B, T, heads, P, seed=2), log_decay, draw(B, heads, H, P, seed=4)
    return arrays, SEGMENTS if packed else None


def value(retain, *arrays):
    """A sum that depends on all that retention returns, and what it returns."""
    out = retain(*arrays)
    return sum(jnp.sum(o * draw(*o.shape, seed=8 + i)) for i, o in enumerate(out)), out


def gradients(retain):
    return jit(jax.grad(functools.partial(value, retain), argnums=(0, 1, 2, 3, 4), has_aux=True))


def whole(segments, **options):
    return lambda q, k, v, g, s: pallas_kernels.retention(
        q, k, v, g, initial_state=s, segment_ids=segments, output_final_state=True, **options
    )


def split(segments, layout, n, **options):
    put = lambda x: layouts.to_layout(x, layout, n)  # noqa: E731

    def retain(q, k, v, g, s):
        out, state = ops.retention(
            put(q), put(k), put(v), put(g) if g.ndim == 3 else g, initial_state=s, segment_ids=None if segments is None else put(segments),
            output_final_state=True, **options,
        )  # fmt: skip
        return layouts.from_layout(out, layout, n), state

    return retain


@functools.cache
def on_one_device(per_token, packed):
    arrays, segments = inputs(per_token, packed)
    return gradients(whole(segments, implementation="reference"))(*arrays)


def seq_mesh(n):
    return mesh.make_mesh({"seq": n}, devices=jax.devices()[:n])


CASES = [
    (2, "contiguous", "token", "packed", "log"), (2, "zigzag", "constant", "packed", "ring"),
    (3, "contiguous", "constant", "packed", "log"), (3, "zigzag", "token", "packed", "ring"),
    (4, "contiguous", "token", "whole", "ring"), (4, "zigzag", "token", "packed", "log"),
    (8, "contiguous", "constant", "packed", "ring"), (8, "zigzag", "token", "packed", "log"), (8, "zigzag", "constant", "whole", "ring"),
]  # fmt: skip
ALL = [(n, a, b, c, d) for n in (2, 3, 4, 8) for a in ("contiguous", "zigzag") for b in ("constant", "token") for c in ("packed", "whole")
       for d in ("ring", "log")]  # fmt: skip


@pytest.mark.parametrize("n, layout, decay, packed, states", [
    *CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL if case not in CASES),
])  # fmt: skip
def test_as_on_one_device(n, layout, decay, packed, states, x64):
    arrays, segments = inputs(decay == "token", packed == "packed")
    want = on_one_device(decay == "token", packed == "packed")
    with axes.use(seq_mesh(n), None, Options(layout=layout, states=states)):
        got = gradients(split(segments, layout, n, implementation="xla", chunk_size=4))(*arrays)
    assert_trees_close(got, want, rel=1e-11)


@pytest.mark.parametrize("sizes, layout", [({"data": 2, "seq": 2, "tensor": 2}, "zigzag"), ({"fsdp": 2, "seq": 4}, "contiguous")], ids=str)
def test_beside_other_axes(sizes, layout, x64):
    """The gradient of a constant decay is a sum over data and time, and of a head over neither."""
    arrays, segments = inputs(False, True)
    with axes.use(mesh.make_mesh(sizes), None, Options(layout=layout)):
        got = gradients(split(segments, layout, sizes["seq"], implementation="reference"))(*arrays)
    assert_trees_close(got, on_one_device(False, True), rel=1e-11)


@pytest.mark.parametrize("per_token", [False, True], ids=["constant", "token"])
def test_float32_and_extreme_decays(per_token):
    """Heads that forget everything, nothing, and by the book."""
    log_decay = np.array([-30.0, 0.0, -0.1], np.float32)
    arrays, segments = inputs(per_token, True, heads=3)
    arrays = [x.astype(np.float32) for x in arrays]
    arrays[3] = np.random.default_rng(0).permuted(np.broadcast_to(log_decay, (B, T, 3)), axis=1) if per_token else log_decay
    want = gradients(whole(segments, implementation="xla"))(*arrays)
    with axes.use(seq_mesh(4), None, Options(layout="zigzag")):
        got = gradients(split(segments, "zigzag", 4, implementation="xla"))(*arrays)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))
    assert_trees_close(got, want, rel=1e-5)


def test_decay_of_zero():
    """exp(-inf): every token forgets all before it, and no gradient is nan."""
    arrays, segments = inputs(False, True)
    arrays = [x.astype(np.float32) for x in arrays]
    arrays[3] = np.array([-np.inf, -0.5], np.float32)
    want = gradients(whole(segments, implementation="xla"))(*arrays)
    with axes.use(seq_mesh(2)):
        got = gradients(split(segments, "contiguous", 2, implementation="xla"))(*arrays)
    assert_trees_close(got, want, rel=1e-5)


def test_in_scan_and_remat(x64):
    (q, k, v, g, s), segments = inputs(True, True)

    def two_layers(retain, q, k, v, g, s):
        layer = jax.checkpoint(lambda q, _: (q + retain(q, k, v, g, s)[0] @ np.ones((P, H)), None))
        return (jax.lax.scan(layer, q, None, length=2)[0],)

    want = gradients(functools.partial(two_layers, whole(segments, implementation="xla")))(q, k, v, g, s)
    with axes.use(seq_mesh(4), None, Options(layout="zigzag")):
        got = gradients(functools.partial(two_layers, split(segments, "zigzag", 4, implementation="xla")))(q, k, v, g, s)
    assert_trees_close(got, want, rel=1e-11)


def test_under_stages(x64):
    """Inside a vmap over the stages of a pipeline."""
    arrays, segments = inputs(True, True)
    two = [np.stack([a, 0.5 * a]) for a in arrays]

    def staged(retain, **options):
        def total(*two):
            out = jax.vmap(retain, **options)(*two)
            return sum(jnp.sum(o * draw(*o.shape, seed=8 + i)) for i, o in enumerate(out)), out

        return jit(jax.grad(total, argnums=(0, 1, 2, 3, 4), has_aux=True))(*two)

    want = staged(whole(segments, implementation="xla"))
    with axes.use(mesh.make_mesh({"stage": 2, "seq": 4}), None, Options(layout="zigzag")):
        got = staged(split(segments, "zigzag", 4, implementation="xla"), spmd_axis_name="stage")
    assert_trees_close(got, want, rel=1e-11)


def test_the_mixer(x64):
    """Retention with its rotary positions, gate and head norm under a zigzag layout: values, and the gradients of input and parameters."""
    graphdef, params, buffers = make("retention", {"num_heads": 2, "chunk": 4})
    x_BTD = draw(B, T, D_MODEL)

    def run(layout, n):
        put = lambda x: layouts.to_layout(x, layout, n)  # noqa: E731
        ctx = Ctx(index_BT=put(np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))), segment_ids_BT=put(SEGMENTS), layout=layout)

        def total(params, x_BTD):
            y_BTD = layouts.from_layout(model_state.merge(graphdef, params, buffers)(put(x_BTD), ctx), layout, n)
            return jnp.sum(y_BTD * draw(B, T, D_MODEL, seed=1)), y_BTD

        return jit(jax.grad(total, (0, 1), has_aux=True))(params, x_BTD)

    want = run("contiguous", 1)
    with axes.use(seq_mesh(4), None, Options(layout="zigzag")):
        got = run("zigzag", 4)
    assert_trees_close(got, want, rel=1e-11)


def compiled(n, layout, states, tokens_per_shard, grad=False, dims=(2, 16, 32)):
    N, H, P = dims
    length = n * tokens_per_shard

    def total(q, k, v):
        return jnp.sum(ops.retention(q, k, v, jnp.log(jnp.linspace(0.8, 0.9, N)), implementation="xla"))

    with axes.use(seq_mesh(n), None, Options(layout=layout, states=states)):
        place = jax.NamedSharding(seq_mesh(n), jax.P(None, "seq"))
        shapes = [jax.ShapeDtypeStruct((1, length, N, d), jnp.float32, sharding=place) for d in (H, H, P)]
        return jax.jit(jax.grad(total, (0, 1, 2)) if grad else total).lower(*shapes).compile()


def sent(text):
    """Sizes of the float32 messages that one device sends by collective-permute."""
    shapes = re.findall(r"= f32\[([\d,]*)\]\S* collective-permute\(", text)
    return [math.prod(map(int, filter(None, s.split(",")))) for s in shapes]


@pytest.mark.parametrize("layout, states, n", [("contiguous", "ring", 4), ("contiguous", "log", 8), ("zigzag", "auto", 8)])
def test_bytes_sent(layout, states, n):
    """A message is one state per stretch. A ring is n - 1 of them, the log form 1 + ceil(log2(n - 1)), and beside them how much passes, one
    number per head. The backward pass sends as many states again."""
    N, H, P = 2, 16, 32
    messages = layouts.runs(layout) * (n - 1 if states == "ring" else 1 + math.ceil(math.log2(n - 1)))
    for grad in (False, True):
        text = compiled(n, layout, states, 8, grad).as_text()
        states_sent = [size for size in sent(text) if size == N * H * P]
        decays_sent = [size for size in sent(text) if size == N]
        assert len(states_sent) == messages * (1 + grad)
        assert len(states_sent) + len(decays_sent) == len(sent(text)) and len(decays_sent) <= len(states_sent) * (states != "ring")
        assert "all-gather" not in text and "all-to-all" not in text


@pytest.mark.parametrize("states", ["ring", "log"])
def test_memory_of_a_device_stays_as_the_row_grows(states):
    sizes = [compiled(n, "contiguous", states, 64, grad=True).memory_analysis().temp_size_in_bytes for n in (2, 8)]
    assert sizes[1] < 1.1 * sizes[0], sizes


@pytest.mark.parametrize("layout, message", [
    ("striped", "single tokens of a 'striped' layout; use contiguous or zigzag"),
    ("zigzag", "2 equal stretches of the row, got 3 tokens; use rows of a multiple of 8"),
])  # fmt: skip
def test_refusals(layout, message):
    x = jnp.zeros((1, 12, 1, 2))
    with axes.use(seq_mesh(4), None, Options(layout=layout)), pytest.raises(ConfigError, match=message):
        ops.retention(x, x, x, jnp.zeros(1))


@pytest.mark.aot
@pytest.mark.parametrize("sizes, layout", [({"data": 1, "seq": 4}, "contiguous"), ({"data": 2, "seq": 2, "tensor": 2}, "zigzag")], ids=str)
def test_on_chips_only_states_travel(sizes, layout):
    """Forward and backward in scan and remat, compiled for v4: permutes of states, no gather; kernels in both passes."""
    B, T, N, H, P = 2, 2048, 4, 64, 128

    def total(q_BTNH, v_BTNP, scale_L):
        log_decay, segments = jnp.log(jnp.linspace(0.9, 0.99, N)), jnp.ones((B, T), jnp.int32)
        layer = jax.checkpoint(lambda q, a: (q + a * ops.retention(q, q, v_BTNP, log_decay, segment_ids=segments)[..., :H], None))
        return jax.lax.scan(layer, q_BTNH, scale_L)[0].astype(jnp.float32).sum()

    chips = topology.mesh("v4", **sizes)
    with axes.use(chips, None, Options(layout=layout)):
        place = jax.NamedSharding(chips, axes.spec(("batch", "seq", "act_heads", None), mesh=chips))
        shapes = [jax.ShapeDtypeStruct((B, T, N, d), jnp.bfloat16, sharding=place) for d in (H, P)]
        scale_L = jax.ShapeDtypeStruct((3,), jnp.bfloat16, sharding=jax.NamedSharding(chips, jax.P()))
        text = jax.jit(jax.grad(total, (0, 1, 2))).lower(*shapes, scale_L).compile().as_text()
    assert text.count("tpu_custom_call") >= 3 and "all-gather" not in text and "all-to-all" not in text
    state = "1,2,64,128" if "tensor" in sizes else "2,4,64,128"
    starts = re.findall(r"= \(\w+\[([\d,]*)\]\S* .*? collective-permute-start\(", text)
    assert state in starts, starts
    assert max(math.prod(map(int, filter(None, s.split(",")))) for s in starts) == math.prod(map(int, state.split(",")))

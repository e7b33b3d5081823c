"""Gated cross-attention: the contract of a mixer with a memory, the naive form, bit-equal logits at the start, decoding with images.

Letters: T time, S memory, D model, E width of the memory, N heads.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effmodels.config import ConfigError, ModelConfig
from effmodels.layers.context import Ctx, Memory
from effmodels.mixers.base import Env
from effmodels.mixers.cross_attention import CrossAttention
from effmodels.models import Decoder
from effmodels.models import state as model_state
from effmodels.parallel import axes, layouts, mesh
from effmodels.parallel.options import Options
from tests.contract.cases import decode_ctx, draw, fill, jacobian, jit
from tests.mixers.oracles import rms
from tests.numerics import assert_close, assert_trees_close

T, D, E = 13, 12, 7
FIELDS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 3, "memory_dim": E, "memory_len": 9, "qk_norm": True}
# Documents with two images, none, and one; entries of one image have one index; the last entry is padding.
DOCUMENTS = np.array([1] * 5 + [2] * 2 + [3] * 4 + [0] * 2, np.int32)
INDEX = np.array([0, 0, 3, 3, 3, 8, 8, 0], np.int32)
OF_DOCUMENT = np.array([1, 1, 1, 1, 1, 3, 3, 0], np.int32)
SEES = {0: [0, 1], 1: [0, 1], 2: [0, 1], 3: [2, 3, 4], 4: [2, 3, 4], 8: [5, 6], 9: [5, 6], 10: [5, 6]}


def make(fields=FIELDS):
    env = Env(d_model=D, param_dtype="float64", norm_eps=1e-3)
    return fill(lambda: CrossAttention(CrossAttention.Config(**fields), env, rngs=nnx.Rngs(0)))[:2]


def memory(x, index=INDEX, segments=OF_DOCUMENT):
    rows = lambda a: jnp.broadcast_to(a, (x.shape[0], *a.shape))  # noqa: E731
    return {"source": Memory(x, None if segments is None else rows(segments), rows(index))}


def naive(p, x, entries):
    """One row, head by head: every score, and a table of what each token sees."""
    y, sees = 0.0, np.array([[s in SEES.get(t, []) for s in range(8)] for t in range(T)])
    for n in range(4):
        q, k = (rms(jnp, a, 1e-3, p[f"{w}_norm.scale"]) for w, a in (("q", x @ p["wq"][:, n]), ("k", entries @ p["wk"][:, n // 2])))
        weights = jnp.where(sees, jnp.exp(q @ k.T / 3**0.5), 0.0)
        weights = weights / jnp.where(sees.any(axis=1), weights.sum(axis=1), 1.0)[:, None]
        y = y + weights @ (entries @ p["wv"][:, n // 2]) @ p["wo"][n]
    return jnp.tanh(p["gate"]) * y


def test_values_and_gradients_are_those_of_the_naive_form(x64):
    graphdef, params = make()
    x, entries, probe = draw(T, D, seed=1), draw(8, E, seed=2), draw(T, D, seed=3)

    @jit
    def run(*args):
        def of(f):
            return jax.grad(lambda *a: (jnp.sum(f(*a) * probe), f(*a)), argnums=(0, 1, 2), has_aux=True)(*args)

        def mixer(p, x, entries):
            ctx = Ctx(segment_ids_BT=DOCUMENTS[None], memory=memory(entries[None]))
            return model_state.merge(graphdef, p, {})(x[None], ctx)[0]

        return of(mixer), of(naive)

    (got_grads, got), (want_grads, want) = run(params, x, entries)
    assert_close("values", got, want, rel=1e-12)
    assert_trees_close(got_grads, want_grads, rel=1e-10)
    assert np.all(np.asarray(got)[[t for t in range(T) if t not in SEES]] == 0.0)


def test_tokens_stay_apart_and_see_no_other_image(x64):
    """Exact zeros of the Jacobians: no token depends on another one, or on an image that is not the latest of its document."""
    graphdef, params = make()

    def run(x, entries):
        ctx = Ctx(segment_ids_BT=DOCUMENTS[None], memory=memory(entries[None]))
        return model_state.merge(graphdef, params, {})(x[None], ctx)[0] @ draw(D, seed=3)

    @jit
    def both(x, entries):
        return jacobian(lambda x: run(x, entries), x), jacobian(lambda entries: run(x, entries), entries)

    by_token, by_entry = (np.abs(a).max(axis=-1) > 0 for a in map(np.asarray, both(draw(T, D), draw(8, E, seed=2))))
    assert np.array_equal(by_token, np.diag([t in SEES for t in range(T)]))
    assert np.array_equal(by_entry, [[s in SEES.get(t, []) for s in range(8)] for t in range(T)])


def test_prefill_chunks_and_steps_equal_call(x64):
    """Left padding and holes; the memory is given once, with the first chunk, and its entries by the number of valid tokens before."""
    graphdef, params = make()
    valid = np.ones((2, T), bool)
    valid[1, :2] = valid[1, 6] = valid[1, 12] = False
    x, entries = draw(2, T, D), draw(2, 8, E, seed=2)
    order = np.argsort(~valid, axis=1, kind="stable")
    compact = np.take_along_axis(x, order[..., None], axis=1)
    images = memory(jnp.asarray(entries), segments=(INDEX * 0 + 1) * (OF_DOCUMENT > 0))

    @jit
    def forms(params, x, compact):
        mixer = model_state.merge(graphdef, params, {})
        called = mixer(compact, Ctx(segment_ids_BT=jnp.ones((2, T), jnp.int32), memory=images))
        state, before, parts, given = mixer.init_state(2, T, jnp.float64), jnp.zeros((2, 1), jnp.int32), [], {"memory": images}
        for start, stop in ((0, 1), (1, 5), (5, 11)):
            here = valid[:, start:stop]
            ctx = Ctx(**{**vars(decode_ctx(here, before)), **given})
            y, state = mixer.prefill(x[:, start:stop], ctx, state, here)
            parts, before, given = [*parts, y], before + here.sum(axis=1, keepdims=True), {}
        for t in (11, 12):
            y, state = mixer.step(x[:, t], decode_ctx(valid[:, t : t + 1], before, "step"), state, valid[:, t])
            parts, before = [*parts, y[:, None]], before + valid[:, t : t + 1]
        return called, jnp.concatenate(parts, axis=1)

    called, got = forms(params, x, compact)
    want = np.take_along_axis(np.asarray(called), (np.cumsum(valid, axis=1) - valid)[..., None], axis=1)[valid]
    assert np.abs(want).max() > 0.01
    assert_close("chunks and steps", np.asarray(got)[valid], want, rel=1e-12)


@pytest.mark.parametrize("sizes, layout", [
    ({"seq": 4, "tensor": 2}, "contiguous"), pytest.param({"seq": 4, "tensor": 2}, "zigzag", marks=pytest.mark.slow),
    pytest.param({"data": 2, "fsdp": 2, "expert": 2}, "contiguous", marks=pytest.mark.slow),
])  # fmt: skip
def test_sharded_equals_one_device(sizes, layout, x64):
    """Values and gradients of parameters, text and images."""
    graphdef, params = make()
    x, entries, probe = draw(8, 16, D), draw(8, 8, E, seed=2), draw(8, 16, D, seed=3)
    documents = np.pad(DOCUMENTS, (0, 3))[None].repeat(8, axis=0)

    def run(params, x, entries, probe, documents):
        def loss(params, x, entries):
            y = model_state.merge(graphdef, params, {})(x, Ctx(segment_ids_BT=documents, memory=memory(entries)))
            return jnp.sum(y * probe), y

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(params, x, entries)

    (want_p, want_x, want_m), want = jit(lambda *a: run(*a, probe, documents))(params, x, entries)
    with axes.use(mesh.make_mesh(sizes), parallel=Options(layout=layout)):
        x, w, s = (layouts.to_layout(a, layout, sizes.get("seq", 1)) for a in (x, probe, documents))
        (got_p, got_x, got_m), got = jit(lambda *a: run(*a, w, s))(params, x, entries)
    assert_close("values", layouts.from_layout(np.asarray(got), layout, sizes.get("seq", 1)), want, rel=1e-12)
    assert_close("gradient of x", layouts.from_layout(np.asarray(got_x), layout, sizes.get("seq", 1)), want_x, rel=1e-11)
    assert_trees_close((got_p, got_m), (want_p, want_m), rel=1e-11)


def config(**fields):
    mixers = {"attention": {"num_heads": 2}, "cross_attention": {**FIELDS, "memory_len": 8}}
    return ModelConfig(
        vocab_size=20, d_model=D, num_layers=4, pattern=("cross_attention", "attention"), mixers=mixers,
        channels={"mlp": {"hidden": 16}}, **fields,
    )  # fmt: skip


def batch():
    tokens = np.random.default_rng(0).integers(0, 20, (1, T + 1)).astype(np.int32)
    source = {"source_x": draw(1, 8, E, dtype=np.float32), "source_index": INDEX[None], "source_segment_ids": OF_DOCUMENT[None]}
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": DOCUMENTS[None], **source}


@pytest.mark.slow
def test_logits_with_and_without_images_are_bit_equal_at_the_start():
    """The gates start at 0; opened, the images are seen. A scanned model of two periods, its loss included."""
    build = functools.partial(Decoder, config(), rngs=nnx.Rngs(0))
    graphdef, params, _ = model_state.split(build())
    given = batch()
    text = {name: a for name, a in given.items() if not name.startswith("source")}
    opened = {p: a + 0.5 if p.endswith("gate") else a for p, a in params.items()}

    @jit
    def run(params):
        model = model_state.merge(graphdef, params, {})
        images = {"source": Memory(given["source_x"], given["source_segment_ids"], given["source_index"])}
        logits = [model(given["tokens"], segment_ids=given["segment_ids"], memory=m) for m in (None, images)]
        return logits, [model.loss(b).ce_sum for b in (text, given)]

    assert any(p.endswith("gate") and np.all(np.asarray(a) == 0) for p, a in params.items())
    (without, with_images), (text_loss, image_loss) = run(params)
    assert np.array_equal(without, with_images) and text_loss == image_loss
    (without, with_images), (text_loss, image_loss) = run(opened)
    assert np.abs(np.asarray(without) - np.asarray(with_images)).max() > 1e-3 and text_loss != image_loss


@pytest.mark.slow
def test_a_model_decodes_with_images(x64):
    """Prefill in two pieces and steps equal the whole row; every layer computes its keys and values once."""
    graphdef, params, buffers = fill(lambda: Decoder(config(param_dtype="float64", compute_dtype="float64"), rngs=nnx.Rngs(0)))
    given = batch()
    images = {"source": Memory(jnp.asarray(given["source_x"], jnp.float64), (OF_DOCUMENT > 0)[None].astype(np.int32), INDEX[None])}

    @jit
    def run(params):
        model = model_state.merge(graphdef, params, buffers)
        whole = model(given["tokens"], segment_ids=np.ones((1, T), np.int32), memory=images)
        state, parts = model.init_state(1, T, memory=images), []
        for start, stop in ((0, 2), (2, 9)):
            logits, state = model.prefill(given["tokens"][:, start:stop], state)
            parts.append(logits)
        for t in range(9, T):
            logits, state = model.step(given["tokens"][:, t], state)
            parts.append(logits[:, None])
        return whole, jnp.concatenate(parts, axis=1)

    whole, parts = run(params)
    assert_close("logits", parts, whole, rel=1e-11)


def test_cost_is_what_is_compiled():
    D, S, length = 128, 48, 64
    env, fields = Env(d_model=D, implementation="reference"), CrossAttention.Config(num_heads=4, memory_dim=96, memory_len=S)
    graphdef, params, _ = model_state.split(nnx.eval_shape(lambda: CrossAttention(fields, env, rngs=nnx.Rngs(0))))
    images = {"source": Memory(jax.ShapeDtypeStruct((1, S, 96), jnp.float32), None, jax.ShapeDtypeStruct((1, S), jnp.int32))}
    x = jax.ShapeDtypeStruct((1, length, D), jnp.float32)
    call = jax.jit(lambda p, x, m: model_state.merge(graphdef, p, {})(x, Ctx(memory=m)))
    counted, cost = call.lower(params, x, images).compile().cost_analysis()["flops"], CrossAttention.cost(fields, env, length)
    assert 0.999 * cost.dense_flops <= counted <= 1.04 * cost.dense_flops
    states = [jax.eval_shape(lambda d=d: model_state.merge(graphdef, params, {}).init_state(1, length, d)) for d in ("bfloat16", "float32")]
    assert cost.state_bytes == sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(states[0]))
    assert cost.params == sum(a.size for a in params.values())
    step = jax.jit(lambda p, x, s: model_state.merge(graphdef, p, {}).step(x, decode_ctx(jnp.ones((1, 1), bool), 5), s))
    counted = step.lower(params, jax.ShapeDtypeStruct((1, D), jnp.float32), states[1]).compile().cost_analysis()["flops"]
    assert 0.999 * cost.decode_flops <= counted <= 1.05 * cost.decode_flops


def test_what_does_not_fit_says_so():
    graphdef, params = make({**FIELDS, "memory_len": 4})
    mixer, x = model_state.merge(graphdef, params, {}), jnp.zeros((1, 3, D))
    with pytest.raises(ValueError, match="a memory of 8 entries does not fit the 4 slots of the state; set memory_len=8"):
        ctx = Ctx(index_BT=jnp.arange(3)[None], memory=memory(jnp.zeros((1, 8, E))))
        mixer.prefill(x, ctx, mixer.init_state(1, 4, jnp.float32))
    with pytest.raises(ValueError, match="the rows have segment ids and the memory has none"):
        mixer(x, Ctx(segment_ids_BT=jnp.ones((1, 3), jnp.int32), memory=memory(jnp.zeros((1, 8, E)), segments=None)))
    with pytest.raises(ValueError, match="has no index_BS"):
        mixer(x, Ctx(memory={"source": Memory(jnp.zeros((1, 8, E)))}))
    with pytest.raises(ValueError, match="entries of 5 numbers, expected 7; set memory_dim"):
        mixer(x, Ctx(memory=memory(jnp.zeros((1, 8, 5)))))
    with pytest.raises(ConfigError, match=r"num_heads=4 is not divisible by num_kv_heads=3; valid: \[1, 2, 4\]"):
        CrossAttention.check(CrossAttention.Config(num_heads=4, num_kv_heads=3), Env(d_model=D))
    model = nnx.eval_shape(lambda: Decoder(config(), rngs=nnx.Rngs(0)))
    with pytest.raises(ConfigError, match="memory 'image': no layer attends to it; layers of this model read source"):
        model(np.zeros((1, 3), np.int32), memory={"image": None})
    with pytest.raises(ConfigError, match="expected source_x, source_segment_ids, source_index, got source_pixels"):
        model.loss({**batch(), "source_x": None, "source_segment_ids": None, "source_index": None, "source_pixels": 1})

"""How images join the text: the naive form of every fusion, the latest image of a token's document, decoding, meshes, costs.

Letters: T time, I images, M entries of an image, D model, E width of the memory.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effmodels.config import ConfigError
from effmodels.decode import generate
from effmodels.layers.context import Ctx, Memory
from effmodels.mixers.base import Env
from effmodels.models import Decoder, cost
from effmodels.models import state as model_state
from effmodels.models.resolve import resolve
from effmodels.multimodal.registry import get_fusion
from effmodels.parallel import axes, layouts, mesh
from effmodels.parallel.options import Options
from tests.contract.cases import draw, fill, jit, loss_and_grads
from tests.multimodal.cases import DOCUMENTS, IMAGE_OF, INDEX, NAMES, OF_DOCUMENT, TOKENS, D, E, I, T, batch, config
from tests.numerics import assert_close, assert_trees_close

AT_INPUT = [name for name in NAMES if get_fusion(name).at_input]
FLOAT64 = {"param_dtype": "float64", "compute_dtype": "float64"}


def make(name):
    return fill(lambda: get_fusion(name)(E, Env(d_model=D, param_dtype="float64"), rngs=nnx.Rngs(0)))[:2]


def memory(x_BSE):
    """The images of `cases` as the memory of every row."""
    spread = lambda a: jnp.repeat(jnp.broadcast_to(a, (x_BSE.shape[0], I)), TOKENS, axis=1)  # noqa: E731
    return Memory(x_BSE, spread(OF_DOCUMENT), spread(INDEX))


def naive(name, p, x_TD, entries_SE):
    """One row, token by token, by the table of what each sees."""
    out = []
    for t, x in enumerate(x_TD):
        image = IMAGE_OF.get(t)
        mean = None if image is None else jnp.mean(entries_SE[image * TOKENS : (image + 1) * TOKENS], axis=0)
        if name == "gate" and image is not None:
            v = mean @ p["project"]
            g = 1 / (1 + jnp.exp(-(jnp.concatenate([x, v]) @ jnp.concatenate([p["w_text"], p["w_image"]]) + p["bias"])))
            x = g * x + (1 - g) * v
        if name == "concat":
            v = jnp.zeros(D) if image is None else mean @ p["project"]
            x = jnp.concatenate([x, v]) @ jnp.concatenate([p["w_text"], p["w_image"]]) + p["bias"]
        if name == "soft_tokens" and image is not None and t - INDEX[image] < TOKENS:
            x = entries_SE[image * TOKENS + t - INDEX[image]] @ p["project"]
        out.append(x)
    return jnp.stack(out)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n == "concat" else []) for n in AT_INPUT])
def test_values_and_gradients_are_those_of_the_naive_form(name, x64):
    """Packed rows: an image is for the tokens of its own document that come after it, until the next one."""
    graphdef, params = make(name)
    x, entries, probe = draw(T, D, seed=1), draw(I * TOKENS, E, seed=2), draw(T, D, seed=3)

    @jit
    def run(*args):
        def of(f):
            return jax.grad(lambda *a: (jnp.sum((y := f(*a)) * probe), y), argnums=(0, 1, 2), has_aux=True)(*args)

        def fusion(p, x, entries):
            module = model_state.merge(graphdef, p, {})
            return module.fuse(x[None], module.prepare(memory(entries[None]), TOKENS), Ctx(segment_ids_BT=DOCUMENTS[None]))[0]

        return of(fusion), of(functools.partial(naive, name))

    (got_grads, got), (want_grads, want) = run(params, x, entries)
    assert_close("values", got, want, rel=1e-12)
    assert_trees_close(got_grads, want_grads, rel=1e-11)
    assert all(np.any(g) for g in jax.tree.leaves(got_grads))
    without = model_state.merge(graphdef, params, {}).fuse(x[None], None, Ctx())[0]
    apart = [t for t in range(T) if t not in IMAGE_OF]
    assert_close("tokens without an image", np.asarray(got)[apart], np.asarray(without)[apart], rel=1e-12)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == "soft_tokens" else [pytest.mark.slow]) for n in NAMES])
def test_a_model_trains_on_images_and_decodes_with_them(name, x64):
    """Every parameter has a gradient; prefill in two pieces and steps equal the whole row; the state is as large as its cost says."""
    graphdef, params, buffers = fill(lambda: Decoder(config(name, **FLOAT64), rngs=nnx.Rngs(0)))
    given = batch()
    alone = given | {"source_segment_ids": (given["source_segment_ids"] > 0).astype(np.int32)}

    @jit
    def run(params):
        model = model_state.merge(graphdef, params, buffers)
        images = {"source": model.media(*(alone[f"source_{n}"] for n in ("patches", "index", "segment_ids")))}
        tokens, parts = given["tokens"], []
        whole = model(tokens, segment_ids=np.ones((1, T), np.int32), memory=images)
        state = model.init_state(1, T, memory=images)
        for start, stop in ((0, 6), (6, T - 2)):
            logits, state = model.prefill(tokens[:, start:stop], state)
            parts.append(logits)
        for t in range(T - 2, T):
            logits, state = model.step(tokens[:, t], state)
            parts.append(logits[:, None])
        (_, out), grads = loss_and_grads(graphdef)(params, buffers, given)
        return whole, jnp.concatenate(parts, axis=1), grads, state, model.loss({k: v for k, v in given.items() if "source" not in k}).ce_sum

    whole, parts, grads, state, text_alone = run(params)
    assert_close("logits", parts, whole, rel=1e-11)
    assert np.isfinite(text_alone)
    silent = {path for path, g in grads.items() if not np.any(np.abs(g) > 1e-12)}
    assert silent <= {"media.encoder.layers.attention.bk"}, silent
    priced = cost(config(name, **FLOAT64), T)
    assert priced.params == sum(a.size for a in params.values())
    assert priced.decode_state_bytes == sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state))


@pytest.mark.slow
def test_closed_gates_are_bit_equal_to_no_images_at_all():
    """Flamingo's layers, attention and feed-forward both, start as the identity: the model of text that they were put into."""
    graphdef, params, _ = fill(lambda: Decoder(config("cross_attention"), rngs=nnx.Rngs(0)))
    given = batch(dtype=np.float32)
    gates = [path for path in params if path.endswith("gate")]
    others = {p: a for p, a in params.items() if p not in gates}
    gated = tuple({path.rsplit(".", 2)[0] for path in gates})
    replaced = {p: a + p.startswith(gated) * 0.5 * jnp.sign(a) for p, a in others.items()}  # other weights of the gated layers

    @jit
    def run(params):
        model = model_state.merge(graphdef, params, {})
        images = {"source": model.media(given["source_patches"], given["source_index"], given["source_segment_ids"])}
        return [model(given["tokens"], segment_ids=given["segment_ids"], memory=m) for m in (None, images)]

    closed = {p: jnp.zeros_like(params[p]) for p in gates}
    assert {p.split(".")[-2] for p in gates} == {"mixer", "channel"}  # the tests of either say that they start at 0
    (without, seen), (_, other), (opened_without, opened) = (run({**o, **g}) for o, g in (
        (others, closed), (replaced, closed), (others, {p: a + 0.5 for p, a in closed.items()}),
    ))  # fmt: skip
    assert np.array_equal(without, seen) and np.array_equal(without, other)
    assert np.abs(np.asarray(opened) - np.asarray(opened_without)).max() > 1e-3


MESHES = [
    ({"data": 2, "fsdp": 2, "tensor": 2}, "contiguous"), ({"fsdp": 2, "seq": 2, "tensor": 2}, "zigzag"),
    ({"stage": 2, "data": 4}, "contiguous"),
]  # fmt: skip


@pytest.mark.parametrize("name, sizes, layout", [
    pytest.param(name, sizes, layout, marks=pytest.mark.slow) for name in NAMES for sizes, layout in MESHES
])  # fmt: skip
def test_sharded_equals_one_device(name, sizes, layout, x64):
    """Loss and every gradient of a packed batch with images; over stages the batch is two micro-batches."""
    rows, length, layers = 8, 20, 4
    graphdef, params, buffers = fill(lambda: Decoder(config(name, layers, **FLOAT64), rngs=nnx.Rngs(0)))
    given = batch(rows)
    given |= {k: np.pad(given[k], ((0, 0), (0, length - T))) for k in ("tokens", "targets", "segment_ids", "weights", "positions")}
    (_, want), want_grads = jit(loss_and_grads(graphdef))(params, buffers, given)
    with axes.use(mesh.make_mesh(sizes), parallel=Options(layout=layout)):
        pieces = sizes.get("seq", 1)
        there = {k: a if k.startswith("source") else layouts.to_layout(a, layout, pieces) for k, a in given.items()}
        if "stage" in sizes:
            there = {k: np.reshape(a, (2, rows // 2, *a.shape[1:])) for k, a in there.items()}
        (_, got), got_grads = jit(loss_and_grads(graphdef))(params, buffers, there)
    assert_close("cross entropy", got[0], want[0], rel=1e-11)
    # A bias of the keys moves all logits of a query alike: its gradient is rounding.
    assert_trees_close(got_grads, want_grads, rel=1e-9, floor=1e-5)


@pytest.mark.slow
def test_generation_from_an_image_and_a_prompt():
    """The image has its say in what follows the same prompt; the images given are not used up."""
    graphdef, params, buffers = fill(lambda: Decoder(config("soft_tokens"), rngs=nnx.Rngs(0)))
    model = model_state.merge(graphdef, {p: jnp.asarray(a, jnp.float32) for p, a in params.items()}, buffers)
    images = {"source": jax.jit(lambda x: model.media(x, np.array([[1], [1]])))(5 * draw(2, 1, 4, 18, dtype=np.float32))}
    prompt = np.array([[3, 0, 0, 0, 7]] * 2)
    first, again = (np.asarray(generate(model, prompt, 6, memory=images)) for _ in range(2))
    assert np.array_equal(first, again)
    seen, blind = (np.asarray(model.prefill(prompt, model.init_state(2, 8, memory=m))[0])[:, -1] for m in (images, None))
    assert np.abs(seen[0] - seen[1]).max() > 1e-4 and np.abs(seen - blind).max() > 1e-4


@pytest.mark.slow
def test_text_alone_knows_nothing_of_images():
    """Without media there is no module, no parameter and no other draw."""
    with_media, without = (Decoder(c, rngs=nnx.Rngs(0)) for c in (config("gate"), config("gate").__class__(**{
        **{f: getattr(config("gate"), f) for f in config("gate").__dataclass_fields__}, "media": {},
    })))  # fmt: skip
    params, plain = (model_state.split(m)[1] for m in (with_media, without))
    assert without.media is None and plain.keys() == {p for p in params if not p.startswith("media.")}
    assert all(np.array_equal(a, params[p]) for p, a in plain.items())


def test_canonical_names_are_by_layer():
    names = model_state.manifest(nnx.eval_shape(lambda: Decoder(config("gate"), rngs=nnx.Rngs(0))))
    assert names["media.encoder.layers.1.attention.wq"] == ("media.encoder.layers.attention.wq", 1)
    assert names["media.fusion.w_text"] == ("media.fusion.w_text", None) and "media.encoder.layers.attention.wq" not in names


WRONG = {
    "fusion": ({"fusion": "gates"}, r"model\.media\.fusion: unknown fusion 'gates'\. Did you mean 'gate'"),
    "encoder": ({"encoder": {"kind": "vitt"}}, r"model\.media\.encoder\.kind: unknown encoder 'vitt'\. Did you mean 'vit'"),
    "no kind": ({"encoder": {"patch": 4}}, r"model\.media\.encoder: 'kind' must be given"),
    "field": ({"encoder": {"kind": "vit", "patches": 4}}, r"model\.media\.encoder: unknown field 'patches'\. Did you mean 'patch'"),
    "images": ({"images": 0}, r"model\.media\.images: expected a positive integer, got 0"),
    "frames": ({"frames": 3}, r"frames=3, but resampler\.max_frames=2; raise it"),
    "no reader": ({"fusion": "cross_attention"}, r"fusion='cross_attention', but no layer attends to images"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_mistake_in_a_config(mistake):
    fields, message = WRONG[mistake]
    given = {f: getattr(config("gate"), f) for f in config("gate").__dataclass_fields__}
    with pytest.raises(ConfigError, match=message):
        resolve({**given, "media": {**given["media"], **fields}})


def test_layers_and_images_must_fit():
    given = {f: getattr(config("cross_attention"), f) for f in config("gate").__dataclass_fields__}
    with pytest.raises(ConfigError, match="fusion='gate', but the layers cross_attention attend to images"):
        resolve({**given, "media": {**given["media"], "fusion": "gate"}})
    with pytest.raises(ConfigError, match="memory_dim=10 and memory_len=9, but the images of a row are 12 entries of 10 numbers"):
        resolve({**given, "media": {**given["media"], "images": 4}})
    with pytest.raises(ConfigError, match="muP says nothing about an encoder"):
        resolve({**{f: getattr(config("gate"), f) for f in given}, "mup_base_width": 4})
    graphdef, params, _ = fill(lambda: Decoder(config("gate"), rngs=nnx.Rngs(0)))
    model = model_state.merge(graphdef, params, {})
    with pytest.raises(ValueError, match=r"media: expected images of \(4, 18\) \(patches, values\), got \(5, 18\)"):
        model.media(np.zeros((1, 1, 5, 18)), np.zeros((1, 1), np.int32))
    with pytest.raises(ConfigError, match="source_patches is given and source_index"):
        model.loss({k: v for k, v in batch().items() if k != "source_index"})
    with pytest.raises(ValueError, match="the rows have segment ids and the images have none"):
        jax.eval_shape(lambda: model.loss(batch() | {"source_segment_ids": None}).ce_sum)

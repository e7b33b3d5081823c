"""Weights in the type that decoding reads them in: which ones, found by following programs, and the same numbers bit for bit."""
import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effmodels.decode import generate, served, speculate, weights
from effmodels.decode.weights import converted, read_as
from effmodels.layers.context import Memory
from effmodels.models import Decoder, ModelConfig
from effmodels.models import state as model_state
from effmodels.parallel import axes, mesh
from tests.contract.cases import all_kinds_config, fill, jit

HALF, OTHER = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)
TOKENS = np.random.default_rng(0).integers(1, 29, (2, 7)).astype(np.int32)
SMALL = ModelConfig(
    vocab_size=29, d_model=16, num_layers=4, pattern=("retention", "attention"), channel=("mlp", "moe"), compute_dtype="bfloat16",
    mixers={"retention": {"num_heads": 2, "chunk": 4}, "attention": {"num_heads": 2, "qk_norm": True, "sinks": True}},
    channels={"mlp": {"hidden": 16}, "moe": {"num_experts": 3, "top_k": 2, "hidden": 8}}, implementation="reference",
)  # fmt: skip


def build(config):
    graphdef, *arrays = fill(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    return model_state.merge(graphdef, *jax.tree.map(jnp.asarray, arrays))


def bits(tree):
    return [np.asarray(a).tobytes() for a in jax.tree.leaves(tree)]


def decoded(model, memory=None):
    """Logits of a prompt and of two steps, and the state behind them."""
    graphdef, *arrays = model_state.split(model)

    def run(params, buffers, tokens_BT, memory):
        model = model_state.merge(graphdef, params, buffers)
        logits, state = model.prefill(tokens_BT, model.init_state(2, 16, memory=memory))
        one, state = model.step(tokens_BT[:, 0], state)
        two, state = model.step(tokens_BT[:, 1], state)
        return logits, one, two, state

    return jit(run)(*arrays, TOKENS, memory)


@pytest.mark.parametrize(
    "use, want",
    [
        (lambda w, x: x @ w.astype(HALF), HALF),
        (lambda w, x: x @ w, None),  # read as it is
        (lambda w, x: x, None),  # not read
        (lambda w, x: (x @ w.astype(HALF), w), None),  # given back
        (lambda w, x: (x @ w.astype(HALF), w.sum()), None),  # both
        (lambda w, x: (x @ w.astype(HALF), w.astype(OTHER)), None),  # two types
        (lambda w, x: w.astype(jnp.int8), None),  # not a rounding
        (lambda w, x: jnp.swapaxes(w, 0, 1).reshape(2, 8)[1:, :3].astype(HALF), HALF),
        (lambda w, x: jnp.take(w, jnp.arange(3), axis=0).astype(HALF), HALF),  # rows of a table
        (lambda w, x: w[w[0].argmax()].astype(HALF), None),  # it says which row
        (lambda w, x: jax.jit(lambda w: w.T)(w).astype(HALF), HALF),
        (lambda w, x: jax.checkpoint(lambda w: x @ w.astype(HALF))(w), HALF),
        (lambda w, x: jax.lax.scan(lambda y, row: (y + row.astype(HALF), row[:2]), x[0], w), None),  # parts of it come back from the loop
        (lambda w, x: jax.lax.scan(lambda y, row: (y + row.astype(HALF), 0), x[0], w)[0], HALF),  # a layer of a stack
        (lambda w, x: jax.lax.scan(lambda y, row: (y, row), x[0], w)[1].astype(HALF), HALF),
        (lambda w, x: jax.lax.scan(lambda y, _: (y @ w.astype(HALF), 0), x, length=2)[0], HALF),  # what all layers share
        (lambda w, x: jax.lax.scan(lambda w, _: (w.T, w.astype(HALF)), w, length=2)[1], None),  # carried
        (lambda w, x: jax.lax.cond(x[0, 0] > 0, lambda w: w.astype(HALF), lambda w: x, w), None),  # one way of two: left alone
    ],
)  # fmt: skip
def test_a_weight_is_followed_to_every_use(use, want):
    params, x = {"a": jnp.ones(3), "w": jnp.ones((4, 4))}, jnp.ones((4, 4), HALF)
    found = converted(lambda p, x: (use(p["w"], x), p["a"] * 2), params, x)
    assert found == ({} if want is None else {"w": want})


def test_what_stays_float32():
    """Of mixers and channel mixers: routers, sinks, and norms of keys and queries where they multiply in float32."""
    found, params = read_as(SMALL), model_state.split(build(SMALL))[1]
    kept = {path.split("blocks.")[-1] for path in params if path not in found}
    assert kept == {"1.channel.router", "1.mixer.sinks"} and set(found.values()) == {HALF}
    offset = dataclasses.replace(SMALL, norm_offset=1.0)  # (1 + scale) x: summed in float32
    assert {path.split(".")[-2] for path in params if path not in read_as(offset) and path.endswith(".scale")} == {
        "norm_mixer", "norm_channel", "final_norm", "q_norm", "k_norm"}  # fmt: skip


@pytest.mark.slow  # eleven mixers to compile twice; the default suite has two of them below
def test_every_mixer_decodes_the_same_bits():
    model = build(all_kinds_config(param_dtype="float32", compute_dtype="bfloat16"))
    ready = served(model)
    types = {path: a.dtype for path, a in model_state.split(ready)[1].items()}
    assert sum(t == HALF for t in types.values()) > 0.7 * len(types)
    assert bits(decoded(ready)) == bits(decoded(model))
    assert bits(model_state.split(model)[1]) == bits(model_state.split(build(model.config))[1]), "the caller's model has changed"


@pytest.mark.slow
def test_a_model_with_a_memory_decodes_the_same_bits():
    config = ModelConfig(
        vocab_size=29, d_model=16, num_layers=2, pattern=("cross_attention", "attention"), compute_dtype="bfloat16",
        mixers={"cross_attention": {"num_heads": 2, "memory_len": 3, "qk_norm": True}, "attention": {"num_heads": 2}},
    )  # fmt: skip
    rng = np.random.default_rng(1)
    memory = {"source": Memory(rng.normal(size=(2, 3, 16)).astype(np.float32), index_BS=np.zeros((2, 3), np.int32))}
    model = build(config)
    assert bits(decoded(served(model), memory)) == bits(decoded(model, memory)) != bits(decoded(model))


@pytest.mark.parametrize("way", ["generate", pytest.param("speculative", marks=pytest.mark.slow)])
def test_tokens_are_the_same(way, monkeypatch):
    model, module = build(dataclasses.replace(SMALL, mtp={"depth": 1})), importlib.import_module(f"effmodels.decode.{way}")
    options = {"temperature": 0.7, "key": jax.random.key(3)}
    run = generate if way == "generate" else lambda *args, **options: speculate(*args, **options)[0]
    got, seen = np.asarray(run(model, TOKENS, 6, **options)), []
    monkeypatch.setattr(module, "served", lambda model: seen.append(model) or model)
    assert np.array_equal(run(model, TOKENS, 6, **options), got) and seen == [model]


def test_a_step_converts_no_matrix():
    """In the traced program: of the served model nothing as large as a weight is made narrower."""
    model, sizes = build(SMALL), {}
    for name, made in (("as it is", model), ("served", served(model))):
        graphdef, *arrays = model_state.split(made)
        step = jax.make_jaxpr(lambda p, b, t, s, g=graphdef: model_state.merge(g, p, b).step(t, s))
        sizes[name] = max(narrowed(step(*arrays, TOKENS[:, 0], made.init_state(2, 16)).jaxpr))
    assert sizes["as it is"] >= 29 * 16 and sizes["served"] <= 2 * 16 * 3


def narrowed(jaxpr):
    """Sizes of what the equations of a jaxpr, inner ones too, convert from float32 to bfloat16."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "convert_element_type" and equation.params["new_dtype"] == HALF:
            yield equation.invars[0].aval.size
        for value in equation.params.values():
            if hasattr(value, "eqns"):
                yield from narrowed(getattr(value, "jaxpr", value))


def test_nothing_is_traced_or_copied_where_nothing_is_wider():
    model = build(dataclasses.replace(SMALL, compute_dtype="float32"))
    assert served(model) is model
    ready = served(build(SMALL))  # some of its parameters stay wide
    assert served(ready) is ready
    compiled = weights._narrowed._cache_size()
    assert served(build(SMALL)) is not ready and weights._narrowed._cache_size() == compiled


@pytest.mark.slow
def test_under_a_mesh_the_bits_are_the_same():
    model = build(SMALL)
    with axes.use(mesh.make_mesh({"data": 2}, jax.devices()[:2]), axes.decode_rules(axes.make_rules())):
        assert bits(decoded(served(model))) == bits(decoded(model))

"""Layers that use the same weights equal layers with equal weights: values, gradients, decoding, names, low-rank matrices, conversion."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effmodels.config import ConfigError, ModelConfig
from effmodels.models import Decoder, cost, recursive, sharing
from effmodels.models import state as model_state
from effmodels.verify import verify
from tests.contract.cases import fill, jit
from tests.verify.cases import tiny

CONFIG = ModelConfig(
    vocab_size=11, d_model=8, num_layers=5, pattern=("attention", "retention"), channel=("mlp", "moe"), suffix=(("attention", "mlp"),),
    mixers={"attention": {"num_heads": 2, "qk_norm": True}, "retention": {"num_heads": 2}},
    channels={"mlp": {"hidden": 12}, "moe": {"num_experts": 3, "hidden": 4, "bias_update_rate": 1e-3}}, param_dtype="float64",
    compute_dtype="float64",
)  # fmt: skip
FORMS = {
    "full_tie": {"mixer": "cycle:2", "channel": "cycle:2", "norms": "cycle:2"},
    "attention_only": {"mixer": "cycle:2"},
    "channels_with_rank": {"channel": "cycle:2", "rank": 2},
}
NEIGHBOURS = {
    "pattern": ("attention",), "channel": ("mlp",), "mixers": {"attention": {"num_heads": 2}}, "channels": {"mlp": {"hidden": 12}},
    "num_layers": 6, "suffix": (),
}  # fmt: skip


def logits(model):
    """Of a few tokens, compiled."""
    graphdef, params, buffers = model_state.split(model)
    tokens = jax.random.randint(jax.random.key(1), (2, 7), 0, 11)
    return jit(lambda params: model_state.merge(graphdef, params, buffers)(tokens))(params)


def untied(model, params):
    """(the same config without sharing, a function from params by path to those of that model): every user has a copy."""
    plain = Decoder(dataclasses.replace(model.config, sharing={}), rngs=nnx.Rngs(0))
    graphdef, plain_params, buffers = model_state.split(plain)
    names, plain_names, owner_of = model_state.manifest(model), model_state.manifest(plain), sharing.owners(model.resolved.layers)

    def copies(params):
        arrays = {name: params[path] if i is None else params[path][i] for name, (path, i) in names.items() if path in params}

        def of(name):
            if name in arrays:
                return arrays[name]
            _, layer, module, rest = name.split(".", 3)
            value = arrays[f"shared.{owner_of[sharing.part_of(module), int(layer)]}.{module}.{rest}"]
            factors = f"layers.{layer}.{module}_low_rank.{rest.replace('.', '_')}."
            if factors + "a" not in arrays:
                return value
            a, b = arrays[factors + "a"], arrays[factors + "b"]
            return value + a @ b

        found = {}
        for path in plain_params:
            pieces = [(i, of(name)) for name, (p, i) in plain_names.items() if p == path]
            found[path] = pieces[0][1] if pieces[0][0] is None else jnp.stack([v for _, v in sorted(pieces, key=lambda pair: pair[0])])
        return found

    return graphdef, buffers, copies


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_shared_layers_equal_layers_with_equal_weights(form, x64):
    config = dataclasses.replace(CONFIG, sharing=FORMS[form])
    model = Decoder(config, rngs=nnx.Rngs(0))
    graphdef, params, buffers = fill(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    plain_graphdef, plain_buffers, copies = untied(model, params)
    tokens = jax.random.randint(jax.random.key(1), (2, 7), 0, 11)
    batch = {"tokens": tokens, "targets": jnp.roll(tokens, -1, 1)}
    assert set(plain_buffers) == set(buffers), "balancing biases stay with each use"

    def loss(graphdef, buffers):
        return lambda params: model_state.merge(graphdef, params, buffers).loss(batch).total_sum

    value, gradient = jit(jax.value_and_grad(loss(graphdef, buffers)))(params)
    want, want_gradient = jit(jax.value_and_grad(lambda p: loss(plain_graphdef, buffers)(copies(p))))(params)
    assert np.isclose(value, want, rtol=1e-12)
    for path in params:
        np.testing.assert_allclose(gradient[path], want_gradient[path], rtol=1e-9, atol=1e-11, err_msg=path)

    def decoded(params):
        model = model_state.merge(graphdef, params, buffers)
        _, state = model.prefill(tokens[:, :4], model.init_state(2, 8))
        return model.step(tokens[:, 4], state)[0]

    want = jit(lambda params: model_state.merge(plain_graphdef, copies(params), buffers)(tokens)[:, 4])(params)
    np.testing.assert_allclose(jit(decoded)(params), want, atol=1e-6)  # logits are float32


@pytest.mark.slow(always=True)
@pytest.mark.parametrize("rank", [0, 2])
def test_neighbours_scanned_equal_unrolled_and_keep_their_names(rank, x64):
    config = dataclasses.replace(CONFIG, **NEIGHBOURS, sharing={"channel": "neighbours:2", "rank": rank})
    flat = dataclasses.replace(config, scan_layers=False)
    scanned = Decoder(config, rngs=nnx.Rngs(0))
    unrolled = Decoder(flat, rngs=nnx.Rngs(0))
    assert [(s.period, s.repeats) for s in scanned.segments] == [(2, 3)] and not len(scanned.shared) and len(unrolled.shared) == 3
    names = model_state.manifest(scanned)
    assert names.keys() == model_state.manifest(unrolled).keys()
    assert names["shared.2.channel.w_in"] == ("segments.0.blocks.0.channel.w_in", 1) and "layers.3.channel.w_in" not in names
    np.testing.assert_allclose(logits(scanned), logits(unrolled), atol=1e-6)
    assert model_state.num_params(scanned) == model_state.num_params(unrolled) == cost(config, 16).params == cost(flat, 16).params
    assert model_state.num_params(scanned) < cost(dataclasses.replace(config, sharing={}), 16).params


@pytest.mark.parametrize("layers", [pytest.param(6, marks=pytest.mark.slow), 5])
def test_neighbours_share_diagonal_blocks_and_nothing_else(layers, x64):
    """Against layers without sharing whose matrices are put together block by block; an odd number leaves the last layer alone."""
    fields = {**NEIGHBOURS, "num_layers": layers, "channels": {"mlp": {"hidden": 12, "bias": True}}}
    config = dataclasses.replace(CONFIG, **fields, sharing={"channel": "diagonal:4"})
    build = lambda: Decoder(config, rngs=nnx.Rngs(0))  # noqa: E731
    graphdef, params, buffers = fill(build)
    model, plain = nnx.eval_shape(build), nnx.eval_shape(lambda: Decoder(dataclasses.replace(config, sharing={}), rngs=nnx.Rngs(0)))
    plain_graphdef, plain_params, _ = model_state.split(plain)
    names, plain_names = model_state.manifest(model), model_state.manifest(plain)
    tokens = jax.random.randint(jax.random.key(1), (2, 7), 0, 11)
    batch = {"tokens": tokens, "targets": jnp.roll(tokens, -1, 1)}

    def put_together(params):
        def of(name):
            path, i = names[name]
            return params[path] if i is None else params[path][i]

        def whole(name):
            _, layer, *rest = name.split(".")
            shared = ".".join(["shared", str(int(layer) // 2 * 2), *rest])
            if shared not in names or rest[0] != "channel" or name in names and not rest[1].startswith("w_"):
                return of(name)
            lender = of(shared)
            if name not in names:
                return lender
            (R, C), rest_RC, out = lender.shape, of(name), jnp.zeros(lender.shape)
            r, c = R // 4, C // 4
            for i in range(4):
                kept = [rest_RC[i * r : (i + 1) * r, b * c : (b + 1) * c] for b in range(3)]
                blocks = [*kept[:i], lender[i * r : (i + 1) * r, i * c : (i + 1) * c], *kept[i:]]
                out = out.at[i * r : (i + 1) * r].set(jnp.concatenate(blocks, 1))
            return out

        found = {}
        for path in plain_params:
            pieces = [(i, (whole if n.startswith("layers") else of)(n)) for n, (p, i) in plain_names.items() if p == path]
            found[path] = pieces[0][1] if pieces[0][0] is None else jnp.stack([v for _, v in sorted(pieces, key=lambda pair: pair[0])])
        return found

    def loss(graphdef):
        return lambda params: model_state.merge(graphdef, params, buffers).loss(batch).total_sum

    value, gradient = jit(jax.value_and_grad(loss(graphdef)))(params)
    want, want_gradient = jit(jax.value_and_grad(lambda p: loss(plain_graphdef)(put_together(p))))(params)
    assert np.isclose(value, want, rtol=1e-12)
    for path in params:
        np.testing.assert_allclose(gradient[path], want_gradient[path], rtol=1e-9, atol=1e-11, err_msg=path)
    matrices = 3 * 8 * 12 * (layers // 2)
    assert model_state.num_params(model) == cost(config, 16).params == model_state.num_params(plain) - matrices // 4


@pytest.mark.parametrize("form", FORMS)
def test_parameters_are_counted_without_building(form):
    config = dataclasses.replace(CONFIG, sharing=FORMS[form], param_dtype="float32")
    assert model_state.num_params(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))) == cost(config, 16).params


@pytest.mark.slow
def test_a_recursive_model_of_full_rank_is_the_model_it_was_made_from(x64):
    """Of rank 0 layers use the mean; the error falls with the rank. Vectors (ones here) can only be averaged."""
    model = Decoder(CONFIG, rngs=nnx.Rngs(0))
    want = logits(model)

    def error(rank):
        config = dataclasses.replace(CONFIG, sharing={"mixer": "cycle:2", "channel": "cycle:2", "rank": rank})
        made = recursive(model, config)
        assert model_state.manifest(made)["shared.0.mixer.wq"][1] is None
        return float(jnp.sqrt(jnp.mean((logits(made) - want) ** 2)))

    none, two, full = error(0), error(2), error(8)
    assert full < 1e-6 < two < none, (none, two, full)
    with pytest.raises(ConfigError, match="same config without sharing, not another d_model"):
        recursive(model, dataclasses.replace(CONFIG, d_model=16, sharing={"mixer": "cycle:2"}))


def test_queries_keys_and_values_shared_by_all_heads_are_one_head(x64):
    """Why heads must not share all three projections: each then attends alike, and eight heads collapse to one."""
    config = ModelConfig(
        vocab_size=11, d_model=16, num_layers=1, mixers={"attention": {"num_heads": 8, "head_dim": 4}}, channels={"mlp": {"hidden": 8}},
        param_dtype="float64", compute_dtype="float64",
    )  # fmt: skip
    graphdef, params, buffers = fill(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    one_graphdef, one, _ = fill(lambda: Decoder(dataclasses.replace(config, mixers={"attention": {"num_heads": 1, "head_dim": 4}}),
                                                rngs=nnx.Rngs(0)))  # fmt: skip
    mixer = "segments.0.blocks.0.mixer."
    for name in ("wq", "wk", "wv"):
        params[mixer + name] = jnp.broadcast_to(params[mixer + name][:, :1], params[mixer + name].shape)
    one |= {path: array for path, array in params.items() if not path.startswith(mixer)}
    one |= {mixer + name: params[mixer + name][:, :1] for name in ("wq", "wk", "wv")}
    one[mixer + "wo"] = params[mixer + "wo"].sum(0, keepdims=True)
    eight = logits(model_state.merge(graphdef, params, buffers))
    np.testing.assert_allclose(eight, logits(model_state.merge(one_graphdef, one, buffers)), atol=1e-6)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"mixr": "cycle:2"}, "Did you mean 'mixer'"),
        ({"mixer": "cycle"}, r"model.sharing.mixer: expected none, cycle:n \(n >= 1\), neighbours:n or diagonal:n \(n >= 2\), got 'cycle'"),
        ({"channel": "neighbours:1"}, "model.sharing.channel: expected"),
        ({"mixer": "cycle:3"}, "layers 0 and 3 would use the same weights, but are 'attention' and 'retention'"),
        ({"rank": 4}, "model.sharing.rank: expected a rank >= 0 with a shared mixer or channel"),
        ({"mixer": "diagonal:2"}, "'diagonal:n' is for the channel alone and without a rank"),
        ({"channel": "diagonal:2"}, "'diagonal:2' is for dense channel mixers, not 'moe'"),
    ],
)
def test_mistakes(fields, message):
    with pytest.raises(ConfigError, match=message):
        Decoder(dataclasses.replace(CONFIG, sharing=fields), rngs=nnx.Rngs(0))


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"fsdp": 2, "seq": 2}, {"stage": 2, "tensor": 2}], ids=str)
def test_on_a_mesh(axes):
    config = tiny(axes, num_layers=4, dropout=0.1, sharing={"mixer": "cycle:2", "channel": "cycle:2", "rank": 2})
    report = verify(config, checks=["mesh"], log=print)
    assert report.passed, report.table()

"""Layers without a channel mixer: what they compute, cost and share, scanned, decoded, over pipeline stages and in a plan."""
import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effmodels.config import ConfigError, ModelConfig
from effmodels.layers.context import Ctx
from effmodels.models import Decoder, cost, resolve
from effmodels.models import state as model_state
from effmodels.models.blocks import Block
from tests.contract.cases import draw, fill, jit
from tests.numerics import assert_close, assert_trees_close
from tests.parallel.test_pipeline import assert_same, config_of, keys_of, micro_batches, pipelined, sums, unpipelined

SSD = {"num_heads": 2, "head_dim": 4, "state_dim": 3, "chunk": 4}
ALONE = {"pattern": ("ssd",), "channel": ("none",), "mixers": {"ssd": SSD}, "channels": {}}
SINGLE = {"param_dtype": "float32", "compute_dtype": "float32"}
BETWEEN = {
    "pattern": ("ssd", "attention"), "channel": ("none", "mlp"), "mixers": {"ssd": SSD, "attention": {"num_heads": 2}},
    "channels": {"mlp": {"hidden": 12}},
}  # fmt: skip


def rms(x, scale):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale


@pytest.mark.parametrize("position, residual", [("pre", "serial"), ("post", "serial"), ("sandwich", "parallel")])
def test_a_layer_is_its_mixer_with_norm_and_residual(position, residual, x64):
    config = config_of(1, **ALONE, norm_position=position, residual=residual)
    resolved = resolve(config)
    graphdef, params, _ = fill(lambda: Block(resolved.layers[0], resolved, rngs=nnx.Rngs(0)))
    block, x, ctx = model_state.merge(graphdef, params, {}), draw(2, 5, 8), Ctx()
    norms = {name: a for name, a in params.items() if name.startswith("norm_")}
    assert sorted(norms) == ["norm_mixer.scale"] + ["norm_mixer_out.scale"] * (position == "sandwich")
    scale = norms["norm_mixer.scale"]
    want = {
        "pre": lambda: x + np.asarray(block.mixer(rms(x, scale), ctx)),
        "post": lambda: rms(x + np.asarray(block.mixer(x, ctx)), scale),
        "sandwich": lambda: x + rms(np.asarray(block.mixer(rms(x, scale), ctx)), norms["norm_mixer_out.scale"]),
    }[position]()
    y, aux = block(x, ctx)
    assert aux is None
    assert_close("layer", y, want, rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("fields", [pytest.param(ALONE, id="alone"), pytest.param(BETWEEN, id="between", marks=pytest.mark.slow)])
def test_scanned_equals_unrolled_and_steps_equal_the_row(fields, x64):
    """Loss and every gradient; then a left-padded prefill and steps against the whole row."""
    config = config_of(4, **fields, dropout=0.1)
    flat = dataclasses.replace(config, scan_layers=False)
    built = [fill(lambda c=c: Decoder(c, rngs=nnx.Rngs(0))) for c in (config, flat)]
    names = [model_state.manifest(nnx.eval_shape(lambda c=c: Decoder(c, rngs=nnx.Rngs(0)))) for c in (config, flat)]

    def unrolled(arrays):
        found = {}
        for name, (path, _) in names[1].items():
            at, i = names[0][name]
            found[path] = np.asarray(arrays[at])[() if i is None else i]
        return found

    params, batch, key = built[0][1], {n: a[0] for n, a in micro_batches(1).items()}, keys_of(1)[0]
    got, got_grads = sums(built[0][0])(params, {}, batch, key)
    want, want_grads = sums(built[1][0])(unrolled(params), {}, batch, key)
    assert_close("loss", got[0], want[0], rel=1e-13)
    assert_trees_close(unrolled(got_grads), want_grads, rel=1e-11)

    tokens, pad = batch["tokens"][:1], 3
    T = tokens.shape[1]

    @jit
    def run(params, tokens):
        model = model_state.merge(built[0][0], params, {})
        left = jnp.concatenate([jnp.full((1, pad), 5, tokens.dtype), tokens[:, :4]], axis=1)
        valid = jnp.arange(pad + 4)[None] >= pad
        logits, state = model.prefill(left, model.init_state(1, T), valid)
        parts = [logits[:, pad:]]
        for t in range(4, T):
            logits, state = model.step(tokens[:, t], state)
            parts.append(logits[:, None])
        return jnp.concatenate(parts, axis=1), model(tokens)

    assert_close("decoded", *run(params, tokens), rel=1e-6)  # logits are float32


@pytest.mark.slow
def test_over_pipeline_stages(x64):
    config = config_of(4, **ALONE, dropout=0.1, remat="full")
    graphdef, params, buffers = fill(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    batch, keys = micro_batches(2), keys_of(2)
    want = unpipelined(graphdef, params, buffers, batch, keys)
    assert_same(pipelined(config, {"stage": 2}, 1, params, buffers, batch, keys), want)


def test_parameters_are_the_mixers_and_one_norm_each():
    """mamba2-130m: 24 layers of 768, vocabulary 50288, a tied head: 128,989,632 parameters."""
    config = ModelConfig(
        vocab_size=50288, d_model=768, num_layers=24, pattern=("ssd",), channel=("none",), tie_embeddings=True,
        mixers={"ssd": {"num_heads": 24, "head_dim": 64, "state_dim": 128}},
    )  # fmt: skip
    assert cost(config, 64).params == cost(config, 64).active_params == 128_989_632
    small = config_of(4, **BETWEEN, **SINGLE, norm_position="sandwich", norm="layernorm")
    model = nnx.eval_shape(lambda: Decoder(small, rngs=nnx.Rngs(0)))
    assert cost(small, 16).params == model_state.num_params(model)


def test_norms_are_not_shared_with_layers_that_have_more_of_them():
    with pytest.raises(ConfigError, match="layers 0 and 1 would use the same norms, but one of them has no channel mixer"):
        resolve(config_of(4, **BETWEEN, sharing={"norms": "cycle:1"}))
    tied = config_of(4, **BETWEEN, **SINGLE, sharing={"norms": "cycle:2", "channel": "cycle:2", "mixer": "cycle:2"})
    model = nnx.eval_shape(lambda: Decoder(tied, rngs=nnx.Rngs(0)))
    assert cost(tied, 16).params == model_state.num_params(model)

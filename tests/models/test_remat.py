"""`remat="save:..."`: what is named is kept, everything else is computed again, and the numbers stay."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effmodels.config import SAVEABLE, ConfigError, ModelConfig
from effmodels.models import Decoder
from effmodels.models import state as model_state

CONFIG = ModelConfig(
    vocab_size=24, d_model=8, num_layers=4, pattern=("attention", "retention"), channel=("mlp", "moe"),
    mixers={"attention": {"num_heads": 2, "num_kv_heads": 1}, "retention": {"num_heads": 2, "head_dim": 4, "value_dim": 4}},
    channels={"mlp": {"hidden": 12}, "moe": {"num_experts": 2, "top_k": 1, "hidden": 12, "activation": "gelu"}},
)  # fmt: skip


def loss_of(remat, implementation="reference", config=CONFIG):
    """(loss of the parameters, abstract parameters)."""
    model = nnx.eval_shape(lambda: Decoder(dataclasses.replace(config, remat=remat, implementation=implementation), rngs=nnx.Rngs(0)))
    graphdef, params, buffers = model_state.split(model)
    buffers = {path: jnp.zeros(a.shape, a.dtype) for path, a in buffers.items()}
    tokens = jax.random.randint(jax.random.key(1), (2, 7), 1, 24)
    return lambda p: model_state.merge(graphdef, p, buffers).loss({"tokens": tokens, "targets": tokens}).total_sum, params


def products(remat, *args):
    """How many matrix products (with the grouped ones) the loss and all gradients take, by their place in the program."""
    return count(("dot_general", "ragged_dot", "ragged_dot_general"), remat, *args)


def count(primitives, remat, *args):
    loss, params = loss_of(remat, *args)
    return sum(_count(primitives, jax.make_jaxpr(jax.grad(loss))(params).jaxpr))


def _count(primitives, jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in primitives:
            yield 1
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _count(primitives, inner)


def test_each_name_saves_the_products_that_it_names():
    none, full, everything = products("none"), products("full"), products("save:" + ",".join(SAVEABLE))
    saved = {name: full - products(f"save:{name}") for name in SAVEABLE}
    # Queries, and all four projections of retention; keys and values; gate and up; both mixers' outputs, which the next norm reads: a
    # channel mixer's ends its layer, and nothing in that layer reads it.
    assert saved["heads"] == 1 + 4 and saved["kv_heads"] == 2 and saved["mlp"] == 2 and saved["embed"] == 2 and saved["expert_mlp"] >= 1
    assert none < everything < full
    # What waits in the host's memory is not computed again either.
    assert products("offload:embed") == full - saved["embed"]
    assert products("save:kernel+offload:heads,mlp") == products("save:kernel,heads,mlp")


def test_a_kernel_that_is_kept_does_not_run_again():
    """The flash form keeps its result and logsumexp by name, inside its own gradient rule."""
    config = ModelConfig(vocab_size=24, d_model=8, num_layers=2, mixers={"attention": {"num_heads": 2}}, channels={"mlp": {"hidden": 12}})
    counts = {remat: products(remat, "xla", config) for remat in ("full", "save:kernel", "save:heads,kv_heads,kernel")}
    assert counts["full"] - counts["save:kernel"] == 2, "scores and values of one block"
    assert counts["save:kernel"] - counts["save:heads,kv_heads,kernel"] == 3


def test_queries_and_keys_that_are_kept_do_not_rotate_again():
    """Each rotation puts two halves together, forward, again, and not in its gradient; a period has two layers."""
    counts = {remat: count(("concatenate",), remat) for remat in ("none", "full", "save:heads,kv_heads")}
    assert counts["full"] > counts["save:heads,kv_heads"] == counts["none"]


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["save:kernel", "save:heads,kv_heads,mlp,expert_mlp,embed,kernel", "save:kernel+offload:embed,mlp"])
def test_the_numbers_stay(remat, x64):
    params = model_state.split(Decoder(CONFIG, rngs=nnx.Rngs(0)))[1]
    params = {path: jnp.asarray(a, jnp.float64) for path, a in params.items()}

    def numbers(policy):
        return jax.jit(jax.value_and_grad(loss_of(policy, "xla")[0]))(params)

    (value, grads), (want_value, want) = numbers(remat), numbers("none")
    assert float(value) == pytest.approx(float(want_value), rel=1e-13)
    for path, gradient in grads.items():
        np.testing.assert_allclose(gradient, want[path], rtol=1e-9, atol=1e-12 * np.abs(want[path]).max(), err_msg=path)


@pytest.mark.parametrize(
    "remat, message",
    [
        ("save:head", "keeps 'head'.*Did you mean 'heads'"),
        ("ful", "unknown 'ful'. Did you mean 'full'"),
        ("save:mlp+offload:hed", "keeps 'hed'"),
        ("offload:mlp+offload:embed", "unknown 'offload:mlp"),
        ("save:mlp+offload:embed,mlp", "names 'mlp' twice"),
    ],
)
def test_unknown_names(remat, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(vocab_size=8, d_model=8, num_layers=1, remat=remat)

"""The ViT, the Perceiver resampler and the gated feed-forward layer against plain forms, with every gradient, and their exact costs.

Letters: B images, F frames, P patches, C values of a patch, M latents, E width, N heads.
"""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effmodels.channel.gated_mlp import GatedMLP
from effmodels.config import ConfigError
from effmodels.layers.context import Ctx
from effmodels.mixers.base import Env
from effmodels.models import state as model_state
from effmodels.multimodal.perceiver import Perceiver
from effmodels.multimodal.vit import ViT
from tests.contract.cases import draw, fill, jit
from tests.numerics import assert_close, assert_trees_close

ENV = Env(d_model=6, param_dtype="float64")
VIT = ViT.Config(image_size=9, patch=3, channels=2, width=10, num_layers=3, num_heads=2, hidden=7, norm_eps=1e-3)
PERCEIVER = Perceiver.Config(latents=5, width=6, num_layers=2, num_heads=3, head_dim=3, hidden=7, max_frames=4, norm_eps=1e-3)


def norm(p, name, x):
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-3) * p[f"{name}.scale"] + p[f"{name}.bias"]


def attend(p, x, z):
    """One image, head by head."""
    y, none = p.get("attention.bo", 0.0), jnp.zeros((9, 1))
    for n in range(p["attention.wq"].shape[1]):
        q, k, v = (a @ p[f"attention.w{w}"][:, n] + p.get(f"attention.b{w}", none)[n] for a, w in ((x, "q"), (z, "k"), (z, "v")))
        y = y + jax.nn.softmax(q @ k.T / q.shape[-1] ** 0.5, axis=-1) @ v @ p["attention.wo"][n]
    return y


def layer_of(params, i):
    return {name.removeprefix("layers."): a[i] for name, a in params.items() if name.startswith("layers.")}


def plain_vit(params, x_PC):
    x = x_PC @ params["embed"] + params["bias"] + params["positions"]
    for i in range(3):
        p = layer_of(params, i)
        h = norm(p, "norm_attention", x)
        x = x + attend(p, h, h)
        h = norm(p, "norm_mlp", x) @ p["mlp.w_in"] + p["mlp.b_in"]
        x = x + h * 0.5 * (1 + jax.lax.erf(h / 2**0.5)) @ p["mlp.w_out"] + p["mlp.b_out"]
    return norm(params, "norm", x)


def plain_perceiver(params, x_FPZ):
    x = jnp.concatenate([frame @ params["project"] + params["times"][f] for f, frame in enumerate(x_FPZ)])
    y = params["latents"]
    for i in range(2):
        p = layer_of(params, i)
        h = norm(p, "norm_latents", y)
        y = y + attend(p, h, jnp.concatenate([norm(p, "norm_media", x), h]))
        y = y + jax.nn.relu(norm(p, "norm_mlp", y) @ p["mlp.w_in"]) ** 2 @ p["mlp.w_out"]
    return norm(params, "norm", y)


PARTS = {
    "vit": (lambda: ViT(VIT, ENV, rngs=nnx.Rngs(0)), plain_vit, (2, 9, 18), VIT.tokens, ViT.work(VIT)),
    "perceiver": (
        lambda: Perceiver(PERCEIVER, ENV, 4, rngs=nnx.Rngs(0)), plain_perceiver, (2, 3, 7, 4), 5, Perceiver.work(PERCEIVER, 3, 7, 4),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_values_and_gradients_are_those_of_the_plain_form(name, x64):
    build, plain, shape, tokens, work = PARTS[name]
    graphdef, params, _ = fill(build)
    x = draw(*shape)

    @jit
    def run(params, x):
        def of(f):
            probe = draw(shape[0], tokens, 10 if name == "vit" else 6, seed=3)
            return jax.grad(lambda *a: (jnp.sum((y := f(*a)) * probe), y), argnums=(0, 1), has_aux=True)(params, x)

        return of(lambda p, x: model_state.merge(graphdef, p, {})(x)), of(lambda p, x: jnp.stack([plain(p, one) for one in x]))

    (got_grads, got), (want_grads, want) = run(params, x)
    assert_close("values", got, want, rel=1e-12)
    # A bias of the keys moves all logits of a query alike: its gradient is rounding.
    assert_trees_close(got_grads, want_grads, rel=1e-9, floor=1e-6)
    zero = {path for path, g in want_grads[0].items() if np.abs(g).max() < 1e-12}
    assert zero <= {"layers.attention.bk", "times"} and work.params == sum(a.size for a in params.values())
    if name == "perceiver":  # three of four embeddings of time are used
        assert [bool(np.any(row)) for row in np.asarray(got_grads[0]["times"])] == [True, True, True, False]


def test_work_is_what_is_compiled():
    """FLOPs of unscanned parts, all layers alike; matmuls only, so that the rest is a small surplus."""
    env = Env(d_model=6, implementation="reference")
    vit = ViT.Config(image_size=64, patch=8, width=384, num_layers=1, num_heads=4)
    perceiver = Perceiver.Config(latents=48, width=96, num_layers=1, num_heads=4, head_dim=32)
    for build, shape, work in (
        (lambda: ViT(vit, env, rngs=nnx.Rngs(0)), (1, *vit.patch_shape), ViT.work(vit)),
        (lambda: Perceiver(perceiver, env, 64, rngs=nnx.Rngs(0)), (1, 2, 60, 64), Perceiver.work(perceiver, 2, 60, 64)),
    ):
        graphdef, params, _ = model_state.split(nnx.eval_shape(build))
        call = jax.jit(lambda p, x, g=graphdef: model_state.merge(g, p, {})(x))
        counted = call.lower(params, jax.ShapeDtypeStruct(shape, jnp.float32)).compile().cost_analysis()["flops"]
        assert 0.999 * work.flops <= counted <= 1.06 * work.flops, (work.flops, counted)


def test_a_published_size():
    """ViT-B/16 for 224 x 224 pixels has 85,798,656 parameters without its head; ours has no class token and no position for it."""
    assert ViT.work(ViT.Config()).params == 85_798_656 - 2 * 768


def test_the_gated_layer_starts_as_nothing_and_is_an_mlp_behind_a_gate(x64):
    config, env = GatedMLP.Config(hidden=5, activation="relu2"), Env(d_model=4, param_dtype="float64")
    assert not np.any(GatedMLP(config, env, rngs=nnx.Rngs(0))(jnp.ones((1, 3, 4)), Ctx())[0])
    graphdef, params, _ = fill(lambda: GatedMLP(config, env, rngs=nnx.Rngs(0)))
    x = draw(2, 3, 4)

    def plain(p):
        return jnp.sum(jnp.tanh(p["gate"]) * (jax.nn.relu(x @ p["w_in"]) ** 2 @ p["w_out"]) * draw(2, 3, 4, seed=2))

    def layer(p):
        return jnp.sum(model_state.merge(graphdef, p, {})(x, Ctx())[0] * draw(2, 3, 4, seed=2))

    (got, got_grads), (want, want_grads) = jit(lambda p: [jax.value_and_grad(f)(p) for f in (layer, plain)])(params)
    assert_close("value", got, want, rel=1e-12)
    assert_trees_close(got_grads, want_grads, rel=1e-11)
    assert GatedMLP.cost(config, env, 7).params == sum(a.size for a in params.values())


def test_what_does_not_fit_says_so():
    with pytest.raises(ConfigError, match=r"vit: image_size=10 is not a multiple of patch=4; nearest: 8"):
        ViT.check(ViT.Config(image_size=10, patch=4))
    with pytest.raises(ConfigError, match=r"vit: width=48 is not divisible by num_heads=5; valid: \[1, 2, 3, 4, 6\]"):
        ViT.check(ViT.Config(width=48, num_heads=5))
    with pytest.raises(ConfigError, match=r"vit: expected mean to have 1 or 3 numbers, got \(0\.1, 0\.2\)"):
        ViT.check(ViT.Config(mean=(0.1, 0.2)))
    with pytest.raises(ConfigError, match="perceiver: expected latents >= 1, got 0"):
        Perceiver.check(Perceiver.Config(latents=0))
    with pytest.raises(ValueError, match="perceiver: 5 frames, but max_frames=4"):
        graphdef, params, _ = fill(PARTS["perceiver"][0])
        model_state.merge(graphdef, params, {})(jnp.zeros((1, 5, 7, 4)))

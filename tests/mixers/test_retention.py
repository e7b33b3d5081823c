"""The three forms of retention equal the paper's equation, before and after the head norm, at every epsilon.

torchscale's chunkwise form does not: its gap in float64 is 2e-2 at the default epsilon and 1e-1 at 1e-5.
Letters: T time, N heads, H key dim, P value dim, D model.
"""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effmodels.config import ConfigError
from effmodels.layers.context import Ctx
from effmodels.mixers.base import Env
from effmodels.mixers.retention import Retention, log_decays
from effmodels.models import state as model_state
from tests.contract.cases import decode_ctx, draw, jit
from tests.mixers import oracles
from tests.numerics import assert_close, assert_trees_close

T, N, H, P = 37, 3, 6, 5
D = N * P  # so that W_o can be the identity and shows the retention itself
EPSILONS = (1e-12, 1e-6, 1e-5, 1e-1)
BOUND = {"float64": 1e-12, "float32": 1e-5}
WEIGHTS = {"wq": (D, N, H), "wk": (D, N, H), "wv": (D, N, P), "wg": (D, N, P), "wo": (N, P, D)}


def weights():
    return {name: draw(*shape, seed=i) / D**0.5 for i, (name, shape) in enumerate(WEIGHTS.items())}


def mixer_of(params, dtype, **fields):
    config = Retention.Config(num_heads=N, head_dim=H, value_dim=P, **fields)
    env = Env(d_model=D, param_dtype=dtype)
    graphdef = model_state.split(jax.eval_shape(lambda: Retention(config, env, rngs=nnx.Rngs(0))))[0]
    return model_state.merge(graphdef, params, {})


def recurrent(mixer, x_TD):
    """Token by token through `step`."""

    def step(carry, x_D):
        state, t = carry
        y, state = mixer.step(x_D[None], decode_ctx(jnp.ones((1, 1), bool), t, "step"), state)
        return (state, t + 1), y[0]

    return jax.lax.scan(step, (mixer.init_state(1, T, x_TD.dtype), jnp.zeros((), jnp.int32)), x_TD)[1]


def forms(params, x_TD, dtype, **fields):
    """{name: output [T, D]} of the parallel form (one chunk), chunkwise forms and the recurrent one."""
    results = {}
    for chunk in (T, 1, 5, 16, 64):
        results[f"chunk {chunk}"] = mixer_of(params, dtype, chunk=chunk, **fields)(x_TD[None], Ctx())[0]
    results["recurrent"] = recurrent(mixer_of(params, dtype, **fields), x_TD)
    return results


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("decay", ["torchscale", "paper"])
def test_before_the_norm_all_forms_are_the_papers_equation(dtype, decay, x64):
    params = {**weights(), "wo": np.eye(D).reshape(N, P, D)}
    x = draw(T, D, seed=9)
    del params["wg"]
    gammas = GAMMAS[decay](N)
    want = oracles.retention(np, params, x, gammas, 10_000.0).reshape(T, D)
    run = jit(lambda params, x: forms(params, x, dtype, decay=decay, gate=False, head_norm=False))
    for name, got in run(jax.tree.map(lambda a: jnp.asarray(a, dtype), params), jnp.asarray(x, dtype)).items():
        assert got.dtype == dtype
        assert_close(name, got, want, rel=BOUND[dtype])


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_after_the_norm_all_forms_agree_at_any_epsilon(dtype, x64):
    params, x = weights(), draw(T, D, seed=9) * 0.1  # small, so that the larger epsilons are felt

    @jit
    def run(params, x):
        return {eps: forms(params, x, dtype, head_norm_eps=eps) for eps in EPSILONS}

    results = run(jax.tree.map(lambda a: jnp.asarray(a, dtype), params), jnp.asarray(x, dtype))
    for eps, by_form in results.items():
        want = oracles.retention_layer(np, params, x, GAMMAS["torchscale"](N), 10_000.0, eps)
        for name, got in by_form.items():
            assert_close(f"{name} at epsilon {eps}", got, want, rel=BOUND[dtype])
    gap = np.abs(np.asarray(results[1e-5]["recurrent"]) - np.asarray(results[1e-12]["recurrent"])).max()
    assert gap > 1e-4, "the epsilon has no effect: this test would not notice a rescaled form"


def test_gradients_of_all_forms_are_those_of_the_equation(x64):
    params, x, probe = weights(), draw(T, D, seed=9) * 0.1, draw(T, D, seed=10)

    @jit
    def run(params, x):
        def of(f):
            return jax.grad(lambda params, x: jnp.sum(f(params, x) * probe), argnums=(0, 1))(params, x)

        def chunked(params, x, chunk):
            return mixer_of(params, "float64", head_norm_eps=1e-5, chunk=chunk)(x[None], Ctx())[0]

        want = of(lambda p, x: oracles.retention_layer(jnp, p, x, GAMMAS["torchscale"](N), 10_000.0, 1e-5))
        steps = of(lambda p, x: recurrent(mixer_of(p, "float64", head_norm_eps=1e-5), x))
        return want, steps, of(lambda p, x: chunked(p, x, 5)), of(lambda p, x: chunked(p, x, T))

    want, *others = run(params, x)
    for got in others:
        assert_trees_close(got, want, rel=1e-11)


# The schedules once more, by their formulas.
GAMMAS = {
    "torchscale": lambda n: np.array([1 - 2.0 ** (-5 - h) for h in range(n)]),
    "paper": lambda n: np.array([1 - np.exp(np.log(1 / 32) + h / (n - 1) * (np.log(1 / 512) - np.log(1 / 32))) for h in range(n)]),
}


def test_decay_schedules_are_the_published_ones():
    paper = np.exp(log_decays(Retention.Config(num_heads=8, decay="paper")))
    assert np.allclose(paper, [0.96875, 0.97897, 0.98585, 0.99048, 0.99359, 0.99569, 0.99710, 0.99805], rtol=0, atol=5e-6)
    half_lives = np.log(0.5) / log_decays(Retention.Config(num_heads=8, decay="torchscale"))
    assert np.allclose(half_lives, [22, 44, 88, 177, 354, 709, 1419, 2839], rtol=0, atol=0.6)
    assert np.array_equal(np.exp(log_decays(Retention.Config(num_heads=2, decay=(0.5, 1.0)))), [0.5, 1.0])


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"decay": "fast"}, r"unknown schedule 'fast'; expected \['paper', 'torchscale'\] or a tuple of numbers"),
        ({"decay": (0.5, 0.5)}, r"expected 4 numbers in \(0, 1\], got \(0.5, 0.5\)"),
        ({"decay": (0.5, 0.5, 0.5, 1.5)}, r"expected 4 numbers in \(0, 1\]"),
        ({"num_heads": 3}, r"d_model=32 is not divisible by num_heads=3; valid: \[1, 2, 4\], or set head_dim"),
        ({"num_heads": 0}, r"num_heads=0"),
        ({"head_dim": 5}, r"head_dim=5 must be even"),
    ],
)
def test_bad_configs_say_what_to_do(fields, message):
    with pytest.raises(ConfigError, match=message):
        Retention.check(Retention.Config(**fields), Env(d_model=32))


def test_state_stays_wide_in_bfloat16_and_does_not_grow():
    mixer = mixer_of({name: jnp.asarray(a, jnp.bfloat16) for name, a in weights().items()}, "bfloat16")
    short, long = (jax.eval_shape(lambda n=n: mixer.init_state(2, n, "bfloat16")) for n in (1, 100_000))
    assert short == long and short.s_BNHP.dtype == jnp.float32
    y, state = jit(lambda x: mixer.step(x, decode_ctx(jnp.ones((2, 1), bool)), mixer.init_state(2, 4, "bfloat16")))(
        jnp.ones((2, D), jnp.bfloat16)
    )
    assert y.dtype == jnp.bfloat16 and state.s_BNHP.dtype == jnp.float32 and np.all(np.isfinite(np.asarray(y, np.float32)))

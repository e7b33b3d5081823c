"""Mamba-2 against a loop over tokens written from the paper, and a sequence split over devices against one device.

Letters: T time, D model, N heads, G groups, H state dim, P head dim.
"""
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from effmodels.config import ConfigError
from effmodels.layers.context import Ctx
from effmodels.mixers.base import Env
from effmodels.mixers.ssd import SSD
from effmodels.models import state as model_state
from tests.contract.cases import draw, fill, jit
from tests.mixers.split import assert_split_is_whole
from tests.numerics import assert_close, assert_trees_close

T, D = 19, 12
CASES = {
    "mamba2": {"num_heads": 4, "head_dim": 3, "state_dim": 5, "groups": 2, "norm_eps": 1e-3, "chunk": 4},
    "groups": {
        "num_heads": 4, "head_dim": 3, "state_dim": 5, "norm": "before_gate", "norm_groups": 2, "norm_eps": 1e-3, "conv_bias": False,
        "conv_width": 2, "dt_min": 0.6, "dt_max": 0.8, "bias": True,
    },
}  # fmt: skip


def make(fields):
    return fill(lambda: SSD(SSD.Config(**fields), Env(d_model=D, param_dtype="float64"), rngs=nnx.Rngs(0)))[:2]


def silu(x):
    return x / (1 + jnp.exp(-x))


def linear(p, name, x, n):
    """One head of a projection."""
    return x @ p[f"w{name}"][:, n] + (p[f"b{name}"][n] if f"b{name}" in p else 0.0)


def mixed(p, name, x, w):
    """swish of the causal convolution of x w, one head: tap i meets the token W - 1 - i before."""
    taps, y = p[f"conv_{name}.weight"][w], linear(p, name, x, w)
    padded = jnp.concatenate([jnp.zeros((taps.shape[-1] - 1, y.shape[1])), y])
    y = sum(padded[i : i + len(x)] * taps[:, i] for i in range(taps.shape[-1]))
    return silu(y + (p[f"conv_{name}.bias"][w] if f"conv_{name}.bias" in p else 0.0))


def naive(p, x, c):
    """One row, token by token: h_t = exp(-dt A) h_{t-1} + dt B_t x_t, y_t = C_t h_t + D x_t (arXiv:2405.21060, equation 1, discretised)."""
    N, G, heads = c.num_heads, c.groups, []
    for n in range(N):
        b, inner, out = mixed(p, "b", x, n * G // N), mixed(p, "x", x, n), mixed(p, "c", x, n * G // N)
        dt = jnp.clip(jnp.log1p(jnp.exp(linear(p, "dt", x, n) + p["dt_bias"][n])), c.dt_min, c.dt_max)

        def token(h, xs, n=n):
            x, b, c, dt = xs
            h = jnp.exp(-dt * jnp.exp(p["a_log"][n])) * h + dt * jnp.outer(x, b)
            return h, h @ c + p["skip"][n] * x

        heads.append(jax.lax.scan(token, jnp.zeros((c.head_dim, c.state_dim)), (inner, b, out, dt))[1])
    y, gate = jnp.concatenate(heads, axis=1), jnp.concatenate([silu(linear(p, "z", x, n)) for n in range(N)], axis=1)
    y = y * gate if c.norm == "gated" else y
    parts = jnp.split(y, c.norm_groups, axis=1)
    y = jnp.concatenate([part / jnp.sqrt(jnp.mean(part**2, axis=1, keepdims=True) + 1e-3) for part in parts], axis=1)
    y = y * p["norm_scale"].reshape(-1) * (gate if c.norm == "before_gate" else 1.0)
    return y @ p["wo"].reshape(-1, D) + p.get("bo", 0.0)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_the_loop(name, x64):
    graphdef, params = make(CASES[name])
    x, probe, config = draw(T, D, seed=1), draw(T, D, seed=2), SSD.Config(**CASES[name])

    @jit
    def run(params, x):
        def of(f):
            return jax.grad(lambda p, x: (jnp.sum(f(p, x) * probe), f(p, x)), argnums=(0, 1), has_aux=True)(params, x)

        return of(lambda p, x: model_state.merge(graphdef, p, {})(x[None], Ctx())[0]), of(lambda p, x: naive(p, x, config))

    (got_grads, got), (want_grads, want) = run(params, x)
    assert_close("values", got, want, rel=1e-12)
    assert_trees_close(got_grads, want_grads, rel=1e-10)


@pytest.mark.parametrize("layout", ["contiguous", pytest.param("zigzag", marks=pytest.mark.slow)])
def test_a_split_sequence_is_one_device(layout, x64):
    """Values and gradients of packed rows, time split over four devices and heads over two."""
    graphdef, params = make(CASES["mamba2"])
    assert_split_is_whole(graphdef, params, D, layout, rel=1e-12)


def test_parameters_of_the_published_layer():
    """mamba2-130m: in 768 x (2 x 1536 + 2 x 128 + 24), 4 taps and a bias of 1792 channels, three numbers per head, norm 1536, out."""
    config = SSD.Config(num_heads=24, head_dim=64, state_dim=128)
    cost = SSD.cost(config, Env(d_model=768), 1024)
    assert cost.params == 768 * (2 * 1536 + 2 * 128 + 24) + 5 * 1792 + 3 * 24 + 1536 + 1536 * 768
    assert cost.state_bytes == 4 * 24 * 64 * 128 + 2 * 3 * 1792


def test_state_stays_wide_in_bfloat16():
    config, env = SSD.Config(**CASES["mamba2"]), Env(d_model=D, param_dtype="bfloat16")
    state = nnx.eval_shape(lambda: SSD(config, env, rngs=nnx.Rngs(0)).init_state(2, 4, "bfloat16"))
    assert state.s_BNHP.dtype == jnp.float32 and state.x_BwNP.dtype == jnp.bfloat16 and state.b_BwGH.shape == (2, 3, 2, 5)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_heads": 5}, r"ssd: 2 d_model=24 is not divisible by num_heads=5; valid: \[1, 2, 3\], or set head_dim"),
        ({"num_heads": 6, "groups": 4}, r"num_heads=6 is not divisible by groups=4; valid: \[1, 2, 3, 6\]"),
        ({"num_heads": 6, "norm_groups": 5}, r"num_heads=6 is not divisible by norm_groups=5"),
        ({"num_heads": 6, "norm": "after"}, r"expected norm to be one of gated, before_gate, none, got 'after'"),
        ({"num_heads": 6, "dt_min": 0.5, "dt_max": 0.1}, r"expected dt_min < dt_max, got 0.5 and 0.1"),
        ({"num_heads": 6, "state_dim": 0}, r"expected state_dim >= 1"),
    ],
)
def test_bad_configs_say_what_to_do(fields, message):
    with pytest.raises(ConfigError, match=message):
        SSD.check(SSD.Config(**fields), Env(d_model=D))

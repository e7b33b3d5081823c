"""Gated DeltaNet against a loop over tokens written from the paper, and a sequence split over devices against one device.

Letters: T time, D model, K key heads, N value heads, H key dim, P value dim.
"""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effmodels.config import ConfigError
from effmodels.layers.context import Ctx
from effmodels.layers.discretise import log_rates, step_biases
from effmodels.mixers.base import Env
from effmodels.mixers.gated_delta import GatedDelta
from effmodels.models import state as model_state
from tests.contract.cases import draw, fill, jit
from tests.mixers.oracles import rms
from tests.mixers.split import assert_split_is_whole
from tests.numerics import assert_close, assert_trees_close

T, D = 19, 12
FIELDS = {"num_heads": 2, "num_value_heads": 4, "head_dim": 5, "value_dim": 3, "chunk": 4, "norm_eps": 1e-3}


def make(fields=FIELDS):
    env = Env(d_model=D, param_dtype="float64")
    return fill(lambda: GatedDelta(GatedDelta.Config(**fields), env, rngs=nnx.Rngs(0)))[:2]


def silu(x):
    return x / (1 + jnp.exp(-x))


def mixed(x, w, taps):
    """swish of the causal convolution of x w, one head: tap i meets the token W - 1 - i before."""
    y, width = x @ w, taps.shape[-1]
    padded = jnp.concatenate([jnp.zeros((width - 1, y.shape[1])), y])
    return silu(sum(padded[i : i + len(y)] * taps[:, i] for i in range(width)))


def naive(p, x, eps):
    """One row, head by head and token by token: S = S a (I - b k k^T) + b v k^T with S [P, H] (arXiv:2412.06464, equation 10)."""
    y, (K, N) = 0.0, (p["wq"].shape[1], p["wv"].shape[1])
    for n in range(N):
        g = n * K // N
        q, k = (mixed(x, p[w][:, g], p[f"conv_{w[1]}.weight"][g]) for w in ("wq", "wk"))
        v = mixed(x, p["wv"][:, n], p["conv_v.weight"][n])
        q, k = (a / jnp.sqrt(jnp.sum(a * a, axis=1, keepdims=True) + 1e-6) for a in (q, k))
        decay = jnp.exp(-jnp.exp(p["a_log"][n]) * jnp.log1p(jnp.exp(x @ p["wa"][:, n] + p["dt_bias"][n])))
        beta = 1 / (1 + jnp.exp(-(x @ p["wb"][:, n])))

        def token(S, xs):
            q, k, v, a, b = xs
            S = S @ (a * (jnp.eye(len(k)) - b * jnp.outer(k, k))) + b * jnp.outer(v, k)
            return S, S @ q / len(q) ** 0.5

        _, out = jax.lax.scan(token, jnp.zeros((v.shape[1], q.shape[1])), (q, k, v, decay, beta))
        y = y + (rms(jnp, out, eps, p["norm_scale"]) * silu(x @ p["wz"][:, n])) @ p["wo"][n]
    return y


def test_values_and_gradients_are_those_of_the_loop(x64):
    graphdef, params = make()
    x, probe = draw(T, D, seed=1), draw(T, D, seed=2)

    @jit
    def run(params, x):
        def of(f):
            return jax.grad(lambda p, x: (jnp.sum(f(p, x) * probe), f(p, x)), argnums=(0, 1), has_aux=True)(params, x)

        return of(lambda p, x: model_state.merge(graphdef, p, {})(x[None], Ctx())[0]), of(lambda p, x: naive(p, x, 1e-3))

    (got_grads, got), (want_grads, want) = run(params, x)
    assert_close("values", got, want, rel=1e-12)
    assert_trees_close(got_grads, want_grads, rel=1e-10)


@pytest.mark.parametrize("layout", ["contiguous", pytest.param("zigzag", marks=pytest.mark.slow)])
def test_a_split_sequence_is_one_device(layout, x64):
    """The state passes through a matrix per stretch, not a decay: values and gradients of packed rows, time over four devices."""
    graphdef, params = make()
    assert_split_is_whole(graphdef, params, D, layout, rel=1e-12)


def test_dims_of_the_published_model():
    """Qwen3-Next's linear layers: q|k|v|z of 2048 x (2 x 2048 + 2 x 4096), b|a of 2048 x 64, 4 taps of 8192 channels, 4096 x 2048 out."""
    config = GatedDelta.Config(num_heads=16, num_value_heads=32, head_dim=128, value_dim=128)
    cost = GatedDelta.cost(config, Env(d_model=2048), 4096)
    assert cost.params == 2048 * (2 * 2048 + 2 * 4096) + 2048 * 64 + 4 * 8192 + 4096 * 2048 + 32 + 32 + 128
    assert cost.state_bytes == 4 * 32 * 128 * 128 + 2 * 3 * 8192
    assert GatedDelta.cost(config, Env(d_model=2048), 8192).state_bytes == cost.state_bytes


def test_initial_decays_are_those_of_the_paper(key):
    rates, steps = np.exp(log_rates(key, (999,), jnp.float32)), np.log1p(np.exp(step_biases(key, (999,), jnp.float32)))
    assert 1 <= rates.min() < 1.1 and 15.9 < rates.max() <= 16 and abs(rates.mean() - 8.5) < 0.5
    assert 0.99e-3 <= steps.min() < 1.1e-3 and 9e-2 < steps.max() <= 1.01e-1 and abs(np.log(steps).mean() - np.log(1e-2)) < 0.2


def test_state_stays_wide_in_bfloat16():
    config, env = GatedDelta.Config(**FIELDS), Env(d_model=D, param_dtype="bfloat16")
    state = nnx.eval_shape(lambda: GatedDelta(config, env, rngs=nnx.Rngs(0)).init_state(2, 4, "bfloat16"))
    assert state.s_BNHP.dtype == jnp.float32 and state.v_BwNP.dtype == jnp.bfloat16 and state.v_BwNP.shape == (2, 3, 4, 3)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_heads": 2, "num_value_heads": 3}, r"num_value_heads=3 is not a multiple of num_heads=2"),
        ({"num_heads": 2, "chunk": 48}, r"expected chunk to be a power of two or None, got 48"),
        ({"num_heads": 2, "conv_width": 0}, r"expected conv_width >= 1, got conv_width=0"),
    ],
)
def test_bad_configs_say_what_to_do(fields, message):
    with pytest.raises(ConfigError, match=message):
        GatedDelta.check(GatedDelta.Config(**fields), Env(d_model=D))

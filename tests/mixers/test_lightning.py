"""Lightning attention against its whole matrix of scores, head by head, for the layers of MiniMax-Text-01 and
Ring-linear-2.0 and for odd mixtures.

Letters: T time, N heads, H key dim, P value dim, D model, L layers.
"""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effmodels.config import ConfigError
from effmodels.layers.context import Ctx
from effmodels.mixers.base import Env
from effmodels.mixers.lightning import Lightning, decay_rates
from effmodels.models import state as model_state
from effmodels.parallel import axes, mesh
from effmodels.parallel.options import Options
from tests.contract.cases import decode_ctx, draw, fill, jit
from tests.numerics import assert_close, assert_trees_close

T, D, L, LAYER = 23, 12, 5, 3
ENV = Env(d_model=D, num_layers=L, param_dtype="float64", norm_eps=1e-3)
MINIMAX = {"qkv_activation": "silu", "qk_norm": False, "rotary_fraction": 0.0, "scale": 1.0, "norm_groups": 1, "layer_factor": "minimax"}
RING = {"norm_groups": 2, "layer_factor": "ring", "norm_eps": 1e-2}
CASES = {
    "minimax": {"num_heads": 4, **MINIMAX},
    "ring": {"num_heads": 4, "head_dim": 8, **RING},
    "odd": {"num_heads": 3, "head_dim": 7, "value_dim": 5, "slopes": "linear", "layer_factor": "linear", "gate": False, "chunk": 5},
    "bare": {"num_heads": 3, "slopes": (0.0, 0.3, 9.0), "layer_factor": "none", "norm_groups": 0, "qk_norm": False, "gate": False},
}


def rms(x, eps, scale=1.0):
    return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale


def rates(slopes, factor, n):
    """The decay rates of layer LAYER by the formulas of the papers, written once more."""
    by_head = {"power": [0.5 ** (8 / n * (h + 1)) for h in range(n)], "linear": [8 / n * h for h in range(n)]}.get(slopes, slopes)
    by_layer = {
        "minimax": 1 - LAYER / (L - 1 + 1e-5) + 1e-5, "ring": 1 - (LAYER - 1) / (L - 1) + 1e-5, "linear": 1 - LAYER / L, "none": 1.0,
    }[factor]  # fmt: skip
    return [by_layer * s for s in by_head]


def oracle(p, x_TD, fields):
    """One row: o_t = scale sum over s <= t of exp(-rate (t - s)) (q_t . k_s) v_s; then the norm over groups of heads, the gate, W_o."""
    c = {"slopes": "power", "layer_factor": "minimax", "rotary_fraction": 0.5, "gate": True, "qk_norm": True} | fields
    n, act = c["num_heads"], jax.nn.silu if c.get("qkv_activation") == "silu" else lambda a: a
    outputs = []
    for h, rate in enumerate(rates(c["slopes"], c["layer_factor"], n)):
        q, k, v = (act(x_TD @ p[w][:, h]) for w in ("wq", "wk", "wv"))
        if c["qk_norm"]:
            q, k = rms(q, 1e-3, p["q_norm.scale"]), rms(k, 1e-3, p["k_norm.scale"])
        dims = q.shape[1]
        half = int(dims * c["rotary_fraction"] / 2)
        turn = jnp.exp(1j * jnp.arange(T)[:, None] * jnp.array([10_000.0 ** (-i / half) for i in range(half)]))
        turned = lambda a: [((a[:, :half] + 1j * a[:, half : 2 * half]) * turn), a[:, 2 * half :]]  # noqa: E731, B023
        q, k = (jnp.concatenate([z.real, z.imag, rest], axis=1) for z, rest in map(turned, (q, k)))
        gap = np.arange(T)[:, None] - np.arange(T)[None, :]
        decay = np.where(gap >= 0, np.exp(-rate * np.maximum(gap, 0)), 0.0)
        outputs.append(c.get("scale", dims**-0.5) * (q @ k.T * decay) @ v)
    o_TNP = jnp.stack(outputs, axis=1)
    groups = c.get("norm_groups", n)
    if groups:
        o_TNP = rms(o_TNP.reshape(T, groups, -1), c.get("norm_eps", 1e-3)).reshape(o_TNP.shape) * p["group_norm_scale"]
    if c["gate"]:
        o_TNP = o_TNP / (1 + jnp.exp(-jnp.einsum("td,dnp->tnp", x_TD, p["wg"])))
    return jnp.einsum("tnp,npd->td", o_TNP, p["wo"])


def make(fields, env=ENV):
    return fill(lambda: Lightning(Lightning.Config(**fields), env, rngs=nnx.Rngs(0)))[:2]


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n == "odd" else []) for n in CASES])
def test_values_gradients_and_steps_are_those_of_the_equation(name, x64):
    fields = CASES[name]
    graphdef, params = make(fields)
    x, probe = draw(T, D, seed=1), draw(T, D, seed=2)
    layer = jnp.int32(LAYER)  # traced: scanned layers read their decay from a table

    @jit
    def run(params, x, layer):
        def mixer(p, x):
            return model_state.merge(graphdef, p, {})(x[None], Ctx(layer=layer))[0]

        def steps(p, x):
            mixer = model_state.merge(graphdef, p, {})

            def step(carry, x_D):
                state, t = carry
                y, state = mixer.step(x_D[None], decode_ctx(jnp.ones((1, 1), bool), t, "step").at_layer(layer), state)
                return (state, t + 1), y[0]

            return jax.lax.scan(step, (mixer.init_state(1, T, x.dtype), jnp.zeros((), jnp.int32)), x)[1]

        def of(f):
            return jax.grad(lambda p, x: (jnp.sum(f(p, x) * probe), f(p, x)), argnums=(0, 1), has_aux=True)(params, x)

        return of(mixer), steps(params, x), of(lambda p, x: oracle(p, x, fields))

    (got_grads, got), by_steps, (want_grads, want) = run(params, x, layer)
    assert_close("values", got, want, rel=1e-12)
    assert_close("steps", by_steps, want, rel=1e-12)
    assert_trees_close(got_grads, want_grads, rel=1e-10)


def test_decays_are_the_published_ones():
    """Ring-linear-2.0 mini: 20 layers, 16 heads; its longest memory has a half-life of 1686 tokens, in layer 18."""
    config = Lightning.Config(num_heads=16, layer_factor="ring")
    slopes = decay_rates(dataclasses.replace(config, layer_factor="none"), 20)[0]
    assert np.allclose(slopes[[0, -1]], [0.7071, 0.0039], atol=5e-5)
    by_layer = decay_rates(config, 20)
    assert np.allclose(by_layer[0] / slopes, 1.0526, atol=5e-5) and np.allclose(by_layer[1] / slopes, 1 + 1e-5, rtol=1e-12)
    assert np.allclose(np.exp(-by_layer[1][[0, -1]]), [0.493, 0.9961], atol=5e-4)
    assert abs(np.log(2) / by_layer[18, -1] - 1686) < 1
    minimax = decay_rates(dataclasses.replace(config, layer_factor="minimax"), 20)
    assert np.allclose(minimax[0] / slopes, 1 + 1e-5, rtol=1e-12) and np.all(minimax > 0) and np.all(np.diff(minimax, axis=0) < 0)


def test_alibi_slopes_of_twelve_heads():
    """The example of ALiBi's code: 8 slopes of 8 heads, then the first, third, ... of 16."""
    rates = decay_rates(Lightning.Config(num_heads=12, slopes="alibi", layer_factor="none"), 1)[0]
    assert np.allclose(rates, [*(2.0 ** -(h + 1) for h in range(8)), *(2.0 ** (-(2 * h + 1) / 2) for h in range(4))], rtol=1e-14)


@pytest.mark.parametrize("states", ["log", pytest.param("ring", marks=pytest.mark.slow)])
def test_a_split_sequence_equals_one_device(states, x64):
    graphdef, params = make({"num_heads": 2, "head_dim": 6, "norm_groups": 1})
    x, probe = draw(2, 40, D, seed=1), draw(2, 40, D, seed=2)
    segments = np.array([[1] * 13 + [2] * 20 + [3] * 5 + [0] * 2, [1] * 40], np.int32)

    def run(params, x):
        def loss(params, x):
            y = model_state.merge(graphdef, params, {})(x, Ctx(segment_ids_BT=segments, layer=jnp.int32(LAYER)))
            return jnp.sum(y * probe * (segments > 0)[..., None]), y

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    want = jit(run)(params, x)
    with axes.use(mesh.make_mesh({"seq": 4, "tensor": 2}), parallel=Options(states=states)):
        got = jax.jit(run)(params, x)
    assert_trees_close(got[0], want[0], rel=1e-11)
    assert_close("values", got[1][segments > 0], want[1][segments > 0], rel=1e-12)


def test_state_stays_wide_in_bfloat16_and_does_not_grow():
    graphdef, params = make({"num_heads": 2}, Env(d_model=D, num_layers=L, param_dtype="bfloat16"))
    mixer = model_state.merge(graphdef, params, {})
    short, long = (jax.eval_shape(lambda n=n: mixer.init_state(2, n, "bfloat16")) for n in (1, 100_000))
    assert short == long and short.s_BNHP.dtype == jnp.float32


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_heads": 5}, r"d_model=12 is not divisible by num_heads=5; valid: \[1\], or set head_dim"),
        ({"num_heads": 0}, r"expected num_heads >= 1, got num_heads=0"),
        ({"norm_groups": 3}, r"num_heads=4 is not divisible by norm_groups=3; valid: \[1, 2, 4\]"),
        ({"rotary_fraction": 2.0}, r"expected 0 <= rotary_fraction <= 1, got 2.0"),
        ({"qkv_activation": "gelu"}, r"expected 'none' or 'silu', got 'gelu'"),
        ({"slopes": "powers"}, r"lightning.slopes: unknown 'powers'. Did you mean 'power'\?"),
        ({"slopes": (1.0, 2.0)}, r"lightning.slopes: expected 4 numbers >= 0, got \(1.0, 2.0\)"),
        ({"layer_factor": (1.0, 1.0, 1.0, 1.0, -1.0)}, r"lightning.layer_factor: expected 5 numbers >= 0"),
    ],
)
def test_bad_configs_say_what_to_do(fields, message):
    with pytest.raises(ConfigError, match=message):
        Lightning.check(Lightning.Config(**fields), ENV)

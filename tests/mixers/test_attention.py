"""Attention against a naive score matrix: grouped heads, window edge, sinks, soft cap, QK-norm, partial rotation; values and gradients."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effmodels.config import ConfigError
from effmodels.layers.context import Ctx
from effmodels.mixers.attention import Attention
from effmodels.mixers.base import Env
from effmodels.models import state as model_state
from tests.contract.cases import draw, fill, jacobian, jit
from tests.mixers import oracles
from tests.numerics import assert_close, assert_trees_close

T, D = 19, 12
ENV = Env(d_model=D, param_dtype="float64", norm_eps=1e-3)
CASES = {
    "mha": {"num_heads": 3},
    "gqa": {"num_heads": 6, "num_kv_heads": 3, "head_dim": 4, "rope_theta": 100.0},
    "mqa": {"num_heads": 4, "num_kv_heads": 1, "head_dim": 6, "bias": True, "sinks": True},
    "gate": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "output_gate": True},
    "window": {"num_heads": 2, "window": 5, "soft_cap": 2.0, "rotary_fraction": 0.34, "scale": 0.7, "qk_norm": True},
    "everything": {
        "num_heads": 4, "num_kv_heads": 2, "head_dim": 10, "window": 3, "soft_cap": 1.5, "sinks": True, "qk_norm": True, "bias": True,
        "rotary_fraction": 0.5, "output_gate": True,
    },
    "no_rotation": {"num_heads": 2, "rotary_fraction": 0.0, "sinks": True},
}  # fmt: skip
# Rotated dims.
ROTARY = {"mha": 4, "gqa": 4, "mqa": 6, "gate": 6, "window": 2, "everything": 4, "no_rotation": 0}  # of 0.34 * 6 = 2.04 and 0.5 * 10


def make(fields):
    return fill(lambda: Attention(Attention.Config(**fields), ENV, rngs=nnx.Rngs(0)))[:2]


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in ("mha", "gqa", "gate") else []) for n in CASES])
def test_values_and_gradients_are_those_of_the_naive_form(name, x64):
    fields = CASES[name]
    graphdef, params = make(fields)
    x, probe = draw(T, D, seed=1), draw(T, D, seed=2)
    c = {
        "heads": fields["num_heads"], "kv_heads": fields.get("num_kv_heads", fields["num_heads"]), "theta": fields.get("rope_theta", 1e4),
        "rotary": ROTARY[name], "window": fields.get("window"), "cap": fields.get("soft_cap"), "scale": fields.get("scale"),
        "eps": 1e-3, "qk_norm": fields.get("qk_norm", False),
    }  # fmt: skip

    def mixer(params, x):
        return model_state.merge(graphdef, params, {})(x[None], Ctx())[0]

    def naive(params, x):
        return oracles.attention_layer(jnp, params, x, c)

    @jit
    def run(params, x):
        def of(f):
            return jax.grad(lambda p, x: (jnp.sum(f(p, x) * probe), f(p, x)), argnums=(0, 1), has_aux=True)(params, x)

        return of(mixer), of(naive)

    (got_grads, got), (want_grads, _) = run(params, x)
    assert_close("values", got, oracles.attention_layer(np, params, x, c), rel=1e-12)
    assert_trees_close(got_grads, want_grads, rel=1e-10)


def test_a_window_of_w_sees_w_keys_and_itself(x64):
    """Hugging Face's sliding_window=W lets a query see W keys, itself included: window = W - 1 here."""
    W = 4
    graphdef, params = make({"num_heads": 2, "window": W - 1})

    def row(x):
        return model_state.merge(graphdef, params, {})(x[None], Ctx())[0] @ draw(D, seed=3)

    by_token = np.abs(np.asarray(jit(lambda x: jacobian(row, x))(draw(T, D)))).max(axis=-1)
    t_s = np.arange(T)[:, None] - np.arange(T)[None, :]
    assert np.array_equal(by_token > 0, (t_s >= 0) & (t_s < W))


def test_order_decides_who_sees_whom_and_positions_only_rotate(x64):
    """index_BT orders a shuffled row; shifting all rotary positions changes nothing."""
    graphdef, params = make({"num_heads": 2, "window": 4})
    x, order = draw(1, T, D), np.random.default_rng(0).permutation(T).astype(np.int32)

    @jit
    def run(params, x):
        mixer = model_state.merge(graphdef, params, {})
        shifted = mixer(x, Ctx(positions_BT=jnp.arange(T)[None] + 100))
        shuffled = mixer(x[:, order], Ctx(index_BT=order[None]))
        return mixer(x, Ctx()), shifted, shuffled

    plain, shifted, shuffled = run(params, x)
    assert_close("shifted positions", shifted, plain, rel=1e-12)
    assert_close("shuffled row", shuffled, np.asarray(plain)[:, order], rel=1e-12)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_heads": 5}, r"attention: d_model=12 is not divisible by num_heads=5; valid: \[1\], or set head_dim"),
        ({"num_heads": 0}, r"num_heads=0"),
        ({"num_heads": 6, "num_kv_heads": 4}, r"num_heads=6 is not divisible by num_kv_heads=4; valid: \[1, 2, 3, 6\]"),
        ({"num_heads": 6, "num_kv_heads": 0}, r"num_heads=6 is not divisible by num_kv_heads=0"),
        ({"num_heads": 6, "rotary_fraction": 1.5}, r"expected 0 <= rotary_fraction <= 1, got 1.5"),
        ({"num_heads": 6, "window": -1}, r"expected window >= 0 \(keys before the query\) or None, got -1"),
        ({"num_heads": 6, "soft_cap": 0.0}, r"soft_cap"),
    ],
)
def test_bad_configs_say_what_to_do(fields, message):
    with pytest.raises(ConfigError, match=message):
        Attention.check(Attention.Config(**fields), ENV)

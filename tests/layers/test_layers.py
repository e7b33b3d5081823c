"""Norms, parameters, the matmul door, the head, dropout and keys."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effmodels.layers import head
from effmodels.layers.context import Ctx, dropout
from effmodels.layers.linear import dot
from effmodels.layers.norms import LayerNorm, RMSNorm, rms_normalise
from effmodels.layers.param import ParamInfo, ones, param, zeros
from effmodels.models import state as model_state
from tests.contract.cases import draw
from tests.numerics import assert_close, assert_trees_close


def test_norms_are_their_formulas(x64):
    x = draw(3, 5, 7) * 1e-2
    rms, layer = (norm(7, rngs=nnx.Rngs(0), eps=1e-5, param_dtype="float64") for norm in (RMSNorm, LayerNorm))
    scale, bias = draw(7, seed=1), draw(7, seed=2)
    rms.scale[...], layer.scale[...], layer.bias[...] = scale, scale, bias
    assert_close("rms", rms(x), x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale, rel=1e-13)
    assert_close("layer", layer(x), (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * scale + bias, rel=1e-13)


def test_an_offset_is_added_to_the_scale(x64):
    """Values and gradients; the scale starts where norm and offset together multiply with one."""
    x, probe, scale, bias = draw(3, 5, 7), draw(3, 5, 7, seed=3), draw(7, seed=1), draw(7, seed=2)
    for norm, offset in ((RMSNorm, 1.0), (LayerNorm, 0.75)):
        module = norm(7, rngs=nnx.Rngs(0), eps=1e-5, param_dtype="float64", offset=offset)
        assert np.array_equal(module.scale[...], np.full(7, 1 - offset))
        graphdef, params, _ = model_state.split(module)
        params = {n: {"scale": scale, "bias": bias}[n] for n in params}

        def plain(p, x, norm=norm, offset=offset):
            centred = x - x.mean(-1, keepdims=True) if norm is LayerNorm else x
            return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * (offset + p["scale"]) + p.get("bias", 0.0)

        def called(p, x, graphdef=graphdef):
            return model_state.merge(graphdef, p, {})(x)

        got, want = (jax.grad(lambda p, x, f=f: (jnp.sum(f(p, x) * probe), f(p, x)), argnums=(0, 1), has_aux=True)(params, x)
                     for f in (called, plain))  # fmt: skip
        assert_trees_close(got, want, rel=1e-12)


def test_an_offset_keeps_the_bits_of_a_small_scale():
    """1 + 2^-9 is one in bfloat16, and times 3 it is not three."""
    norm = RMSNorm(2, rngs=nnx.Rngs(0), eps=0.0, param_dtype="bfloat16", offset=1.0)
    norm.scale[...] = jnp.full((2,), 2.0**-9, jnp.bfloat16)
    assert np.array_equal(norm(jnp.asarray([[1.0, -1.0]], jnp.bfloat16)), jnp.asarray([[1.0, -1.0]], jnp.bfloat16))
    wide = norm(jnp.asarray([[1.0, -1.0]], jnp.float32))
    assert np.array_equal(wide, np.float32([[1 + 2.0**-9, -1 - 2.0**-9]]))


def test_norms_compute_in_float32_and_survive_zeros():
    x = jnp.full((1, 64), 300.0, jnp.bfloat16)  # the sum of squares, 5.8e6, needs more than bfloat16's 8 bits
    y = rms_normalise(x, 1e-6)
    assert y.dtype == jnp.bfloat16 and np.array_equal(y, np.ones_like(y))
    assert np.array_equal(rms_normalise(jnp.zeros((2, 4)), 1e-6), np.zeros((2, 4)))


@pytest.mark.parametrize(
    "spec, x_shape, w_shape",
    [
        ("BTD,DNH->BTNH", (2, 3, 4), (4, 5, 6)),
        ("BTNH,NHD->BTD", (2, 3, 5, 6), (5, 6, 4)),
        ("BTD,DF->BTF", (2, 3, 4), (4, 5)),
        ("BTD,VD->BTV", (2, 3, 4), (5, 4)),
        ("BTE,EDF->BTEDF", (1, 2, 3), (3, 4, 5)),
        ("BTHN,NHD->BTD", (2, 3, 6, 5), (5, 6, 4)),
    ],
)
def test_dot_is_the_einsum(spec, x_shape, w_shape, x64):
    x, w = draw(*x_shape), draw(*w_shape, seed=1)
    want = np.einsum(spec, x, w)
    assert_close("array", dot(spec, x, w), want, rel=1e-13)
    assert_close("param", dot(spec, jnp.asarray(x, jnp.float32), nnx.Param(jnp.asarray(w))), want, rel=1e-6)


def test_dot_computes_in_the_dtype_of_x():
    x, w = jnp.ones((2, 3, 4), jnp.bfloat16), jnp.ones((4, 5))
    assert dot("BTD,DF->BTF", x, w).dtype == jnp.bfloat16
    assert dot("BTD,DF->BTF", x, w, dtype=jnp.float32).dtype == jnp.float32


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_keep_float32_sums(tied, dtype):
    """In bfloat16 too: the logits are sums of products of bfloat16 numbers, not bfloat16 numbers."""
    x, w = jnp.asarray(draw(2, 3, 40), dtype), jnp.asarray(draw(*((9, 40) if tied else (40, 9)), seed=1), jnp.float32)
    z = jax.jit(lambda x, w: head.logits(x, w, tied=tied, soft_cap=4.0, scale=0.5))(x, w)
    wide_x, wide_w = np.asarray(x, np.float64), np.asarray(w.astype(dtype), np.float64)
    assert z.dtype == jnp.float32
    assert_close("logits", z, 4.0 * np.tanh(0.5 * wide_x @ (wide_w.T if tied else wide_w) / 4.0), rel=1e-6)


def test_parameters_name_every_dim():
    made = param(jax.random.normal, jax.random.key(0), (3, 40, 50), ("expert", "embed", "mlp"), in_dims=("embed",), batch_dims=("expert",))
    assert made.get_metadata()["info"] == ParamInfo(("expert", "embed", "mlp"), ("embed",), ("expert",))
    assert abs(np.asarray(made[...]).std() * 40**0.5 - 1) < 0.03
    assert np.array_equal(param(ones, None, (3,), ("norm",), in_dims=())[...], np.ones(3))
    assert np.array_equal(param(zeros, None, (3,), ("norm",), in_dims=())[...], np.zeros(3))
    with pytest.raises(ValueError, match=r"shape \(3, 4\) has 2 dims but dim_names \('embed',\) has 1"):
        param(ones, None, (3, 4), ("embed",), in_dims=())
    with pytest.raises(ValueError, match=r"\['mlp'\] in in_dims or batch_dims, but dim_names are \('embed',\)"):
        param(ones, None, (3,), ("embed",), in_dims=("mlp",))


def test_dropout_keeps_the_mean_and_is_off_without_a_key():
    x = jnp.ones((200, 200))
    y = np.asarray(dropout(x, 0.25, jax.random.key(0)))
    assert set(np.unique(y)) == {0.0, np.float32(1 / 0.75)} and abs((y == 0).mean() - 0.25) < 0.01
    assert dropout(x, 0.25, None) is x and dropout(x, 0.0, jax.random.key(0)) is x


def test_keys_differ_by_layer_and_site_only():
    ctx = Ctx(key=jax.random.key(0))
    places = [(layer, site) for layer in (-1, 0, 1) for site in (0, 1, 2)]
    data = {(layer, site): tuple(jax.random.key_data(ctx.at_layer(layer).key_for(site)).tolist()) for layer, site in places}
    assert len(set(data.values())) == 9
    assert Ctx().key_for(0) is None
    traced = jax.jit(lambda layer: jax.random.key_data(ctx.at_layer(layer).key_for(2)))(1)
    assert tuple(traced.tolist()) == data[1, 2], "a traced layer number draws what a fixed one draws"


def test_rotary_positions_fall_back_to_order_then_to_the_row():
    positions, index = np.array([[3, 4]]), np.array([[1, 0]])
    assert Ctx(positions_BT=positions, index_BT=index).rotary_positions(1, 2) is positions
    assert Ctx(index_BT=index).rotary_positions(1, 2) is index
    assert np.array_equal(Ctx().rotary_positions(2, 3), [[0, 1, 2]] * 2)

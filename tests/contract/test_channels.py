"""Every channel mixer: positions stay apart, padding changes nothing, gradients reach every parameter, dims are named.

Letters: B batch, T time, D model, E experts.
"""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effmodels.layers.context import Ctx
from effmodels.models import state as model_state
from effmodels.parallel.axes import DIMS
from tests.contract.cases import CHANNEL_CASES, D_MODEL, draw, jacobian, jit, make_channel
from tests.numerics import assert_close

pytestmark = pytest.mark.usefixtures("x64")
T = 11
SEGMENTS = np.array([[1] * 4 + [2] * 5 + [0] * 2, [0] + [1] * 10], np.int32)


@pytest.mark.parametrize("kind, fields", CHANNEL_CASES)
def test_positions_padding_and_gradients(kind, fields):
    graphdef, params, buffers = make_channel(kind, fields, implementation="reference" if fields else None)
    x = draw(2, T, D_MODEL)
    elsewhere = draw(2, T, D_MODEL, seed=5)
    padding = (SEGMENTS == 0)[..., None]

    def run(params, x_BTD, mode):
        return model_state.merge(graphdef, params, buffers)(x_BTD, Ctx(segment_ids_BT=SEGMENTS, mode=mode))

    @jit
    def everything(params, x, elsewhere):
        probe = draw(D_MODEL, seed=2)
        by_token = jacobian(lambda row: run(params, jnp.stack([x[0], row]), "eval")[0][1] @ probe, x[1])
        other_padding = run(params, jnp.where(padding, elsewhere, x), "train")
        other_future = run(params, x.at[:, 6:].set(elsewhere[:, 6:]), "train")

        def loss(params):
            y, aux = run(params, x, "train")
            total = jnp.sum(y * elsewhere * ~padding)
            return total + (sum(aux.losses.values()) if aux is not None else 0.0), (y, aux)

        return by_token, other_padding, other_future, jax.grad(loss, has_aux=True)(params)

    by_token, (y_padding, aux_padding), (y_future, _), (grads, (y, aux)) = everything(params, x, elsewhere)
    apart = ~np.eye(T, dtype=bool)
    assert np.all(np.asarray(by_token)[apart] == 0.0), "a position depends on another one"
    valid = ~padding[..., 0]
    assert np.array_equal(np.asarray(y)[valid], np.asarray(y_padding)[valid]), "what is in the padding changes a token"
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), aux, aux_padding)), "padding is counted"
    assert np.array_equal(np.asarray(y)[:, :6], np.asarray(y_future)[:, :6]), "a later token changes an earlier one"
    for path, gradient in grads.items():
        assert np.all(np.isfinite(gradient)) and np.any(np.asarray(gradient) != 0), path
    if aux is not None:
        assert aux.load_E.shape == (fields.get("num_experts", 8),)
        assert all(np.shape(v) == () and np.isfinite(v) for v in (*aux.losses.values(), *aux.metrics.values()))


@pytest.mark.parametrize("kind, fields", CHANNEL_CASES)
def test_every_dim_is_named(kind, fields):
    graphdef, params, buffers = make_channel(kind, fields)
    for path, info in model_state.info(model_state.merge(graphdef, params, buffers)).items():
        assert len(info.dim_names) == {**params, **buffers}[path].ndim, path
        assert set(info.dim_names) <= {*DIMS, None}, path
        assert set(info.in_dims) | set(info.batch_dims) <= set(info.dim_names), path


@pytest.mark.parametrize("kind, fields", CHANNEL_CASES)
def test_rows_do_not_depend_on_the_batch(kind, fields):
    """A row alone equals the row in a batch, drops included: capacity belongs to the row, not to the micro-batch."""
    graphdef, params, buffers = make_channel(kind, fields, implementation="reference")
    x = draw(2, T, D_MODEL)

    @jit
    def both(params, x):
        layer = model_state.merge(graphdef, params, buffers)
        return layer(x, Ctx())[0], jnp.concatenate([layer(x[:1], Ctx())[0], layer(x[1:], Ctx())[0]])

    together, alone = both(params, x)
    assert_close("rows", together, alone, rel=1e-14)

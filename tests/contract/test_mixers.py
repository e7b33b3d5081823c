"""Every token mixer: prefill, chunks and steps equal one call; causality and packing are exact zeros of the Jacobian; gradients reach all.

All in float64, where forms that are equal agree to rounding of 1e-16. Letters: B batch, T time, D model.
"""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effmodels.layers.context import Ctx
from effmodels.mixers.registry import get_mixer
from effmodels.models import state as model_state
from tests.contract.cases import D_MODEL, MIXER_CASES, WINDOW, decode_ctx, draw, jacobian, jit, make
from tests.numerics import assert_close

pytestmark = pytest.mark.usefixtures("x64")
CHUNKS = (1, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW + 2)
STEPS = 4
TOTAL = sum(CHUNKS) + STEPS
DOCUMENTS = np.array([1] * 5 + [2] + [3] * 4 + [0] * 3, np.int32)


def ragged():
    """valid_BT: a full row, left padding by 1 and by more than two chunks, holes, and a right-padded chunk with an idle step."""
    valid = np.ones((4, TOTAL), bool)
    valid[1, :1] = valid[2, : 2 * WINDOW + 1] = valid[3, :3] = False
    valid[1, 6] = valid[2, 15] = valid[2, 17:20] = False
    valid[3, sum(CHUNKS) - 6 : sum(CHUNKS)] = valid[3, -2] = False
    return valid


@pytest.mark.parametrize("kind, fields", MIXER_CASES)
def test_prefill_chunks_and_steps_equal_call(kind, fields):
    graphdef, params, _ = make(kind, fields)
    valid, x = ragged(), draw(4, TOTAL, D_MODEL)
    order = np.argsort(~valid, axis=1, kind="stable")
    compact = np.take_along_axis(x, order[..., None], axis=1)  # each row's valid tokens first; what follows is in their future

    @jit
    def forms(params, x, valid, compact):
        mixer = model_state.merge(graphdef, params, {})
        empty = mixer.init_state(4, TOTAL, jnp.float64)
        whole, _ = mixer.prefill(x, decode_ctx(valid), empty, valid)
        state, at, before, parts = empty, 0, jnp.zeros((4, 1), jnp.int32), []
        for width in CHUNKS:
            here = valid[:, at : at + width]
            y, state = mixer.prefill(x[:, at : at + width], decode_ctx(here, before), state, here)
            parts.append(y)
            at, before = at + width, before + jnp.sum(here, axis=1, keepdims=True, dtype=jnp.int32)

        def step(carry, slices):
            state, before = carry
            x_BD, active = slices
            y, state = mixer.step(x_BD, decode_ctx(active[:, None], before, "step"), state, active)
            return (state, before + active[:, None]), y

        (state, _), ys = jax.lax.scan(step, (state, before), (x[:, at:].swapaxes(0, 1), valid[:, at:].T))
        parts.append(ys.swapaxes(0, 1))
        return mixer(compact, Ctx(mode="eval")), whole, jnp.concatenate(parts, axis=1), empty, state

    called, whole, chunked, empty, state = forms(params, x, valid, compact)
    want = np.take_along_axis(np.asarray(called), (np.cumsum(valid, axis=1) - valid)[..., None], axis=1)[valid]
    assert_close("prefill", np.asarray(whole)[valid], want, rel=1e-12)
    assert_close("chunks and steps", np.asarray(chunked)[valid], want, rel=1e-12)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), state) == jax.tree.map(lambda a: (a.shape, a.dtype), empty)


@pytest.mark.parametrize("kind, fields", MIXER_CASES)
def test_causality_packing_and_gradients(kind, fields):
    graphdef, params, _ = make(kind, fields)
    T = len(DOCUMENTS)
    x, weights = draw(T, D_MODEL), draw(T, D_MODEL, seed=3) * (DOCUMENTS > 0)[:, None]
    lengths = np.bincount(DOCUMENTS)[1:]
    starts = np.cumsum(lengths) - lengths
    # Each document in a row of its own, padding behind: rows of the index table point into x; T is a row of zeros.
    table = np.array([[start + t if t < n else T for t in range(T)] for start, n in zip(starts, lengths)])
    alone_ids = (table < T).astype(np.int32)

    def run(params, x_BTD, segment_ids):
        return model_state.merge(graphdef, params, {})(x_BTD, Ctx(segment_ids_BT=segment_ids))

    @jit
    def everything(params, x, weights):
        probe = draw(D_MODEL, seed=2)
        causal = jacobian(lambda x: run(params, x[None], None)[0] @ probe, x)
        packed = jacobian(lambda x: run(params, x[None], DOCUMENTS[None])[0] @ probe, x)

        def packed_loss(params):
            y = run(params, x[None], DOCUMENTS[None])[0]
            return jnp.sum(y * weights), y

        def alone_loss(params):
            rows = jnp.concatenate([x, jnp.zeros((1, D_MODEL))])[table]
            y = run(params, rows, alone_ids)
            return jnp.sum(y * jnp.concatenate([weights, jnp.zeros((1, D_MODEL))])[table]), y

        return causal, packed, jax.grad(packed_loss, has_aux=True)(params), jax.grad(alone_loss, has_aux=True)(params)

    causal, packed, (packed_grads, y_packed), (alone_grads, y_alone) = everything(params, x, weights)
    later = np.arange(T)[None, :] > np.arange(T)[:, None]
    assert np.all(np.asarray(causal)[later] == 0.0), "a token depends on a later one"
    assert np.all(np.abs(np.asarray(causal)[np.arange(T), np.arange(T)]).max(axis=-1) > 0), "a token does not depend on itself"
    other = DOCUMENTS[None, :] != DOCUMENTS[:, None]
    assert np.all(np.asarray(packed)[later | other] == 0.0), "a token depends on another document or on padding"
    for i, (start, n) in enumerate(zip(starts, lengths)):
        assert_close(f"document {i} packed", np.asarray(y_packed)[start : start + n], np.asarray(y_alone)[i, :n], rel=1e-12)
    for path, gradient in packed_grads.items():
        assert np.all(np.isfinite(gradient)), f"{path}: gradient is not finite"
        assert np.any(np.asarray(gradient) != 0), f"{path}: gradient is zero"
        assert_close(f"gradient of {path}", gradient, alone_grads[path], rel=1e-12)


@pytest.mark.parametrize("kind, fields", [case for case in MIXER_CASES if not case.values[1]])
def test_bfloat16_gradients_are_finite_and_near_float32(kind, fields):
    runs = {}
    for dtype in ("bfloat16", "float32"):
        graphdef, params, _ = make(kind, fields, dtype=dtype)

        def loss(params, x, graphdef=graphdef):
            y = model_state.merge(graphdef, params, {})(x, Ctx(segment_ids_BT=jnp.ones((2, 9), jnp.int32)))
            return jnp.sum(y.astype(jnp.float32) ** 2)

        x = jnp.asarray(draw(2, 9, D_MODEL), dtype)
        runs[dtype] = jit(jax.grad(loss))({p: jnp.asarray(a) for p, a in params.items()}, x)
    for path, got in runs["bfloat16"].items():
        assert got.dtype == jnp.bfloat16
        assert_close(path, got, runs["float32"][path], rel=5e-2)


@pytest.mark.parametrize("kind, fields", MIXER_CASES)
def test_every_dim_is_named_and_state_bytes_are_exact(kind, fields):
    from effmodels.parallel.axes import DIMS

    graphdef, params, buffers = make(kind, fields)
    mixer = model_state.merge(graphdef, params, buffers)
    for path, info in model_state.info(mixer).items():
        array = {**params, **buffers}[path]
        assert len(info.dim_names) == array.ndim, path
        assert set(info.dim_names) <= {*DIMS, None}, path
        assert set(info.in_dims) | set(info.batch_dims) <= set(info.dim_names), path
    for dtype, item in (("float64", 8), ("bfloat16", 2), ("float32", 4)):
        for max_len in (3, 3 * WINDOW):
            state = jax.eval_shape(lambda m=max_len, d=dtype: mixer.init_state(2, m, d))
            dims = type(state).DIMS
            for name, leaf in vars(state).items():
                assert len(dims[name]) == leaf.ndim and set(dims[name]) <= {*DIMS, None}, name
                assert dims[name][0] == "batch" and leaf.shape[0] == 2, name
            actual = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
            assert get_mixer(kind).cost(mixer.config, mixer.env, max_len, item).state_bytes * 2 == actual, (dtype, max_len)

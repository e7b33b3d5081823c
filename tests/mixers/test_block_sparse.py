"""Blocks, choice, window and gates against dense matrices of weights; what is chosen; limits in which it is dense attention; mistakes."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effmodels.config import ConfigError
from effmodels.layers.context import Ctx
from effmodels.layers.positions import rope, rotate
from effmodels.mixers.base import Env
from effmodels.mixers.block_sparse import BlockSparse
from effmodels.models import state as model_state
from effmodels.parallel import block_select
from tests.contract.cases import D_MODEL, draw, jit, make
from tests.numerics import assert_close, assert_trees_close

FIELDS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "window": 2, "block": 3, "top_blocks": 2}
DOCUMENTS = np.array([1] * 13 + [2] * 4 + [3] + [0] * 2, np.int32)


def weights_of(logits, mask):
    """Softmax over what the mask shows; zeros where it shows nothing."""
    shown = jnp.where(mask, jnp.exp(logits), 0.0)
    return shown / jnp.maximum(shown.sum(-1, keepdims=True), 1e-300)


def slow(mixer, x_TD, documents):
    """y [T, D]: every document alone, every branch as a dense matrix of weights."""
    c, (N, H), K = mixer.config, mixer.wq.shape[1:], mixer.wk.shape[1]
    y = jnp.zeros(x_TD.shape)
    for document in range(1, documents.max() + 1):
        at = np.flatnonzero(documents == document)
        x, T, M = x_TD[at], len(at), len(at) // c.block
        q, k, v = (jnp.einsum("td,dnh->tnh", x, w[...]) for w in (mixer.wq, mixer.wk, mixer.wv))
        turned = lambda a, places: rotate(a[None], np.broadcast_to(places, (1, len(a))), rope(H, 10_000.0)[0])[0]  # noqa: E731
        pressed_k = pressed_v = 0.0
        for i in range(c.block):  # a key as seen from the last token of its block
            one_k, one_v = (a[i : M * c.block : c.block] for a in (k, v))
            w_k, w_v = (w[...][i * H : (i + 1) * H] for w in (mixer.w_compress_k, mixer.w_compress_v))
            pressed_k, pressed_v = pressed_k + turned(one_k, i - c.block + 1) @ w_k, pressed_v + one_v @ w_v
        pressed_k = turned(pressed_k, np.arange(M) * c.block + c.block - 1)
        q, k = (turned(a, np.arange(T)) for a in (q, k))
        token, block = np.arange(T), np.arange(M)
        see_TM = (block + 1) * c.block - 1 <= token[:, None]
        see_window = (token <= token[:, None]) & (token >= token[:, None] - c.window)
        gate = jax.nn.sigmoid(jnp.einsum("td,dng->tng", x, mixer.w_gate[...]))
        out = []
        for kv in range(K):
            group = range(kv * (N // K), (kv + 1) * (N // K))
            on_blocks = [weights_of(q[:, n] @ pressed_k[:, kv].T / H**0.5, see_TM) for n in group]
            total = jnp.where(see_TM, sum(on_blocks) + 100.0 * (block == 0), -1.0)
            better = (total[:, None] > total[..., None]) | (total[:, None] == total[..., None]) & (block < block[:, None])
            chosen = see_TM & (better.sum(-1) < c.top_blocks)
            see_chosen = jnp.pad(jnp.repeat(chosen, c.block, axis=1), ((0, 0), (0, T - M * c.block)))
            for n, on in zip(group, on_blocks):
                logits = q[:, n] @ k[:, kv].T / H**0.5
                far, near, window = on @ pressed_v[:, kv], *(weights_of(logits, m) @ v[:, kv] for m in (see_chosen, see_window))
                out.append(gate[:, n, 0, None] * far + gate[:, n, 1, None] * near + gate[:, n, 2, None] * window)
        y = y.at[at].set(jnp.einsum("tnh,nhd->td", jnp.stack(out, 1), mixer.wo[...]))
    return y


@pytest.mark.parametrize("pairs", [1 << 16, pytest.param(8, marks=pytest.mark.slow)])
def test_values_and_gradients_equal_dense_matrices(pairs, monkeypatch, x64):
    monkeypatch.setattr(block_select, "GATHERED", pairs)  # few: queries in several parts
    graphdef, params, _ = make("block_sparse", FIELDS)
    x, weights = draw(len(DOCUMENTS), D_MODEL), draw(len(DOCUMENTS), D_MODEL, seed=3) * (DOCUMENTS > 0)[:, None]

    def run(form):
        def loss(params, x):
            y = form(model_state.merge(graphdef, params, {}), x)
            return jnp.sum(y * weights), y

        return jax.value_and_grad(loss, (0, 1), has_aux=True)

    (_, got), gradients = jit(run(lambda mixer, x: mixer(x[None], Ctx(segment_ids_BT=DOCUMENTS[None]))[0]))(params, x)
    (_, want), want_gradients = jit(run(lambda mixer, x: slow(mixer, x, DOCUMENTS)))(params, x)
    there = DOCUMENTS > 0
    assert_close("y", np.asarray(got)[there], np.asarray(want)[there], rel=1e-12)
    assert_trees_close(gradients, want_gradients, rel=1e-10)
    assert all(np.any(np.asarray(g) != 0) for g in gradients[0].values())


def test_the_first_block_and_the_heaviest_are_chosen(x64):
    """One query after 5 blocks; values name their block, so that the output of the chosen tokens tells which they are."""
    M, C = 5, 2
    end, ones = np.arange(1, M + 1)[None] * C - 1, np.ones((1, M), np.int32)
    keys, named = np.zeros((1, M, C, 1, M)), np.broadcast_to(np.eye(M)[None, :, None, None], (1, M, C, 1, M))
    compressed = np.eye(M)[None, :, None] * np.array([0.0, 3, 1, 5, 2])[:, None, None]
    got = block_select.block_attention(
        np.ones((1, 1, 1, M)), (keys, named), (compressed, compressed), end, top_blocks=3, scale=1.0, positions=np.array([[9]]),
        segment_ids=ones[:, :1], block_segment_ids=ones,
    )[1]  # fmt: skip
    np.testing.assert_allclose(got[0, 0, 0], [1 / 3, 1 / 3, 0, 1 / 3, 0], rtol=1e-12)


def test_with_every_block_chosen_and_one_gate_open_it_is_dense_attention(x64):
    """Of a query that ends a block: no token is left to the window."""
    fields = FIELDS | {"top_blocks": 9}
    graphdef, params, _ = make("block_sparse", fields)
    dense_graphdef, _, _ = make("attention", {k: fields[k] for k in ("num_heads", "num_kv_heads", "head_dim")})
    x = draw(1, 12, D_MODEL)
    ends = (np.arange(12) + 1) % 3 == 0

    @jit
    def both(params, x):
        mixer = model_state.merge(graphdef, params, {})
        mixer._gated = lambda x_BTD, far, near, window: mixer._output(near, x_BTD)
        shared = {n: params[n] for n in ("wq", "wk", "wv", "wo")}
        return mixer(x, Ctx()), model_state.merge(dense_graphdef, shared, {})(x, Ctx())

    got, want = both(params, x)
    assert_close("y", np.asarray(got)[:, ends], np.asarray(want)[:, ends], rel=1e-12)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"block": 0}, "expected block, top_blocks >= 1, got 0 and 4"),
        ({"block": 8, "window": 6}, "window=6 does not reach the start of an incomplete block of 8 tokens; set at least 7"),
        ({"sinks": True}, "no sinks or soft_cap"),
    ],
)
def test_mistakes(fields, message):
    with pytest.raises(ConfigError, match=message):
        BlockSparse.check(BlockSparse.Config(**fields), Env(d_model=D_MODEL))

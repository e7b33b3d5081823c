"""Sparse attention against a choice made query by query: exact at top_k = length, its gradients, the indexer's own loss, and its recall.

Letters: T time, S keys, N heads, D model, J index heads, C index dim.
"""
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from effmodels.config import ConfigError
from effmodels.layers.context import Ctx
from effmodels.layers.positions import rope_frequencies
from effmodels.mixers.attention import Attention
from effmodels.mixers.base import Env
from effmodels.mixers.topk_sparse import TopkSparse, with_loss
from effmodels.models import state as model_state
from effmodels.parallel import axes, layouts, mesh, topk
from effmodels.parallel.options import Options
from tests.contract.cases import draw, fill, jit
from tests.numerics import assert_close, assert_trees_close

T, D, H, K = 24, 12, 6, 5
ENV = Env(d_model=D, param_dtype="float64")
DOCUMENTS = np.array([1] * 3 + [2] * 13 + [3] * 6 + [0] * 2, np.int32)
FIELDS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": H, "top_k": K, "index_heads": 3, "index_dim": 6, "kl_coef": 0.7}


def make(cls=TopkSparse, **fields):
    return fill(lambda: cls(cls.Config(**fields), ENV, rngs=nnx.Rngs(0)))[:2]


def turned(a_THx):
    """Rotated by position, as complex numbers."""
    half = a_THx.shape[-1] // 2
    angles = np.arange(len(a_THx))[:, None] * rope_frequencies(2 * half, 10_000.0)
    return (a_THx[..., :half] + 1j * a_THx[..., half:]) * np.exp(1j * angles).reshape(len(a_THx), *(1,) * (a_THx.ndim - 2), half)


def index_scores(p, x_TD):
    """I_ts = sum_j w_tj ReLU(q_tj . k_s), scaled by 1 / sqrt(J C)."""
    J, C = p["w_index_q"].shape[1:]
    q, k = turned(jnp.einsum("td,djc->tjc", x_TD, p["w_index_q"])), turned(x_TD @ p["w_index_k"])
    total = 0.0
    for j in range(J):
        total = total + (x_TD @ p["w_index_weight"][:, j])[:, None] * jnp.maximum((q[:, j] @ k.conj().T).real, 0)
    return total / (J * C) ** 0.5


def choice(scores_TS, segments, count):
    """bool [T, S]: the `count` visible keys of every query with the highest scores, of equal ones the earlier."""
    chosen = np.zeros(scores_TS.shape, bool)
    for t in range(len(scores_TS)):
        seen = [s for s in range(t + 1) if segments[s] == segments[t] != 0]
        chosen[t, sorted(seen, key=lambda s: (-scores_TS[t, s], s))[:count]] = True
    return chosen


def attention(p, x_TD, chosen):
    """(output [T, D], weights of all heads together, normalised [T, S])."""
    output, together, heads = 0.0, 0.0, p["wq"].shape[1]
    for n in range(heads):
        g = n * p["wk"].shape[1] // heads
        q, k = turned(x_TD @ p["wq"][:, n]), turned(x_TD @ p["wk"][:, g])
        weights = jnp.exp((q @ k.conj().T).real / H**0.5) * chosen
        total = weights.sum(1, keepdims=True)
        weights = weights / jnp.where(total == 0, 1.0, total)
        together, output = together + weights / heads, output + weights @ (x_TD @ p["wv"][:, g]) @ p["wo"][n]
    return output, together


def divergence(p, x_TD, chosen, target_TS):
    logits = jnp.where(chosen, index_scores(p, x_TD), -1e9)
    log_index = logits - jnp.log(jnp.sum(jnp.exp(logits - logits.max(1, keepdims=True)), 1, keepdims=True)) - logits.max(1, keepdims=True)
    return jnp.sum(jnp.where(chosen & (target_TS > 0), target_TS * (jnp.log(jnp.where(chosen, target_TS, 1.0)) - log_index), 0.0))


def loss_and_grads(f, params, x, probe):
    return jax.grad(lambda p, x: (jnp.sum(f(p, x) * probe), f(p, x)), argnums=(0, 1), has_aux=True)(params, x)


@pytest.mark.parametrize("chosen_at_once", [topk.CHOSEN, 10 * K])  # one block of queries; several, the last one ragged
def test_values_and_gradients_are_those_of_the_choice(chosen_at_once, monkeypatch, x64):
    monkeypatch.setattr(topk, "CHOSEN", chosen_at_once)
    graphdef, params = make(**FIELDS)
    x, probe = draw(T, D, seed=1), draw(T, D, seed=2) * (DOCUMENTS > 0)[:, None]
    chosen = choice(np.asarray(index_scores(params, x)), DOCUMENTS, K)
    assert chosen.sum(1).max() == K < (DOCUMENTS == 2).sum()

    def plain(p, x):
        return attention(p, x, chosen)[0]

    @jit
    def run(params, x):
        ctx = Ctx(segment_ids_BT=DOCUMENTS[None])
        got = loss_and_grads(lambda p, x: model_state.merge(graphdef, p, {})(x[None], ctx)[0], params, x, probe)
        target = jax.lax.stop_gradient(attention(params, x, chosen)[1])
        own = jax.grad(lambda p: 0.7 * divergence(p, x, chosen, target))(params)
        return got, loss_and_grads(plain, params, x, probe), own

    ((grads, dx), got), ((want_grads, want_dx), want), own = run(params, x)
    assert_close("values", got, want, rel=1e-12)
    assert_close("dx: nothing of the indexer's loss", dx, want_dx, rel=1e-10)
    for name, gradient in grads.items():
        wanted = own[name] if "index" in name else want_grads[name]
        assert np.any(np.asarray(gradient) != 0)
        assert_close(f"gradient of {name}", gradient, wanted, rel=1e-10)


def test_with_all_keys_it_is_dense_attention(x64):
    dense_fields = {n: FIELDS[n] for n in ("num_heads", "num_kv_heads", "head_dim")}
    graphdef, params = make(**{**FIELDS, "top_k": T})
    dense, _ = make(Attention, **dense_fields)
    shared = {n: a for n, a in params.items() if "index" not in n}
    x, probe = draw(T, D, seed=1), draw(T, D, seed=2) * (DOCUMENTS > 0)[:, None]

    def of(graphdef):
        return lambda p, x: model_state.merge(graphdef, p, {})(x[None], Ctx(segment_ids_BT=DOCUMENTS[None]))[0]

    run = jit(lambda p, shared, x: (loss_and_grads(of(graphdef), p, x, probe), loss_and_grads(of(dense), shared, x, probe)))
    ((grads, dx), got), ((want_grads, want_dx), want) = run(params, shared, x)
    assert_close("values", got[:22], want[:22], rel=1e-13)
    assert_trees_close(({n: grads[n] for n in shared}, dx), (want_grads, want_dx), rel=1e-11)


def test_a_layer_that_no_loss_depends_on_trains_nothing():
    """A pipeline's ticks without work run on a copy of a real micro-batch, and the gradient of their output is zero."""
    def total(weight):
        return lambda y, loss: jnp.sum(with_loss(y, 3.0 * loss) * weight)

    y = jnp.ones(4)
    assert jax.grad(total(2.0), argnums=1)(y, jnp.float32(1)) == 3.0
    assert jax.grad(total(0.0), argnums=1)(y, jnp.float32(1)) == 0.0
    assert np.array_equal(jax.grad(total(2.0))(y, jnp.float32(1)), np.full(4, 2.0))


@pytest.mark.parametrize("layout", ["zigzag", pytest.param("contiguous", marks=pytest.mark.slow)])
def test_a_split_sequence_equals_one_device(layout, x64):
    graphdef, params = make(**FIELDS)
    x, probe, segments = draw(2, T, D, seed=1), draw(2, T, D, seed=2), np.stack([DOCUMENTS, np.ones(T, np.int32)])

    def run(params, x, segments, probe):
        here = layout if axes.shards("seq") > 1 else "contiguous"
        positions = layouts.to_layout(jnp.broadcast_to(jnp.arange(T), segments.shape), here, axes.shards("seq"))
        ctx = Ctx(segment_ids_BT=segments, positions_BT=positions, layout=here)
        return loss_and_grads(lambda p, x: model_state.merge(graphdef, p, {})(x, ctx), params, x, probe)

    (want_grads, want_dx), want = jit(run)(params, x, segments, probe)
    # Four tensor shards are more than the two kv heads.
    with axes.use(mesh.make_mesh({"data": 1, "seq": 2, "tensor": 4}), parallel=Options(layout=layout)):
        (grads, dx), got = jax.jit(run)(params, *(layouts.to_layout(a, layout, 2) for a in (x, segments, probe)))
    assert_close("values", layouts.from_layout(np.asarray(got), layout, 2), want, rel=1e-12)
    assert_trees_close(grads, want_grads, rel=1e-10)
    assert_close("dx", layouts.from_layout(np.asarray(dx), layout, 2), want_dx, rel=1e-10)


def test_the_indexers_loss_teaches_it_recall():
    """One head's attention stays; the indexer alone trains, with all keys chosen, as in the dense warm-up.

    The inputs have a constant entry, as hidden states have a mean: weights w_t linear in an input without one change sign with it, and
    w ReLU(q . k) could not follow q . k.
    """
    fields, length = {"num_heads": 1, "head_dim": H, "rotary_fraction": 0.0, "index_heads": 4, "index_dim": 16}, 32
    env = Env(d_model=D)
    build = lambda top_k: fill(lambda: TopkSparse(TopkSparse.Config(**fields, top_k=top_k), env, rngs=nnx.Rngs(0)))[:2]  # noqa: E731
    (dense, params), (sparse, _) = build(length), build(4)
    params["wq"], params["wk"] = 2 * params["wq"], 2 * params["wk"]  # attention with a preference
    index = {n: jnp.asarray(a) for n, a in params.items() if "index" in n}
    optimizer = optax.adam(2e-2)

    def merged(graphdef, index):
        return model_state.merge(graphdef, {**params, **index}, {})

    @jax.jit
    def train(index, state, batches):
        def step(carry, x):
            index, state = carry
            gradients = jax.grad(lambda index: jnp.sum(merged(dense, index)(x, Ctx())))(index)
            updates, state = optimizer.update(gradients, state)
            return (optax.apply_updates(index, updates), state), None

        return jax.lax.scan(step, (index, state), batches)[0][0]

    def inputs(*shape, seed):
        x = draw(*shape, length, D, seed=seed, dtype=np.float32)
        x[..., 0] = 3.0
        return x

    recall = jax.jit(lambda index, x: merged(sparse, index).recall(x, Ctx()))
    before = recall(index, inputs(8, seed=5))
    after = recall(train(index, optimizer.init(index), inputs(300, 4, seed=6)), inputs(8, seed=5))
    assert before[:, 8:].mean() < 0.4 and after[:, 8:].mean() > 0.9, (before[:, 8:].mean(), after[:, 8:].mean())
    assert np.all(np.asarray(before)[:, :4] == 1.0), "a query that sees no more than top_k keys finds them all"


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"top_k": 0}, r"expected top_k >= 1, got top_k=0"),
        ({"kl_coef": 0.0}, r"expected kl_coef > 0 \(nothing else trains the indexer\), got 0.0"),
        ({"window": 3}, r"no window, sinks or soft_cap"),
        ({"num_heads": 5}, r"d_model=12 is not divisible by num_heads=5"),
    ],
)
def test_bad_configs_say_what_to_do(fields, message):
    with pytest.raises(ConfigError, match=message):
        TopkSparse.check(TopkSparse.Config(**{"num_heads": 2, **fields}), ENV)

"""Mixture of experts: dropless = dense one-hot sum, capacity and groups by brute force, balance by loss and by bias.

Letters: B batch, T time, D model, E experts, k choices per token.
"""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effmodels.channel import routers
from effmodels.channel.moe import MoE
from effmodels.config import ConfigError
from effmodels.layers.context import Ctx
from effmodels.mixers.base import Env
from effmodels.models import state as model_state
from tests.channel import oracles
from tests.contract.cases import D_MODEL, draw, jit, make_channel
from tests.numerics import assert_close, assert_trees_close

B, T = 2, 13
SEGMENTS = np.array([[1] * 7 + [2] * 4 + [0] * 2, [0] + [1] * 12], np.int32)
CASES = {
    "softmax": {"num_experts": 5, "top_k": 2, "hidden": 6, "z_coef": 0.1},
    "sigmoid_groups": {
        "num_experts": 12, "top_k": 3, "hidden": 4, "router": "sigmoid", "groups": 4, "top_groups": 2, "routed_scaling": 2.5,
        "bias_update_rate": 1e-3, "shared_experts": 2, "activation": "geglu", "weights_eps": 1e-2,
    },
    "top1_raw": {"num_experts": 3, "top_k": 1, "hidden": 5, "normalize_weights": False, "activation": "relu2", "balance": "batch"},
    "capacity": {"num_experts": 4, "top_k": 2, "hidden": 6, "capacity_factor": 0.6, "activation": "gelu"},
    "biases": {
        "num_experts": 5, "top_k": 2, "hidden": 6, "activation": "swiglu_clamped", "swiglu_alpha": 1.3, "swiglu_limit": 0.7, "bias": True,
        "router_bias": True, "shared_experts": 1,
    },
}  # fmt: skip
CAPACITY = {"capacity": 4}  # ceil(0.6 * 13 * 2 / 4) = ceil(3.9)


def make(name):
    implementation = "reference" if name in ("sigmoid_groups", "top1_raw") else None
    graphdef, params, buffers = make_channel("moe", CASES[name], implementation=implementation)
    return graphdef, params, {p: draw(*b.shape, seed=4).astype(np.float32) * 0.2 for p, b in buffers.items()}


@pytest.mark.parametrize("name", CASES)
def test_layer_is_the_dense_one_hot_sum(name, x64):
    """Values, every gradient, losses, loads and drops; padding is in none of them."""
    c, (graphdef, params, buffers) = CASES[name], make(name)
    x, probe, valid = draw(B, T, D_MODEL), draw(B, T, D_MODEL, seed=2), SEGMENTS > 0
    bias = buffers.get("bias", np.zeros(c["num_experts"]))
    logits = x @ params["router"] + params.get("router_bias", 0.0)
    kept, routed, dropped = oracles.route(logits, bias, valid, c, CAPACITY.get(name))
    assert name not in CAPACITY or dropped > 0

    def layer(params, x):
        y, aux = model_state.merge(graphdef, params, buffers)(x, Ctx(segment_ids_BT=SEGMENTS))
        return jnp.sum(y * probe * valid[..., None]), (y, aux)

    def dense(params, x):
        return jnp.sum(oracles.moe(jnp, params, x, kept, routed, c) * probe * valid[..., None])

    @jit
    def run(params, x):
        return jax.grad(layer, argnums=(0, 1), has_aux=True)(params, x), jax.grad(dense, argnums=(0, 1))(params, x)

    (got_grads, (y, aux)), want_grads = run(params, x)
    assert_close("y", np.asarray(y)[valid], oracles.moe(np, params, x, kept, routed, c)[valid], rel=1e-12)
    # Only raw weights or a second expert give the router a gradient through y.
    assert_trees_close(got_grads, want_grads, rel=1e-10, floor=1e-12)
    assert np.array_equal(aux.load_E, routed.sum((0, 1)))
    load = routed.sum((0, 1))
    assert_close("drop fraction", aux.metrics["moe_drop_fraction"], dropped / load.sum(), rel=1e-6)
    assert_close("MaxVio", aux.metrics["moe_max_violation"], load.max() / load.mean() - 1, rel=1e-6)
    assert float(aux.metrics["moe_overflow"]) == 0.0
    if name == "softmax":
        squares = np.log(np.exp(logits).sum(-1)) ** 2
        assert_close("z loss", aux.losses["moe_z"], 0.1 * squares[valid].sum(), rel=1e-12)
    assert_close("balance loss", aux.losses["moe_balance"], 0.01 * balance(logits, routed, valid, c), rel=1e-6)


def balance(logits_BTE, routed_BTE, valid_BT, c):
    """Switch (arXiv:2101.03961) eq. 4 to 6 times the number of tokens, per row or over all rows."""
    scores = np.array([[oracles.scores_of(z, c.get("router", "softmax")) for z in row] for row in logits_BTE])
    scores = scores / scores.sum(-1, keepdims=True) * valid_BT[..., None]
    rows = [slice(None)] if c.get("balance") == "batch" else [slice(b, b + 1) for b in range(len(logits_BTE))]
    total = 0.0
    for r in rows:
        n = valid_BT[r].sum()
        f, P = routed_BTE[r].sum((0, 1)) / routed_BTE[r].sum(), scores[r].sum((0, 1)) / n
        total += c["num_experts"] * (f * P).sum() * n
    return total


def test_balance_loss_is_one_per_token_at_balance_and_e_at_collapse():
    E, valid = 4, jnp.arange(8)[None] < 6
    even = (jnp.arange(8)[None, :, None] + jnp.arange(2)) % E
    for logits, ids, want in (
        (jnp.zeros((1, 8, E)), even, 6.0),
        (jnp.full((1, 8, E), -50.0).at[..., 2].set(50.0), jnp.full((1, 8, 1), 2), 6.0 * E),
    ):
        ids = jnp.where(valid[..., None], ids, E)
        routing = routers.Routing(ids, None, jax.nn.softmax(logits), logits)
        for over in ("row", "batch"):
            got = routers.balance_loss(routing, routers.loads(ids, E), valid, over)
            assert_close("balance", got, want, rel=1e-6)


def test_row_losses_add_up_over_micro_batches_and_batch_losses_do_not():
    differences = {}
    for over in ("row", "batch"):
        graphdef, params, buffers = make_channel("moe", {**CASES["softmax"], "balance": over}, dtype="float32")
        x = draw(4, T, D_MODEL).astype(np.float32)
        layer = model_state.merge(graphdef, params, buffers)
        whole, parts = jit(lambda x, layer=layer: (layer(x, Ctx())[1], [layer(x[i : i + 1], Ctx())[1] for i in range(4)]))(x)
        assert_close("z", whole.losses["moe_z"], sum(p.losses["moe_z"] for p in parts), rel=1e-5)
        assert np.array_equal(whole.load_E, sum(p.load_E for p in parts))
        differences[over] = abs(float(whole.losses["moe_balance"]) / float(sum(p.losses["moe_balance"] for p in parts)) - 1)
    assert differences["row"] < 1e-5 < 1e-3 < differences["batch"]


@pytest.mark.parametrize("factor, top_k, E, length", [(1.25, 2, 8, 21), (0.1, 1, 5, 7), (4.0, 2, 4, 8)])
def test_drops_by_closed_form_when_all_tokens_agree(factor, top_k, E, length):
    """A zero router sends every token to the first k experts: each keeps C = ceil(factor T k / E) of T."""
    fields = {"num_experts": E, "top_k": top_k, "hidden": 3, "capacity_factor": factor}
    graphdef, params, buffers = make_channel("moe", fields, dtype="float32", implementation="reference")
    layer = model_state.merge(graphdef, {**params, "router": np.zeros((D_MODEL, E), np.float32)}, buffers)
    x, C = draw(2, length, D_MODEL).astype(np.float32), min(length, -(-int(round(factor * length * top_k * 100)) // (100 * E)))
    (y, aux), (y_eval, aux_eval) = jit(lambda x: [layer(x, Ctx(mode=mode)) for mode in ("train", "eval")])(x)
    assert_close("drop fraction", aux.metrics["moe_drop_fraction"], 1 - C / length, rel=1e-6, floor=1e-9)
    assert np.all(np.asarray(y)[:, C:] == 0) and np.all(np.any(np.asarray(y)[:, :C] != 0, axis=-1)), "the first C tokens stay"
    assert np.array_equal(np.asarray(aux.load_E), [2 * length] * top_k + [0] * (E - top_k)), "loads count what was asked for"
    assert aux_eval.metrics["moe_drop_fraction"] == 0 and np.all(np.any(np.asarray(y_eval) != 0, axis=-1)), "evaluation drops nothing"


def test_bias_moves_the_choice_but_not_the_weight(x64):
    graphdef, params, buffers = make("sigmoid_groups")
    c = MoE.Config(**CASES["sigmoid_groups"])
    logits, valid = draw(1, 50, 12), jnp.ones((1, 50), bool)
    plain, moved = (routers.route(logits, b, valid, c) for b in (jnp.zeros(12), jnp.zeros(12).at[5].set(10.0)))
    assert np.all(np.any(np.asarray(moved.ids_BTk) == 5, axis=-1)) and not np.all(np.any(np.asarray(plain.ids_BTk) == 5, axis=-1))
    for routing in (plain, moved):
        own = np.take_along_axis(1 / (1 + np.exp(-logits)), np.asarray(routing.ids_BTk), axis=-1)
        assert_close("weights", routing.weights_BTk, 2.5 * own / (own.sum(-1, keepdims=True) + c.weights_eps), rel=1e-12)
    gradient = jax.grad(lambda b: jnp.sum(routers.route(logits, b, valid, c).weights_BTk ** 2))(jnp.zeros(12))
    assert np.all(np.asarray(gradient) == 0), "the bias is trained by rule only"


def test_bias_update_balances_to_the_sampling_floor():
    """arXiv:2408.15664 on 64 experts, top-6, 4096 tokens of skewed sigmoid scores: u = 1e-3 ends near the sampling floor, 1e-2 fluctuates.

    The floor is the MaxVio of a perfectly balanced router, 0.12 here.
    """
    E, k, tokens, steps = 64, 6, 4096, 450
    c = MoE.Config(num_experts=E, top_k=k, router="sigmoid")
    skew = 0.55 * draw(E, seed=7).astype(np.float32)
    valid = jnp.ones((1, tokens), bool)

    @jax.jit
    def simulate(rates):
        def step(biases, key):
            logits = skew + jax.random.normal(key, (1, tokens, E))
            loads = jax.lax.map(lambda b: jnp.sum(routers.loads(routers.route(logits, b, valid, c).ids_BTk, E), axis=0), biases)
            return routers.updated_bias(biases, loads, rates[:, None]), routers.max_violation(loads)

        keys = jax.random.split(jax.random.key(0), steps)
        return jax.lax.scan(step, jnp.zeros((len(rates), E)), keys)[1].T

    good, large = np.asarray(simulate(jnp.array([1e-3, 1e-2])))
    floor = float(routers.max_violation(jnp.asarray(np.random.default_rng(0).multinomial(tokens * k, [1 / E] * E, 200))).mean())
    assert 0.10 < floor < 0.14
    assert good[0] > 1.5, "the simulation does not start skewed"
    assert good[-50:].mean() < 1.15 * floor
    assert large[-50:].mean() > 1.5 * floor


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"activation": "swish"}, r"moe.activation: unknown 'swish'. Did you mean 'swiglu'\?"),
        ({"router": "softmin"}, r"moe.router: unknown 'softmin'. Did you mean 'softmax'\?"),
        ({"balance": "rows"}, r"moe.balance: expected 'row' or 'batch', got 'rows'"),
        ({"top_k": 9}, r"moe: top_k=9 must be between 1 and num_experts=8"),
        ({"groups": 3}, r"moe: groups=3 must divide num_experts=8"),
        ({"groups": 0}, r"moe: groups=0 must divide num_experts=8"),
        ({"groups": 4, "top_groups": 1, "top_k": 3}, r"moe: top_k=3 exceeds the 2 experts of top_groups=1 of 4 groups"),
        ({"capacity_factor": 0.0}, r"moe: expected capacity_factor > 0 or None \(dropless\), got 0.0"),
        ({"hidden": 0}, r"moe: expected shared_experts >= 0 and hidden >= 1"),
    ],
)
def test_bad_configs_say_what_to_do(fields, message):
    with pytest.raises(ConfigError, match=message):
        MoE.check(MoE.Config(**fields), Env(d_model=8))


def test_choice_and_weights_are_those_of_top_k_and_indexing(x64):
    """Ties go to the lower expert, -inf (another group) is never chosen; the weights' gradient is that of indexing."""
    scores = np.round(draw(3, 7, 6), 1)
    scores[0, :, 2:] = -np.inf
    scores[1, 0] = 0.5
    ids = routers._largest(jnp.asarray(scores), 2)
    assert np.array_equal(ids, jax.lax.top_k(jnp.asarray(scores), 2)[1]) and ids.dtype == jnp.int32
    scores, dy = draw(3, 7, 6), draw(3, 7, 2, seed=1)
    got, pull = jax.vjp(lambda s: routers._at(s, ids), scores)
    want, pull_plain = jax.vjp(lambda s: jnp.take_along_axis(s, ids, axis=-1), scores)
    assert_close("weights", got, want, rel=1e-15)
    assert_close("gradient of scores", pull(dy)[0], pull_plain(dy)[0], rel=1e-15)

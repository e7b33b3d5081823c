"""Experts over the `expert` axis: tokens travel by all-to-all, values and every gradient as on one device, nothing lost without a word.

Letters: B batch, T time, D model, F ffn, E experts, e experts of one shard, k choices per token, n expert shards, M choices of one shard.
"""
import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from effmodels.channel.moe import MoE
from effmodels.config import ConfigError, ModelConfig
from effmodels.layers.context import Ctx
from effmodels.mixers.base import Env
from effmodels.models import Decoder
from effmodels.models import state as model_state
from effmodels.parallel import axes, exchange, expert, layouts, mesh, travel
from effmodels.parallel.options import Options
from effmodels.plan import hlo, topology
from effmodels.plan.compiled.collectives import collectives
from pallas_kernels.target import Target
from tests.contract.cases import D_MODEL, draw, fill, jit, loss_and_grads, make_channel, packed_batch
from tests.numerics import assert_trees_close

B, T, D, F, E = 8, 4, 4, 6, 8


def routings(k, seed=0):
    """{name: int32 [B, T, k]} with E for "not routed"; the k experts of a token differ."""
    rng = np.random.default_rng(seed)
    uneven = np.argsort(rng.normal(size=(B, T, E)) + 0.8 * np.arange(E), axis=-1)[..., :k]
    padding = np.arange(T) >= 1 + np.arange(B)[:, None] % T
    return {
        "uneven": uneven,
        "all to one expert": np.broadcast_to(np.roll(np.arange(E), -5)[:k], (B, T, k)),
        "no token to some, padding": np.where(padding[..., None], E, uneven),
        "nothing routed": np.full((B, T, k), E),
    }


def parameters():
    return draw(B, T, D), draw(E, D, F, seed=2), draw(E, D, F, seed=3), draw(E, F, D, seed=4)


@functools.cache
def make_step(k, **fields):
    """jitted (ids, x, weights, w_in, w_up, w_out) -> (gradients of all five, (y, overflow))."""

    def loss(ids, x, weights, w_in, w_up, w_out):
        y, overflow = expert.expert_ffn(
            x, ids, weights, (w_in, w_up), w_out, lambda a, b: jnp.tanh(a) * b, implementation="reference", return_overflow=True, **fields
        )
        return jnp.sum(y * draw(B, T, D, seed=8)), (y, overflow)

    return jit(jax.grad(loss, argnums=(1, 2, 3, 4, 5), has_aux=True))


@functools.cache
def wanted(k):
    """What one device computes, by name of routing."""
    step, (x, *w) = make_step(k), parameters()
    return {name: jax.tree.map(np.asarray, step(ids.astype(np.int32), x, draw(B, T, k, seed=1), *w)) for name, ids in routings(k).items()}


def ragged_by_gathers(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """`jax.lax.ragged_all_to_all` as its documentation says, from all-gathers: XLA has none for CPUs."""
    rows, starts, sizes, places = (jax.lax.all_gather(a, axis_name) for a in (operand, input_offsets, send_sizes, output_offsets))
    me, at = jax.lax.axis_index(axis_name), jnp.arange(output.shape[0])
    for source in range(rows.shape[0]):
        here = at - places[source, me]
        inside = (here >= 0) & (here < sizes[source, me])
        got = rows[source][jnp.clip(starts[source, me] + here, 0, rows.shape[1] - 1)]
        inside = inside.reshape(-1, *[1] * (got.ndim - 1))
        output = jnp.where(inside, jnp.where(sizes[source, me] == recv_sizes[source], got, jnp.nan), output)
    return output


@pytest.fixture
def ragged(monkeypatch):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_by_gathers)
    monkeypatch.setattr(exchange, "unwritten", lambda shape, dtype, after: jnp.full(shape, jnp.nan, dtype))  # as bad as memory can be
    monkeypatch.setattr(expert, "target", lambda: Target("tpu", "TPU v4"))


MESHES = {
    "expert 2": ({"expert": 2}, 2, {}),
    "expert 4": ({"expert": 4}, 1, {}),
    "expert 8": ({"expert": 8}, 4, {}),
    "data, tensor": ({"expert": 2, "data": 2, "tensor": 2}, 2, {}),
    "fsdp, seq": ({"expert": 2, "data": 1, "fsdp": 2, "seq": 2}, 2, {}),
    "experts over two axes": ({"expert": 2, "fsdp": 2}, 2, {"expert": ("expert", "fsdp"), "embed": None}),
    "tokens whole on the expert axis": ({"expert": 2, "data": 4}, 2, {"batch": "data"}),
    # A token has several of its experts on a shard, and travels there once.
    "4 choices on 2 shards": ({"expert": 2}, 4, {}),
    "5 choices on 4 shards": ({"expert": 4}, 5, {}),
    "3 choices on 2 shards, data, tensor": ({"expert": 2, "data": 2, "tensor": 2}, 3, {}),
}


def check(sizes, k, rules, form):
    step, (x, *w), want = make_step(k), parameters(), wanted(k)  # here: inside, the mesh would be in force for both
    with axes.use(mesh.make_mesh(sizes), rules, Options(experts=form)):
        for name, ids in routings(k).items():
            got = step(ids.astype(np.int32), x, draw(B, T, k, seed=1), *w)
            assert_trees_close({name: got}, {name: want[name]}, rel=1e-11)


@pytest.mark.parametrize("case", MESHES)
def test_padded_under_a_mesh_as_on_one_device(case, x64):
    check(*MESHES[case], "padded")


@pytest.mark.parametrize("case", ["fsdp, seq", "expert 8", "4 choices on 2 shards", "5 choices on 4 shards"])
def test_ragged_under_a_mesh_as_on_one_device(case, x64, ragged):
    check(*MESHES[case], "ragged")


def test_gathered_weights_under_a_mesh_as_on_one_device(x64):
    check(*MESHES["data, tensor"], "gather")


def biased(fast, x, weights, ids, w_in, w_up, w_out, *biases):
    """(sum of y times a probe, y) of experts with biases; slow: every expert on every token, weighted by who was chosen."""

    def inner(a, b):
        return jnp.tanh(a) * (b + 1)

    if fast:
        y = expert.expert_ffn(x, ids, weights, (w_in, w_up), w_out, inner, biases=biases, implementation="reference")
    else:
        y = 0.0
        for e in range(E):
            own_in, own_up, own_out = (b[e] for b in biases)
            y_e = inner(x @ w_in[e] + own_in, x @ w_up[e] + own_up) @ w_out[e] + own_out
            y = y + jnp.sum(jnp.where(ids == e, weights, 0.0), axis=-1, keepdims=True) * y_e
    return jnp.sum(y * draw(B, T, D, seed=8)), y


BIASED = functools.partial(jit, static_argnums=0)(jax.value_and_grad(biased, argnums=(1, 2, 4, 5, 6, 7, 8, 9), has_aux=True))


@pytest.mark.parametrize("case, form", [(None, None), ("data, tensor", "padded"), ("data, tensor", "gather"), ("fsdp, seq", "padded"),
                                        ("experts over two axes", "padded"), ("expert 8", "ragged")])  # fmt: skip
def test_biases_of_experts_as_of_every_expert_on_every_token(case, form, x64, request):
    """Each row gets those of its own expert, once over the columns of a tensor axis, and rows of no expert get none."""
    if form == "ragged":
        request.getfixturevalue("ragged")
    sizes, k, rules = MESHES[case] if case else (None, 2, None)
    x, *w = parameters()
    biases = draw(E, F, seed=5), draw(E, F, seed=6), draw(E, D, seed=7)
    for name, ids in routings(k).items():
        arrays = x, draw(B, T, k, seed=1), ids.astype(np.int32), *w, *biases
        want = BIASED(False, *arrays)
        with contextlib.ExitStack() as stack:
            if case:
                stack.enter_context(axes.use(mesh.make_mesh(sizes), rules, Options(experts=form)))
            assert_trees_close({name: BIASED(True, *arrays)}, {name: want}, rel=1e-11)


@pytest.mark.parametrize("form", ["padded", "ragged"])
def test_rows_past_the_bound_become_nan_and_are_counted(form, x64, ragged):
    """4 expert shards of 4 tokens each, k = 1: twice the mean is 2 rows per pair, 8 per receiver. One token more for one shard is lost."""
    fits = np.array([[0, 1, 2, 3]] * 8)[..., None]
    too_many = fits.copy()
    too_many[2, 2] = 1
    arrays = parameters()[0], draw(B, T, 1, seed=1), *parameters()[1:]
    want_fits, want_too_many = (make_step(1)(ids, *arrays) for ids in (fits, too_many))
    with axes.use(mesh.make_mesh({"expert": 4}), None, Options(experts=form, recv_bound=2.0)):
        assert_trees_close(make_step(1)(fits, *arrays), want_fits, rel=1e-11)
        _, (y, overflow) = make_step(1)(too_many, *arrays)
        text = make_step(1, exact=True).lower(too_many, *arrays).as_text()
    bad = np.isnan(np.asarray(y))
    lost = bad.all(-1)
    assert float(overflow) == 1.0 and lost.sum() == 1 and too_many[lost][0] < 2, "one choice of the first shard's experts finds no room"
    assert np.array_equal(bad.any(-1), lost)
    assert_trees_close(np.asarray(y)[~lost], np.asarray(want_too_many[1][0])[~lost], rel=1e-11)
    assert (f"tensor<4x4x{D}xf64>" if form == "padded" else f"tensor<16x{D}xf64>") in text, "decoding has room for the worst case"


def test_capacity_makes_the_buffers_smaller_and_still_has_room_for_all(x64):
    """Every expert asked for exactly `capacity` tokens of every row; the exchanged buffers have rows x experts x capacity slots."""
    ids = np.full((B, T, 2), E)
    ids[:, :2] = [0, 1]  # capacity 2: both experts of shard 0 are full, in every row
    arrays = parameters()[0], draw(B, T, 2, seed=1), *parameters()[1:]
    want = make_step(2)(ids, *arrays)
    with axes.use(mesh.make_mesh({"expert": 4}), None, Options(experts="padded")):
        step = make_step(2, capacity=2)
        got = step(ids, *arrays)
        text = step.lower(ids, *arrays).as_text()
    assert_trees_close(got, want, rel=1e-11)
    assert f"tensor<4x4x{D}xf64>" in text and f"tensor<4x8x{D}xf64>" not in text, "4 pairs x (1 row x 2 experts x capacity 2), not x 8"


def test_ragged_on_a_cpu_says_so():
    with axes.use(mesh.make_mesh({"expert": 4}), None, Options(experts="ragged")):
        with pytest.raises(ConfigError, match="parallel.experts='ragged': XLA has no ragged all-to-all on CPUs. Use 'padded'"):
            make_step(1).lower(np.zeros((B, T, 1), np.int32), parameters()[0], draw(B, T, 1), *parameters()[1:])


def test_experts_that_do_not_divide_say_so():
    x, w_in, _, w_out = (a[:6] if a.shape[0] == E else a for a in parameters())
    with axes.use(mesh.make_mesh({"expert": 4})), pytest.raises(ConfigError, match=r"experts .*: expert=6 cannot be split over 4 devices"):
        expert.expert_ffn(draw(B, T, D), np.zeros((B, T, 1), np.int32), draw(B, T, 1), (w_in,), w_out, jnp.tanh)


@pytest.mark.parametrize("platform, form", [("cpu", "padded"), ("tpu", "ragged"), ("gpu", "ragged")])
def test_auto_takes_what_the_platform_has(platform, form, monkeypatch):
    monkeypatch.setattr(expert, "target", lambda: Target(platform, ""))
    with axes.use(mesh.make_mesh({"expert": 4})):
        assert expert._way(("expert",), (B, T, D), 2, E, None, False, (1, 1)).form == form


MOE = {"num_experts": 4, "top_k": 2, "hidden": 6, "capacity_factor": 0.9, "balance": "batch", "z_coef": 0.1, "shared_experts": 1}


def test_a_layer_over_expert_fsdp_and_a_zigzag_sequence(x64):
    """Capacity by the order of the row, balance over the whole batch, padding, shared experts."""
    graphdef, params, buffers = make_channel("moe", MOE, implementation="reference")
    length = 8
    segments = (np.arange(length) < 5 + np.arange(4)[:, None]).astype(np.int32)
    x, probe = draw(4, length, D_MODEL), draw(4, length, D_MODEL, seed=2) * (segments > 0)[..., None]

    @functools.partial(jit, static_argnums=0)
    def step(layout, params, x, probe, segments):
        def loss(params, x):
            y, aux = model_state.merge(graphdef, params, buffers)(x, Ctx(segment_ids_BT=segments, layout=layout))
            return jnp.sum(y * probe) + sum(aux.losses.values()), aux

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    (want, want_dx), want_aux = step("contiguous", params, x, probe, segments)
    assert float(want_aux.metrics["moe_drop_fraction"]) > 0
    with axes.use(mesh.make_mesh({"expert": 2, "fsdp": 2, "seq": 2}), None, Options(layout="zigzag")):
        (got, dx), aux = step("zigzag", params, *(layouts.to_layout(a, "zigzag", 2) for a in (x, probe, segments)))
    assert_trees_close((got, aux), (want, want_aux), rel=1e-11)
    assert_trees_close(layouts.from_layout(dx, "zigzag", 2), want_dx, rel=1e-11)


@pytest.mark.slow(always=True)
def test_a_decoder_with_experts_scanned_and_rematerialised(x64):
    """Loss and every gradient on an expert x tensor mesh; too small a bound: a loss that is not finite, and the metric that says why."""
    config = ModelConfig(
        vocab_size=24, d_model=8, num_layers=2, channel=("moe",), mixers={"attention": {"num_heads": 2}}, remat="full",
        channels={"moe": {**MOE, "capacity_factor": None, "bias_update_rate": 1e-3}},
        param_dtype="float64", compute_dtype="float64", implementation="reference",
    )  # fmt: skip
    graphdef, params, buffers = fill(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    batch, step = packed_batch(4, 8, config.vocab_size), jit(loss_and_grads(graphdef))
    want = step(params, buffers, batch)
    made = mesh.make_mesh({"expert": 4, "tensor": 2})
    with axes.use(made):
        assert_trees_close(step(params, buffers, batch), want, rel=1e-11)
    with axes.use(made, None, Options(recv_bound=0.5)):
        out = jit(lambda params: model_state.merge(graphdef, params, buffers).loss(batch))(params)
    assert not np.isfinite(out.total_sum) and np.all(np.asarray(out.aux.metrics["moe_overflow"]) > 0)


@pytest.mark.parametrize("form", ["padded", "gather"])
def test_tokens_travel_and_weights_do_not(form):
    """Compiled for a CPU: all-to-alls over the expert axis and no all-gather over it; "gather" shows that the test would see one."""
    arrays = [a.astype(np.float32) for a in (parameters()[0], draw(B, T, 2, seed=1), *parameters()[1:])]
    made, ids = mesh.make_mesh({"expert": 4, "fsdp": 2}), np.zeros((B, T, 2), np.int32)
    dims = [("batch", "seq", None)] * 3 + [("expert", "embed", "expert_mlp")] * 2 + [("expert", "expert_mlp", "embed")]
    with axes.use(made, None, Options(experts=form)):
        placed = [jax.device_put(a, NamedSharding(made, axes.spec(d, mesh=made))) for a, d in zip((ids, *arrays), dims)]
        found = collectives(make_step(2).lower(*placed).compile(), made)
    gathered = [c for c in found if c.kind == "all-gather" and "expert" in c.axes]
    moved = [c for c in found if c.kind == "all-to-all" and c.axes == ("expert",)]
    assert any(c.kind == "all-gather" and c.axes == ("fsdp",) for c in found), "weights are stored split over fsdp"
    assert bool(gathered) == (form == "gather") and bool(moved) == (form == "padded")
    # A gradient of the experts summed over the expert axis, too, would be n times what it should be.
    reduced = [c for c in found if c.kind in ("all-reduce", "reduce-scatter") and "expert" in c.axes]
    assert bool(reduced) == (form == "gather")


def test_under_the_stages_of_a_pipeline(x64):
    """Two stages side by side, each with its own experts, over stage x data x expert: as one after the other on one device."""
    x, w_in, w_up, w_out = (np.stack([a, a[::-1]]) for a in parameters())
    ids, weights = np.stack([routings(2)["uneven"], routings(2)["no token to some, padding"]]), draw(2, B, T, 2, seed=1)
    probe = draw(2, B, T, D, seed=8)

    def loss(split, x, weights, w_in, w_up, w_out):
        def one(x, ids, weights, w_in, w_up, w_out):
            return expert.expert_ffn(x, ids, weights, (w_in, w_up), w_out, lambda a, b: jnp.tanh(a) * b, implementation="reference")

        arrays = (x, ids, weights, w_in, w_up, w_out)
        run = jax.vmap(one, spmd_axis_name="stage") if split else lambda *a: jnp.stack([one(*(x[i] for x in a)) for i in range(2)])
        return jnp.sum(run(*arrays) * probe)

    step = functools.partial(jit, static_argnums=0)(jax.value_and_grad(loss, argnums=(1, 2, 3, 4, 5)))
    want = step(False, x, weights, w_in, w_up, w_out)
    with axes.use(mesh.make_mesh({"stage": 2, "expert": 2, "data": 2})):
        assert_trees_close(step(True, x, weights, w_in, w_up, w_out), want, rel=1e-11)


@pytest.mark.aot
@pytest.mark.parametrize("form", ["padded", "ragged"])
def test_bytes_of_a_program_compiled_for_v4(form):
    """A layer in a scanned, rematerialised program: forward there and back; backward once more there, and both ways for the gradients.

    The weights of the choices go there twice, too, and their gradient comes back.

    Of n x rows x D values that each exchange moves, 1 / n stay on their shard.
    """
    n, k, length, D, F, layers = 4, 2, 256, 512, 512, 3
    made = topology.mesh("v4", fsdp=2, expert=n)

    def loss(x, weights, w_in, w_out, ids):
        def layer(x, w):
            return x + expert.expert_ffn(x, ids, weights, w[:1], w[1], jax.nn.gelu), None

        return jax.lax.scan(jax.checkpoint(layer), x, (w_in, w_out))[0].astype(jnp.float32).sum()

    shapes = (8, length, D), (8, length, k), (layers, E, D, F), (layers, E, F, D), (8, length, k)
    dtypes = jnp.bfloat16, jnp.float32, jnp.float32, jnp.float32, jnp.int32
    rows, w_in = ("batch", "seq", None), (None, "expert", "embed", "expert_mlp")
    dims = rows, rows, w_in, (None, "expert", "expert_mlp", "embed"), rows
    with axes.use(made, None, Options(experts=form)):
        arrays = [
            jax.ShapeDtypeStruct(s, t, sharding=NamedSharding(made, axes.spec(d, mesh=made))) for s, t, d in zip(shapes, dtypes, dims)
        ]
        compiled = jax.jit(jax.grad(loss, (0, 1, 2, 3))).lower(*arrays).compile()
    assert compiled.as_text().count("tpu_custom_call") >= 6
    found = collectives(compiled, made)
    over_experts = [c for c in found if "expert" in c.axes]
    kind = "all-to-all" if form == "padded" else "ragged-all-to-all"
    assert {c.kind for c in over_experts} == {"all-to-all", kind}, "an all-gather, or a sum of the experts' gradients"
    room, counts = n * exchange.pair_rows(1, length, k, E, n), n * E * 4
    travelled = [c for c in over_experts if c.size != counts]
    assert len(over_experts) == len(travelled) + 2 and all(c.group == n for c in travelled)
    # Of a ragged exchange the program shows the buffers; what travels are the rows that exist, length x k of every shard.
    rows = {room} if form == "padded" else {room, length * k}
    data, weights = ([c for c in travelled if c.size in {r * row for r in rows}] for row in (D * 2, travel.LANES * 4))
    assert (len(data), len(weights), len(travelled)) == (5, 3, 8)
    assert all(c.times == layers for c in data)  # the weights are those of every layer here, and may travel once


@pytest.mark.aot
@pytest.mark.parametrize("form", ["padded", "ragged"])
def test_shared_experts_are_computed_while_rows_travel(form):
    """Compiled for v4 with the two options that make exchanges asynchronous there: matmuls of the shared experts between start and done.

    An exchange must be open over at least two: one matmul more or less is the scheduler's business.
    """
    made, D = topology.mesh("v4", expert=4), 1024
    env = Env(d_model=D, param_dtype="bfloat16")
    config = MoE.Config(num_experts=8, top_k=2, hidden=512, shared_experts=4)
    graph, state = nnx.split(nnx.eval_shape(lambda: MoE(config, env, rngs=nnx.Rngs(0))))

    def placed(variable):
        value, info = variable.get_value(), variable.get_metadata()["info"]
        sharding = axes.parameter_sharding(value.shape, info, mesh=made)
        return variable.replace(jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding))

    def loss(state, x):
        return nnx.merge(graph, state)(x, Ctx())[0].astype(jnp.float32).sum()

    with axes.use(made, None, Options(experts=form)):
        state = jax.tree.map(placed, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
        x = jax.ShapeDtypeStruct((8, 512, D), jnp.bfloat16, sharding=NamedSharding(made, axes.spec(("batch", "seq", None), mesh=made)))
        flags = {"xla_tpu_enable_async_all_to_all": "true", "xla_tpu_enable_async_ragged_all_to_all": "true"}
        text = jax.jit(jax.grad(loss, (0, 1))).lower(state, x).compile(compiler_options=flags).as_text()
    module, most = hlo.parse(text), 0
    with_matmul = {name for name, body in module.computations.items() if any(i.opcode == "convolution" for i in body)}
    for body in module.computations.values():
        for at, start in enumerate(body):
            if start.opcode.endswith("all-to-all-start"):
                done = next(j for j in range(at, len(body)) if start.name in body[j].operands and body[j].opcode.endswith("-done"))
                most = max(most, sum(i.opcode == "fusion" and hlo.called(i, "calls") in with_matmul for i in body[at:done]))
    assert most >= 2

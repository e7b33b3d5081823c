"""Tokens that travel once to each shard with experts of theirs: which copies are made, that nothing is lost without a word, and the sums.

Under meshes, with every gradient: tests/parallel/test_expert.py.
Letters: N tokens, k choices, E experts, n shards, C copies of a token, Q rows that arrived, R rows of experts.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from effmodels.parallel import axes, exchange, expert, mesh, travel
from effmodels.parallel.options import Options
from effmodels.plan import hlo, topology
from tests.contract.cases import draw, jit
from tests.numerics import assert_close, assert_trees_close


@pytest.mark.parametrize("total, rows", [(1, 3), (37, 90), *(pytest.param(*c, marks=pytest.mark.slow) for c in ((128, 300), (257, 1)))])
def test_fold_and_expand_as_segment_sums_and_indexing(total, rows, x64):
    """Values and gradients; rows of no copy (number `total`) hold nan, copies without rows are 0."""
    rng = np.random.default_rng(total)
    copy_R = rng.integers(0, total + 1, rows).astype(np.int32)
    used = copy_R < total
    x, y = rng.normal(size=(total, 5)), np.where(used[:, None], rng.normal(size=(rows, 5)), np.nan)

    def summed(y):
        return jax.ops.segment_sum(jnp.where(used[:, None], y, 0), copy_R, total)

    for name, form, plain, a in (
        ("fold", lambda y: travel.fold(total, None, y, copy_R), summed, y),
        ("expand", lambda x: travel.expand(total, None, x, copy_R)[used], lambda x: x[copy_R[used]], x),
    ):
        (got, pull), (want, pull_plain) = jax.vjp(form, a), jax.vjp(plain, a)
        cotangent = rng.normal(size=want.shape)
        assert_close(name, got, want, rel=1e-14)
        got, want = (np.where(used[:, None], g(cotangent)[0], 0) if name == "fold" else g(cotangent)[0] for g in (pull, pull_plain))
        assert_close(f"gradient of {name}", got, want, rel=1e-14)


@pytest.mark.parametrize(
    "k, E, n, groups, copies",
    [
        (8, 256, 8, (8, 4), 4),  # Ring-flash-linear-2.0: a group is a shard
        (8, 256, 64, (8, 4), 8),  # each group on 8 shards
        (8, 256, 4, (8, 4), 4),  # two groups on a shard
        (8, 256, 4, (8, 2), 2),
        (8, 64, 2, (1, 1), 2),
        (2, 16, 16, (1, 1), 2),
        (8, 24, 8, (3, 1), 8),  # groups of 8 experts, shards of 3: a group may touch any
    ],
)
def test_no_token_needs_more_copies_than_there_are(k, E, n, groups, copies):
    assert exchange.copies(k, n, *groups) == copies
    rng, most = np.random.default_rng(0), 0
    for _ in range(300):
        group = rng.permutation(groups[0])[: groups[1]]
        chosen = rng.permutation((group[:, None] * (E // groups[0]) + np.arange(E // groups[0])).reshape(-1))[:k]
        most = max(most, len(set(chosen // (E // n))))
    assert most <= copies


@pytest.mark.parametrize(
    "arguments, rows",
    [((2, 8, 2, 8, 4), 16), ((2, 8, 2, 8, 4, 3), 12), ((2, 8, 2, 8, 4, None, 1.25), 10), ((1, 7, 1, 8, 4, None, 1.0), 2)],
)
def test_room_per_pair(arguments, rows):
    """Every token once, at most; 2 experts of capacity 3 take 6 of a row's 8; of 2 x 8 tokens and 2 copies 4 pairs have 8 each."""
    names = ("batch", "time", "copies", "num_experts", "shards", "capacity", "recv_bound")
    assert exchange.pair_copies(**dict(zip(names, arguments))) == rows


def test_one_copy_for_each_shard_of_a_token():
    k, N, e, n = 4, 50, 2, 3
    ids = np.stack([np.random.default_rng(i).permutation(n * e)[:k] for i in range(N)], axis=1)
    ids[:, ::7], ids[2, 3] = n * e, n * e  # not routed: whole tokens, and one choice
    once = jax.tree.map(np.asarray, travel._once(jnp.asarray(ids), e, n, 3))
    to_CN = once.to_CN.reshape(3, N)
    for t in range(N):
        shards = [s for s in to_CN[:, t] if s < n]
        assert sorted(shards) == sorted({i // e for i in ids[:, t] if i < n * e}), "a shard without its copy, or with two"
        assert all(to_CN[once.copy_kN[j, t], t] == ids[j, t] // e for j in range(k) if ids[j, t] < n * e)
    assert np.array_equal(once.counts_n, [np.sum(to_CN == s) for s in range(n)])
    numbers = once.of_choices(jnp.arange(3 * N))
    assert np.array_equal(numbers.reshape(k, N)[:, 1], once.copy_kN[:, 1] * N + 1)


B, T, D, F, E = 8, 4, 4, 6, 8


def run(ids, *, groups=(1, 1), bound=None, shards=4, dtype="float64"):
    """(y, overflow) over that many shards, and y of one device; dtype: of the weights of choices."""
    x, w_in, w_out = draw(*ids.shape[:2], D), draw(E, D, F, seed=2), draw(E, F, D, seed=4)
    weights = jnp.asarray(draw(*ids.shape, seed=1), dtype)

    @functools.partial(jit, static_argnums=0)
    def step(split, x, weights, w_in, w_out):
        return expert.expert_ffn(
            x, ids, weights, (w_in,), w_out, jnp.tanh, groups=groups, return_overflow=True, implementation="reference"
        )

    want = step(False, x, weights, w_in, w_out)[0]
    with axes.use(mesh.make_mesh({"expert": shards}), None, Options(recv_bound=bound)):
        return *step(True, x, weights, w_in, w_out), want


def in_groups(rng, groups, top, k):
    size = E // groups
    one = lambda: rng.permutation((rng.permutation(groups)[:top, None] * size + np.arange(size)).reshape(-1))[:k]  # noqa: E731
    return np.stack([one() for _ in range(B * T)]).reshape(B, T, k).astype(np.int32)


def test_fewer_copies_where_choices_keep_to_groups(x64):
    """4 choices in 2 of 4 groups on 4 shards: two copies; ids that break the promise are found out, and only their tokens are lost."""
    ids = in_groups(np.random.default_rng(0), 4, 2, 4)
    assert exchange.copies(4, 4, 4, 2) == 2
    y, overflow, want = run(ids, groups=(4, 2), bound=9.0)
    assert_trees_close(y, want, rel=1e-11)
    assert float(overflow) == 0
    ids[1, 2] = [0, 2, 4, 6]
    y, overflow, want = run(ids, groups=(4, 2), bound=9.0)
    lost = np.isnan(np.asarray(y)).all(-1)
    assert lost.sum() == 1 and lost[1, 2] and float(overflow) == 2, "of the four choices the two on the first two shards find room"
    assert_trees_close(np.asarray(y)[~lost], np.asarray(want)[~lost], rel=1e-11)


def test_copies_past_the_bound_become_nan_and_are_counted(x64):
    """Two shards of 4 tokens, one choice each on shard 0: room for 5 of 4 choices per pair, but for 3 of 4 copies."""
    ids = np.broadcast_to(np.array([1, E, E], np.int32), (B, T, 3)).copy()
    assert exchange.pair_copies(1, T, 2, E, 2, recv_bound=0.75) == 3 and exchange.pair_rows(1, T, 3, E, 2, recv_bound=0.75) == 5
    y, overflow, want = run(ids, bound=0.75, shards=2)
    lost = np.isnan(np.asarray(y))
    assert np.array_equal(lost.any(-1), lost.all(-1)) and np.array_equal(lost.all(-1).sum(-1), [1] * B) and float(overflow) == B
    assert_trees_close(np.asarray(y)[~lost.any(-1)], np.asarray(want)[~lost.any(-1)], rel=1e-11)


def test_numbers_of_rows_are_exact_beside_rounded_weights(x64):
    """320 rows arrive, and bfloat16, the dtype of the weights here, holds whole numbers up to 256."""
    ids = np.argsort(np.random.default_rng(0).normal(size=(8, 160, E)), axis=-1)[..., :3].astype(np.int32)
    assert 2 * exchange.pair_copies(1, 160, 2, E, 2) == 320
    y, _, want = run(ids, shards=2, dtype="bfloat16")
    assert_trees_close(y, want, rel=1e-11)


@pytest.mark.parametrize("shards", [2, 4])
def test_what_arrived_is_kept_where_asked(shards, x64):
    """train.remat=save:dispatch: the backward pass repeats the exchange of counts alone; 4 shards: every choice travels by itself."""
    ids = np.zeros((B, T, 3), np.int32) + np.arange(3, dtype=np.int32) * 2
    x, weights, w_in, w_out = draw(B, T, D), draw(B, T, 3, seed=1), draw(E, D, F, seed=2), draw(E, F, D, seed=4)

    def exchanges(*names):
        policy = jax.checkpoint_policies.save_only_these_names(*names)

        @functools.partial(jax.checkpoint, policy=policy)
        def layer(x, weights, w_in, w_out):
            return expert.expert_ffn(x, ids, weights, (w_in,), w_out, jnp.tanh, implementation="reference")

        f = jax.grad(lambda *a: jnp.sum(layer(*a) ** 2), argnums=(0, 1, 2, 3))
        return str(jax.make_jaxpr(f)(x, weights, w_in, w_out)).count("all_to_all[")

    with axes.use(mesh.make_mesh({"expert": shards})):
        # Forward: counts, weights, rows, and back; backward: counts, those three the other way; without names weights and rows once more.
        assert (exchanges("dispatch"), exchanges()) == (8, 10)


@pytest.mark.aot
def test_receive_buffers_are_neither_filled_nor_copied():
    """A scanned, rematerialised layer for v4: arrays of rows that arrive come from the exchange alone, forward and backward."""
    n, k, length, D, F, layers = 2, 4, 256, 512, 256, 3
    made = topology.mesh("v4", expert=n, fsdp=4)

    def loss(x, weights, w_in, w_out, ids):
        def layer(x, w):
            return x + expert.expert_ffn(x, ids, weights, w[:1], w[1], jax.nn.gelu), None

        return jax.lax.scan(jax.checkpoint(layer), x, (w_in, w_out))[0].astype(jnp.float32).sum()

    rows, bfloat16 = ("batch", "seq", None), jnp.bfloat16
    arrays = (
        ((8, length, D), bfloat16, rows), ((8, length, k), jnp.float32, rows), ((layers, E, D, F), bfloat16, (None, "expert", None, None)),
        ((layers, E, F, D), bfloat16, (None, "expert", None, None)), ((8, length, k), jnp.int32, rows),
    )  # fmt: skip
    with axes.use(made, None, Options(recv_bound=1.5)):
        shapes = [jax.ShapeDtypeStruct(s, t, sharding=NamedSharding(made, axes.spec(d, mesh=made))) for s, t, d in arrays]
        text = jax.jit(jax.grad(loss, (0, 1, 2, 3))).lower(*shapes).compile().as_text()
    exchanges = 0
    for body in hlo.parse(text).computations.values():
        made_by = {i.name: i for i in body}
        for i in body:
            if i.opcode.removesuffix("-start") == "ragged-all-to-all":
                exchanges, buffer = exchanges + 1, i.operands[1]
                while made_by[buffer].opcode == "bitcast":
                    (buffer,) = made_by[buffer].operands
                assert buffer.startswith("unwritten"), f"{buffer} is a copy, or filled"
    assert exchanges == 8, "rows there and back, and weights there; the two there again; and all three the other way"

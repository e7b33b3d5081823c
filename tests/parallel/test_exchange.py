"""Rows that travel between shards: offsets and orders of all ranks simulated in numpy, and the room that buffers have.

Letters: n shards, M choices of one shard, E experts, e experts of one shard.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effmodels.parallel import exchange
from tests.contract.cases import jit
from tests.numerics import assert_close


@pytest.mark.parametrize(
    "arguments, rows",
    [
        ((2, 8, 2, 8, 4), 32),  # every choice of every token may go to one shard
        ((2, 8, 4, 8, 4), 32),  # 2 experts there, so 2 of a token's 4 choices at most
        ((2, 8, 2, 8, 4, 3), 12),  # 2 rows x 2 experts x capacity 3
        ((2, 8, 2, 8, 4, 9), 32),  # a capacity of more tokens than the shard has of a row
        ((2, 8, 2, 8, 4, None, 1.25), 10),
        ((2, 8, 2, 8, 4, None, 1.3), 11),  # rounded up
        ((2, 8, 2, 8, 4, None, 99.0), 32),
        ((2, 8, 2, 8, 4, 3, 1.25), 10),
    ],
)
def test_room_per_pair(arguments, rows):
    names = ("batch", "time", "k", "num_experts", "shards", "capacity", "recv_bound")
    given = dict(zip(names, arguments))
    assert exchange.pair_rows(**given) == rows


def simulate(form, rows, sends):
    """What every receiver holds and what comes back to every sender, as labels; sends: per rank (choice_S, slot_M, there, back)."""
    n = len(sends)
    label = [np.where(choice >= 0, s * 1000 + choice, -1) for s, (choice, *_) in enumerate(sends)]
    if form == "padded":
        def swap(buffers):
            return [np.concatenate([b.reshape(n, rows)[d] for b in buffers]) for d in range(n)]

        received = swap(label)
        return received, swap(received)

    def move(buffers, offsets, size):
        out = [np.full(size, -1) for _ in range(n)]
        for s, (starts, sizes, places, _) in enumerate(offsets):
            for d in range(n):
                assert sizes[d] == offsets[d][3][s], "sender and receiver disagree"
                start, place = starts[d], places[d]
                assert 0 <= start and start + sizes[d] <= len(buffers[s]) and 0 <= place and place + sizes[d] <= size
                assert np.all(out[d][place : place + sizes[d]] == -1), "two senders write the same row"
                out[d][place : place + sizes[d]] = buffers[s][start : start + sizes[d]]
        return out

    received = move(label, [there for _, _, there, _ in sends], n * rows)
    return received, move(received, [back for *_, back in sends], len(label[0]))


@pytest.mark.parametrize("form", ["padded", "ragged"])
@pytest.mark.parametrize("n", [1, 3, 8, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 5))])
def test_offsets_bring_every_row_to_its_expert_and_back(form, n):
    """All ranks simulated in numpy, for random counts, idle experts, full skew, unrouted choices, with room for all and without."""
    M, e, rng = 12, 2, np.random.default_rng(n)

    @functools.partial(jit, static_argnums=0)
    def plans(rows, ids_nM):
        counts_nE = jax.vmap(lambda ids: jnp.bincount(ids, length=n * e))(ids_nM).astype(jnp.int32)

        def one(me, ids_M):
            path = exchange.Exchange(form, rows, counts_nE, me)
            order = jnp.argsort(ids_M, stable=True)
            blocks = path.received()
            return (*path.send_order(ids_M, order, jnp.argsort(order)), *path.offsets()), blocks, exchange.regroup(blocks, path.total)

        return jax.vmap(one)(jnp.arange(n), ids_nM)

    overflows = 0
    for rows in (M, 3):
        for draw_number in range(25):
            skew = rng.dirichlet(np.full(n * e + 1, rng.choice([0.05, 1.0])), size=n)
            ids = np.stack([rng.choice(n * e + 1, size=M, p=p) for p in skew]).astype(np.int32)
            if draw_number == 0:
                ids[:] = n * e - 1
            sends, blocks, orders = jax.tree.map(np.asarray, plans(rows, ids))
            sends = [jax.tree.map(lambda a, r=r: a[r], sends) for r in range(n)]
            received, returned = simulate(form, rows, sends)
            wanted = np.array([[np.sum(ids[s] // e == d) for d in range(n)] for s in range(n)])
            lost = np.maximum(wanted - rows, 0).sum() if form == "padded" else np.maximum(wanted.sum(0) - n * rows, 0).sum()
            overflows += lost > 0
            assert lost == 0 or rows < M
            arrived = 0
            for d in range(n):
                index, inverse = orders[0][d], orders[1][d]
                assert np.array_equal(np.sort(index), np.arange(n * rows)) and np.array_equal(index[inverse], np.arange(n * rows))
                by_expert = received[d][index]
                sizes = blocks[d][:, :-1].sum(0)
                for x, end in enumerate(np.cumsum(sizes)):
                    group = by_expert[end - sizes[x] : end]
                    assert np.all(ids[group // 1000, group % 1000] == d * e + x) and np.all(np.diff(group) > 0)
                assert np.all(by_expert[sizes.sum() :] == -1), "an empty row is used, or a row is not"
                arrived += sizes.sum()
            assert arrived == (ids < n * e).sum() - lost
            for s, (_, slot, *_) in enumerate(sends):
                back = np.where(slot >= 0, returned[s][slot], -1)
                assert np.array_equal(back[slot >= 0], s * 1000 + np.arange(M)[slot >= 0]), "a row comes back to another choice"
                assert not np.any((ids[s] == n * e) & (slot >= 0)), "a choice that is not routed has a slot"
    assert overflows > 3, "no draw tests the bound"


@pytest.mark.parametrize("k", [1, 2, 3])
def test_rows_spread_to_choices_and_summed_back_as_plain_indexing(k, x64):
    """Values and gradients of both directions, and of single numbers put in order by a sort; N and M = k N odd."""
    rng, N, D = np.random.default_rng(k), 7, 3
    order = rng.permutation(k * N)
    rank, whole = np.argsort(order), (False, False)
    x, y, w = rng.normal(size=(N, D)), rng.normal(size=(k * N, D)), rng.normal(size=k * N)
    forms = {
        "take": (lambda a: exchange.take_rows(k, whole, a, order, rank), lambda a: jnp.tile(a, (k, 1))[order], x),
        "sum": (lambda a: exchange.sum_rows(k, whole, a, rank, order), lambda a: sum(a[rank][j * N : (j + 1) * N] for j in range(k)), y),
        "permuted": (lambda a: exchange.permuted(a, order, rank), lambda a: a[order], w),
    }
    for name, (form, plain, a) in forms.items():
        (got, pull), (want, pull_plain) = jax.vjp(form, a), jax.vjp(plain, a)
        cotangent = rng.normal(size=want.shape)
        assert_close(name, got, want, rel=1e-14)
        assert_close(f"gradient of {name}", pull(cotangent)[0], pull_plain(cotangent)[0], rel=1e-14)

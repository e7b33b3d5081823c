"""Near ties of expert scores: tokens that rounding may send elsewhere replay one choice on all sides; no other token does."""
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effmodels.channel import routers
from effmodels.parallel import axes
from effmodels.verify import mesh_check, ties
from effmodels.verify.case import Case
from effmodels.verify.run import run_check
from tests.verify.cases import EXPERTS_ONLY, tiny

CONFIG = types.SimpleNamespace(router="softmax", groups=1, top_groups=1, top_k=2, normalize_weights=False, routed_scaling=1.0)


def test_a_given_choice_replaces_the_routers_own():
    logits = np.random.default_rng(0).normal(size=(2, 5, 4)).astype(np.float32)
    valid = np.ones((2, 5), bool)
    valid[1, 4] = False
    own = routers.route(jnp.asarray(logits), None, valid, CONFIG)
    given = np.full((2, 5, 2), -1, np.int32)
    given[0, 3], given[1, 4] = (3, 0), (1, 2)
    got = routers.route(jnp.asarray(logits), None, valid, CONFIG, given)
    ids = np.asarray(own.ids_BTk).copy()
    ids[0, 3] = 3, 0
    np.testing.assert_array_equal(got.ids_BTk, ids)  # padding stays unrouted
    scores = np.asarray(jax.nn.softmax(logits[0, 3]))
    np.testing.assert_allclose(got.weights_BTk[0, 3], scores[[3, 0]], rtol=1e-6)


@pytest.mark.slow
def test_any_choice_can_be_replayed_on_any_mesh(monkeypatch):
    """Drawn choices for half of the tokens, through zigzag shards, stages and the exchange of experts: as on one device."""
    config = tiny({"data": 1, "seq": 2, "stage": 2, "expert": 2}, {"layout": "zigzag"}, num_layers=4, channel=("moe", "mlp"))
    case, rng = Case(config, jax.devices()), np.random.default_rng(5)
    own, shape = case.reference().load_LE, (*case.batch["tokens"].shape, 4)
    ids_BTLk = np.argsort(rng.random((*shape, 4)), axis=-1)[..., :2].astype(np.int32)
    drawn_BTLk = np.where(rng.random((*shape, 1)) < 0.5, ids_BTLk, -1)
    monkeypatch.setattr(ties, "replay", lambda case, batch, *_: np.where((batch["segment_ids"] > 0)[..., None, None], drawn_BTLk, -1))
    with case.replaying() as replayed_BT:
        outcome = mesh_check.check(case)
        assert outcome.passed, outcome.rows
        assert not np.array_equal(case.reference().load_LE, own)
    assert replayed_BT.any()


def tied_case(monkeypatch, turn):
    """A Case in which two experts always have the same score, with a router that on the mesh turns some choices: turn(logits_BTE)."""
    original = routers.route

    def route(logits_BTE, *args):
        return original(turn(logits_BTE) if axes.current_mesh() is not None else logits_BTE, *args)

    monkeypatch.setattr(routers, "route", route)
    case = Case(tiny({"data": 8}, **EXPERTS_ONLY | {"num_layers": 1}), jax.devices())
    for path, router in case.params.items():
        if path.endswith("router"):
            router[..., 1] = router[..., 0]
    return case


@pytest.mark.slow(always=True)
def test_turned_ties_are_replayed_and_counted(monkeypatch):
    """Of two experts with one score the reference takes the first, the mesh here the second: right on both sides, once all replay one."""
    case = tied_case(monkeypatch, lambda logits_BTE: logits_BTE.at[..., 1].multiply(1 + 1e-6))
    tied_BT = np.any(ties.replay(case, case.batch) >= 0, axis=(2, 3))
    outcome = run_check(case, "mesh", lambda *_: None)
    assert outcome.passed, outcome.rows
    assert case.replayed == tied_BT.sum() > 10 and (~tied_BT & (case.batch["segment_ids"] > 0)).any()
    assert all(f"{tied_BT.sum()} tokens with a tie of expert scores under 1e-05 replay" in r.note for r in outcome.rows)


@pytest.mark.slow
def test_a_choice_turned_without_a_tie_fails(monkeypatch):
    case = tied_case(monkeypatch, lambda logits_BTE: logits_BTE.at[0, 0, 2].add(0.5))
    outcome = run_check(case, "mesh", lambda *_: None)
    assert not outcome.passed and case.replayed == 0

"""Tokens whose choice of experts rounding may turn: the score of the last chosen expert is that of the first one not chosen.

Such a token may go elsewhere on a mesh and both sides are right. It replays one choice on all sides; a routing that differs without a near
tie is a fault.
Letters: B batch, T time, L layers, E experts, G groups, k choices per token.
"""
import contextlib

import jax
import jax.numpy as jnp
import numpy as np

from effmodels.channel import routers
from effmodels.models import state as model_state

GAP = 1e-5  # what is turned although the lead is larger is a fault


def replay(case, batch, key=None, mode="train"):
    """int32 [B, T, L, k] for `Ctx.experts_BTLk`: the reference's choice where it is a tie up to rounding, -1 everywhere else."""
    layers = case.one.model.resolved.layers
    routed = [i for i, kind in enumerate(layers) if kind.channel.cls.reports_load]
    most = max(layers[i].channel.config.top_k for i in routed)
    experts_BTLk = np.full((*batch["tokens"].shape, len(layers), most), -1, np.int32)
    for layer, (ids_BTk, gap_BT) in zip(routed, _routes(case, batch, key, mode)):
        experts_BTLk[:, :, layer, : ids_BTk.shape[-1]] = np.where(gap_BT[..., None] < GAP, ids_BTk, -1)
    return experts_BTLk


def present(case):
    """Whether any token of the case's batch has a near tie, under any key that a check gives it."""
    keys = [None] if case.key() is None else [None, *(case.key(m) for m in range(max(2, case.micro_batches)))]
    return any(np.any(replay(case, case.batch, key) >= 0) for key in keys)


def least_gaps(case, batch):
    """float32 [B]: the smallest lead of a chosen score over a refused one of any token of the row, in any layer."""
    return np.min([np.min(gap_BT, axis=1) for _, gap_BT in _routes(case, batch, None, "eval")], axis=0)


def _routes(case, batch, key, mode):
    """[(ids_BTk, gap_BT)] of every layer with experts; padding has gap 1."""
    setup = case.compiled("unrolled setup", lambda: case.setup(case.devices[:1], mesh={}, scan_layers=False))
    graphdef = model_state.split(setup.model)[0]

    def routes(params, buffers, batch, key):
        with recorded_routes() as calls:
            model_state.merge(graphdef, params, buffers).hidden(
                batch["tokens"], segment_ids_BT=batch["segment_ids"], positions_BT=batch["positions"], key=key, mode=mode
            )  # fmt: skip
        valid_BT = batch["segment_ids"] > 0
        return [(ids_BTk, jnp.where(valid_BT, gap(*scores), 1.0)) for ids_BTk, *scores in calls]

    batch = {name: batch[name] for name in ("tokens", "segment_ids", "positions")}
    return jax.device_get(case.compiled(f"routes {mode}", lambda: case.jit(routes))(*case.placed(setup), batch, key))


@contextlib.contextmanager
def recorded_routes():
    """A list that gets (ids_BTk, scores_BTE, bias_E, config) of every call of `routers.route` traced inside; layers must not be scanned."""
    original, calls = routers.route, []

    def route(logits_BTE, bias_E, valid_BT, config, given_BTk=None):
        routing = original(logits_BTE, bias_E, valid_BT, config, given_BTk)
        calls.append((routing.ids_BTk, routing.scores_BTE, bias_E, config))
        return routing

    routers.route = route
    try:
        yield calls
    finally:
        routers.route = original


def gap(scores_BTE, bias_E, config):
    """float32 [B, T]: how far the last chosen expert (or group) is ahead of the first one refused."""
    choice_BTE = scores_BTE if bias_E is None else scores_BTE + bias_E
    if config.groups == 1:
        return _lead(choice_BTE, config.top_k)
    B, T, E = choice_BTE.shape
    grouped_BTGe = choice_BTE.reshape(B, T, config.groups, E // config.groups)
    group_BTG = jnp.sum(jax.lax.top_k(grouped_BTGe, min(routers.GROUP_SCORES[config.group_score], E // config.groups))[0], axis=-1)
    least_BT1 = jax.lax.top_k(group_BTG, config.top_groups)[0][..., -1:]
    allowed_BTE = jnp.repeat(group_BTG >= least_BT1, E // config.groups, axis=-1)
    return jnp.minimum(_lead(group_BTG, config.top_groups), _lead(jnp.where(allowed_BTE, choice_BTE, -jnp.inf), config.top_k))


def _lead(values, k):
    if k == values.shape[-1]:
        return jnp.ones(values.shape[:-1])
    best = jax.lax.top_k(values, k + 1)[0]
    return best[..., k - 1] - best[..., k]

"""Tokens whose choice of experts rounding may turn: the score of the last chosen expert is that of the first one not chosen.

Such a token may go elsewhere on a mesh and both sides are right. Its row is left out on every side, which is what replaying the reference's
choice would give for all other rows; a routing that differs without a near tie is a fault.
Letters: B batch, T time, E experts, G groups, k choices per token.
"""
import contextlib

import jax
import jax.numpy as jnp
import numpy as np

from effmodels.channel import routers
from effmodels.models import state as model_state

GAPS = (1e-6, 1e-5)  # rounding turns the first; what is turned above the last is a fault


def least_gaps(case, batch=None):
    """float32 [B]: the smallest gap between a chosen and a refused score of any token of the row, in any layer.

    batch: default the case's own.
    """
    setup = case.compiled("unrolled setup", lambda: case.setup(case.devices[:1], mesh={}, scan_layers=False))
    graphdef = model_state.split(setup.model)[0]

    def gaps(params, buffers, batch, key):
        with recorded_routes() as routes:
            model_state.merge(graphdef, params, buffers).hidden(
                batch["tokens"], segment_ids_BT=batch["segment_ids"], positions_BT=batch["positions"], key=key
            )  # fmt: skip
        valid_BT = batch["segment_ids"] > 0
        return jnp.min(jnp.stack([jnp.min(jnp.where(valid_BT, gap(*route), 1.0), axis=1) for route in routes]), axis=0)

    batch, key = (case.batch, case.key()) if batch is None else (batch, None)
    return np.asarray(case.compiled("gaps", lambda: case.jit(gaps))(*case.placed(setup), batch, key))


@contextlib.contextmanager
def recorded_routes():
    """A list that gets (scores_BTE, bias_E, config) of every call of `routers.route` traced inside; for layers that are not scanned."""
    original, calls = routers.route, []

    def route(logits_BTE, bias_E, valid_BT, config):
        routing = original(logits_BTE, bias_E, valid_BT, config)
        calls.append((routing.scores_BTE, bias_E, config))
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
    group_BTG = jnp.sum(jax.lax.top_k(grouped_BTGe, min(2, E // config.groups))[0], axis=-1)
    least_BT1 = jax.lax.top_k(group_BTG, config.top_groups)[0][..., -1:]
    allowed_BTE = jnp.repeat(group_BTG >= least_BT1, E // config.groups, axis=-1)
    return jnp.minimum(_lead(group_BTG, config.top_groups), _lead(jnp.where(allowed_BTE, choice_BTE, -jnp.inf), config.top_k))


def _lead(values, k):
    if k == values.shape[-1]:
        return jnp.ones(values.shape[:-1])
    best = jax.lax.top_k(values, k + 1)[0]
    return best[..., k - 1] - best[..., k]

"""Routers: which experts each token goes to, and with what weight. Everything in float32.

Letters: B batch, T time, E experts, G groups, k choices per token, C capacity (tokens per expert and row).
"""
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from effmodels.parallel import layouts
from effmodels.parallel.axes import shards

SCORES = {"softmax": functools.partial(jax.nn.softmax, axis=-1), "sigmoid": jax.nn.sigmoid}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """The choice of every token: expert ids (E = not routed), combine weights, and what they were made from."""

    ids_BTk: Any
    weights_BTk: Any
    scores_BTE: Any
    logits_BTE: Any


def route(logits_BTE, bias_E, valid_BT, config, given_BTk=None):
    """Top-k of score + bias; the weight is the score alone (arXiv:2408.15664), normalised over the k chosen if config says so.

    Group-limited choice (DeepSeek-V3, arXiv:2412.19437 section 2.1.2): the experts form `groups`; the best `top_groups` by the sum of each
    group's two highest scores stay eligible. Tokens that are not valid get id E and weight 0. given_BTk: ids that replace the choice where
    they are not -1, with the weights that their scores give.
    """
    E = logits_BTE.shape[-1]
    scores_BTE = SCORES[config.router](logits_BTE)
    choice_BTE = scores_BTE if bias_E is None else scores_BTE + jax.lax.stop_gradient(bias_E)
    if config.groups > 1:
        choice_BTE = _limit_to_groups(choice_BTE, config.groups, config.top_groups, GROUP_SCORES[config.group_score])
    ids_BTk = _largest(choice_BTE, config.top_k)
    if given_BTk is not None:
        ids_BTk = jnp.where(given_BTk < 0, ids_BTk, given_BTk)
    weights_BTk = _at(scores_BTE, ids_BTk)
    if config.normalize_weights:
        weights_BTk = weights_BTk / (jnp.sum(weights_BTk, axis=-1, keepdims=True) + config.weights_eps)
    weights_BTk = weights_BTk * config.routed_scaling
    ids_BTk = jnp.where(valid_BT[..., None], ids_BTk, E).astype(jnp.int32)
    return Routing(ids_BTk, jnp.where(valid_BT[..., None], weights_BTk, 0.0), scores_BTE, logits_BTE)


def _largest(x_BTE, k):
    """The ids of the k largest, largest first, of equal ones the lower first, as `jax.lax.top_k`, which on a TPU sorts all of a row."""
    x_BTE, expert_E, ids = jax.lax.stop_gradient(x_BTE), jnp.arange(x_BTE.shape[-1], dtype=jnp.int32), []
    for _ in range(k):
        ids.append(jnp.argmax(x_BTE, axis=-1).astype(jnp.int32))
        x_BTE = jnp.where(expert_E == ids[-1][..., None], -jnp.inf, x_BTE)
    return jnp.stack(ids, axis=-1)


def _at(x_BTE, ids_BTk):
    """x[..., ids] as masked sums: a TPU gathers single numbers, and adds their gradients up, one after the other (docs/log.md)."""
    expert_E = jnp.arange(x_BTE.shape[-1], dtype=jnp.int32)
    chosen = (jnp.where(expert_E == ids_BTk[..., j, None], x_BTE, 0) for j in range(ids_BTk.shape[-1]))
    return jnp.stack([jnp.sum(x, axis=-1) for x in chosen], axis=-1)


# How many of a group's highest scores add up to its own: DeepSeek-V3 takes two, DeepSeek-V2 one.
GROUP_SCORES = {"top2": 2, "max": 1}


def _limit_to_groups(choice_BTE, groups, top_groups, best):
    B, T, E = choice_BTE.shape
    grouped_BTGe = choice_BTE.reshape(B, T, groups, E // groups)
    best_ids = _largest(grouped_BTGe, min(best, E // groups))
    group_score_BTG = jnp.sum(_at(grouped_BTGe, best_ids), axis=-1)
    group_G, best_BTg = jnp.arange(groups), _largest(group_score_BTG, top_groups)
    allowed_BTG = jnp.any(best_BTg[..., None] == group_G, axis=-2)
    return jnp.where(jnp.repeat(allowed_BTG, E // groups, axis=-1), choice_BTE, -jnp.inf)


def limit_capacity(routing, capacity, layout="contiguous"):
    """(routing, dropped_BTk): each expert takes at most `capacity` tokens of a row, earlier tokens first; the rest are not routed.

    Per row and by index, so that the result depends neither on the mesh nor on the micro-batch, and no token sees a later one.
    """
    B, T, k = routing.ids_BTk.shape
    E = routing.scores_BTE.shape[-1]
    pieces = shards("seq")
    ids_BTk = layouts.from_layout(routing.ids_BTk, layout, pieces)
    taken_BME = jax.nn.one_hot(ids_BTk.reshape(B, T * k), E, dtype=jnp.int32)
    place_BM = jnp.sum((jnp.cumsum(taken_BME, axis=1) - 1) * taken_BME, axis=-1)
    dropped_BTk = layouts.to_layout((place_BM >= capacity).reshape(B, T, k) & (ids_BTk < E), layout, pieces)
    ids, weights = jnp.where(dropped_BTk, E, routing.ids_BTk), jnp.where(dropped_BTk, 0.0, routing.weights_BTk)
    return dataclasses.replace(routing, ids_BTk=ids, weights_BTk=weights), dropped_BTk


def loads(ids_BTk, num_experts):
    """Routed choices per row and expert, float32 [B, E]; id E counts nowhere."""
    return jnp.sum(jax.nn.one_hot(ids_BTk, num_experts, dtype=jnp.float32), axis=(1, 2))


def balance_loss(routing, load_BE, valid_BT, over="row"):
    """E sum_e f_e P_e, weighted by valid tokens and summed: T_valid times 1 at perfect balance (Switch, arXiv:2101.03961 eq. 4).

    f is the share of routed choices, P the mean normalised score. over="row": each row balances by itself, so that the sum does not depend
    on micro-batches. over="batch": f and P are taken over all rows (and, under a mesh, over all its devices) before the product.
    """
    E = load_BE.shape[-1]
    scores = routing.scores_BTE / (jnp.sum(routing.scores_BTE, axis=-1, keepdims=True) + 1e-20)
    tokens_B = jnp.sum(valid_BT, axis=1).astype(jnp.float32)
    score_BE = jnp.sum(jnp.where(valid_BT[..., None], scores, 0.0), axis=1)
    if over == "batch":
        load_BE, score_BE, tokens_B = (jnp.sum(a, axis=0, keepdims=True) for a in (load_BE, score_BE, tokens_B))
    share_BE = load_BE / jnp.maximum(jnp.sum(load_BE, axis=-1, keepdims=True), 1.0)
    mean_BE = score_BE / jnp.maximum(tokens_B[:, None], 1.0)
    return jnp.sum(E * jnp.sum(jax.lax.stop_gradient(share_BE) * mean_BE, axis=-1) * tokens_B)


def z_loss(routing, valid_BT):
    """Sum over valid tokens of logsumexp(logits)^2 (ST-MoE, arXiv:2202.08906 eq. 5)."""
    return jnp.sum(jnp.where(valid_BT, jax.nn.logsumexp(routing.logits_BTE, axis=-1) ** 2, 0.0))


def updated_bias(bias_E, load_E, rate):
    """bias + rate * sign(mean load - load), loads of the whole optimiser step (arXiv:2408.15664, algorithm 1)."""
    return bias_E + rate * jnp.sign(jnp.mean(load_E, axis=-1, keepdims=True) - load_E)


def max_violation(load_E):
    """MaxVio = (max load - mean load) / mean load (arXiv:2408.15664, eq. 4)."""
    mean = jnp.mean(load_E, axis=-1)
    return (jnp.max(load_E, axis=-1) - mean) / jnp.maximum(mean, 1e-9)

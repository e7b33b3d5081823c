"""Pipeline parallelism inside one program: which stage works on what at every tick, where each stage's layers lie, and the loop over ticks.

GPipe (arXiv:1811.06965) is one round; with more rounds a stage holds several stretches of layers and a micro-batch goes round the stages
(interleaved stages, arXiv:2104.04473). The backward pass is the derivative of the loop: the same ticks in reverse.
Letters: p stages, M micro-batches, K = ceil(M / p), R repeats of a period, B batch, T time, D model, s stage, t tick.
"""
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from effmodels.config import ConfigError
from effmodels.parallel import axes, stack

STATE_DIMS = ("stage", "batch", "res_seq", "act_embed")
BUBBLE = -1  # in Schedule.micro_ts: the stage has no work at this tick


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Who works on what, as numpy. micro_ts, round_ts: int32 [ticks, p], micro-batch (or BUBBLE) and round of every stage at every tick.

    delay_t: ticks that what arrives at stage 0 for its next round has been waiting there.
    """

    stages: int
    micro_batches: int
    rounds: int
    micro_ts: np.ndarray
    round_ts: np.ndarray
    delay_t: np.ndarray

    @property
    def ticks(self):
        """Calls of every stage; all run in step."""
        return len(self.micro_ts)

    @property
    def slots(self):
        """K: micro-batches that one stage keeps at the entrance and at the exit."""
        return -(-self.micro_batches // self.stages)

    @property
    def entering_Ks(self):
        """Which micro-batch lies where before the loop, int32 [K, p]; past the last one, copies of it."""
        place = np.arange(self.stages * self.slots).reshape(self.stages, self.slots).T
        return np.minimum(place, self.micro_batches - 1)

    @property
    def leaving_Ks(self):
        """Which micro-batch lies where after the loop, int32 [K, p]; BUBBLE where there is none."""
        place = np.arange(self.stages * self.slots).reshape(self.stages, self.slots).T
        return np.maximum(place - self._spare, BUBBLE)

    @property
    def _spare(self):
        return self.stages * self.slots - self.micro_batches

    def per_tick(self):
        """The scan's inputs: micro, round and real of every stage; which slots the entrance and the exit use, and whether they move."""
        last = self.rounds - 1
        micro_ts = np.maximum(self.micro_ts, 0)
        real_ts = self.micro_ts != BUBBLE
        enters_t = real_ts[:, 0] & (self.round_ts[:, 0] == 0)
        leaves_t = real_ts[:, -1] & (self.round_ts[:, -1] == last)
        ring, t = int(self.delay_t.max()) + 1, np.arange(self.ticks)
        return {
            "micro": micro_ts, "round": self.round_ts, "real": real_ts, "enters": enters_t, "leaves": leaves_t,
            "entry": (np.cumsum(enters_t) - enters_t) % self.slots, "exit": (np.cumsum(leaves_t) - leaves_t + self._spare) % self.slots,
            "wait": t % ring, "resume": (t - self.delay_t) % ring,
        }  # fmt: skip


@functools.cache
def schedule(stages, micro_batches, rounds=1):
    """The `Schedule` with the fewest ticks: M * rounds + p - 1, or with fewer micro-batches than stages p * (rounds - 1) + M + p - 1.

    Micro-batches go round in groups of at least p: a group's first one is back at stage 0 when its last one has entered, so that the
    stages never wait and stage 0 keeps at most a group less p of them.
    """
    groups = max(1, micro_batches // stages) if rounds > 1 else 1
    sizes = [micro_batches // groups + (g < micro_batches % groups) for g in range(groups)]
    entries, begin, first = [], 0, 0  # (tick at stage 0, round, micro-batch, delay)
    for size in sizes:
        period = max(size, stages)
        entries += [(begin + r * period + i, r, first + i, period - stages) for r in range(rounds) for i in range(size)]
        begin, first = begin + rounds * period, first + size
    ticks = max(entry[0] for entry in entries) + stages
    micro_ts, round_ts = np.full((ticks, stages), BUBBLE, np.int32), np.zeros((ticks, stages), np.int32)
    delay_t = np.zeros(ticks, np.int32)
    for begin, r, micro, delay in entries:
        at = begin + np.arange(stages), np.arange(stages)
        micro_ts[at], round_ts[at] = micro, r
        delay_t[begin] = delay if r else 0
    return Schedule(stages, micro_batches, rounds, micro_ts, round_ts, delay_t)


def bubble_share(stages, micro_batches, rounds=1):
    """The share of (stage, tick) slots without work: (p - 1) / (M * rounds + p - 1), for M >= p or one round.

    Fewer micro-batches than stages cannot keep the stages busy from round to round; the share is then larger, and exact too.
    """
    ticks = (rounds - 1) * max(micro_batches, stages) + micro_batches + stages - 1
    return 1 - micro_batches * rounds / ticks


def choose(runs, stages, rounds):
    """The index of the segment that is split over the stages: the one of most layers. runs: (start, period, repeats) of every segment.

    Raises ConfigError when its repeats do not divide by stages x rounds, naming the nearest counts that do.
    """
    index = max(range(len(runs)), key=lambda i: (runs[i][2] > 1) * runs[i][1] * runs[i][2])
    start, period, repeats = runs[index]
    parts = stages * rounds
    if repeats == 1:
        raise ConfigError(
            f"pipeline: no period of layers repeats in this model, so that mesh.stage={stages} cannot split it. Use a pattern that repeats "
            "(and scan_layers=True), or mesh.stage=1."
        )
    if repeats % parts == 0:
        return index
    counts = sorted({max(1, repeats // parts) * parts, -(-repeats // parts) * parts})
    raise ConfigError(
        f"pipeline: the largest scanned run of layers (layers {start} to {start + period * repeats - 1}: a period of {period}, {repeats} "
        f"times) cannot be split evenly over mesh.stage={stages} x parallel.rounds={rounds}: the period must repeat "
        f"{' or '.join(map(str, counts))} times ({' or '.join(str(n * period) for n in counts)} layers), "
        f"or stage x rounds must divide {repeats}."
    )


def by_stage(a, dim_names, stages, rounds):
    """A stack [R, ...] in the order of the layers, as [p, rounds, R / (p * rounds), ...] with every stage's layers on its own devices.

    Stage s computes in round r the repeats of block r * p + s. A stack is stored with its first dim split over the stages; with one round
    that is where the layers belong, with more they travel once per step and direction.
    """
    per = a.shape[0] // (stages * rounds)
    names = ("stage", *dim_names[1:])
    if rounds == 1:
        return axes.shard(a.reshape(stages, 1, per, *a.shape[1:]), "stage", None, None, *dim_names[1:])
    spec = axes.checked_spec(a.shape, names, mesh=axes.current_mesh(), array="pipeline stack")
    return _interleave(axes.shard(a, *names), tuple(spec), stages, rounds)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _interleave(a, spec, stages, rounds):
    # NOTE: derivatives are written out because a transposed shard_map sums the gradient over axes that only hold copies.
    per, axis = a.shape[0] // (stages * rounds), spec[0]
    routes = _routes(stages, rounds)

    def local(a):
        blocks, s = a.reshape(rounds, per, *a.shape[1:]), jax.lax.axis_index(axis)
        out = jnp.zeros_like(blocks)
        for pairs, source_s, target_s in routes:
            moved = jax.lax.ppermute(blocks[jnp.asarray(source_s)[s]], axis, pairs)
            out = out.at[jnp.asarray(target_s)[s]].set(moved)
        return out[None]

    return _mapped(local, PartitionSpec(*spec), PartitionSpec(spec[0], None, None, *spec[1:]))(a)


def _interleave_fwd(a, spec, stages, rounds):
    return _interleave(a, spec, stages, rounds), None


def _interleave_bwd(spec, stages, rounds, _, g):
    axis, routes = spec[0], _routes(stages, rounds)

    def local(g):
        blocks, s = g[0], jax.lax.axis_index(axis)
        out = jnp.zeros_like(blocks)
        for pairs, source_s, target_s in routes:
            moved = jax.lax.ppermute(blocks[jnp.asarray(target_s)[s]], axis, [(b, a) for a, b in pairs])
            out = out.at[jnp.asarray(source_s)[s]].set(moved)
        return out.reshape(-1, *blocks.shape[2:])

    return (_mapped(local, PartitionSpec(spec[0], None, None, *spec[1:]), PartitionSpec(*spec))(g),)


_interleave.defvjp(_interleave_fwd, _interleave_bwd)


def _mapped(f, in_spec, out_spec):
    return jax.shard_map(f, mesh=axes.current_mesh(), in_specs=(in_spec,), out_specs=out_spec, check_vma=False)


def _routes(stages, rounds):
    """Permutations of the stages that carry block d * rounds + k from where it is stored, (d, k), to stage and round of its work.

    Each is (pairs (from, to), the k that every stage sends, the round that every stage receives). Storage d and k go to stage
    (d * rounds + k) % p: with g = gcd(p, rounds) the d of one residue class modulo p / g would collide, so each class starts at another k.
    """
    g, found = math.gcd(stages, rounds), []
    for first in range(rounds):
        k_s = [(first + d // (stages // g)) % rounds for d in range(stages)]
        blocks = [d * rounds + k for d, k in enumerate(k_s)]
        round_s = np.zeros(stages, np.int32)
        for block in blocks:
            round_s[block % stages] = block // stages
        found.append(([(d, block % stages) for d, block in enumerate(blocks)], np.array(k_s, np.int32), round_s))
    return found


def run(f, params, x_KsBTD, plan, *, remat="none"):
    """(y_KsBTD, aux): every micro-batch through all repeats, by `plan`, a Schedule.

    f(params of one stage and round, x_BTD, first repeat, micro-batch) -> (y_BTD, aux), aux a pytree with leading dim R / (p * rounds).
    params: arrays [p, rounds, per, ...] of `by_stage`. x lies as plan.entering_Ks says, y as plan.leaving_Ks.
    aux: sums over micro-batches, [R, ...].
    remat: as of `stack.policy`, for the call of a stage, or "none".
    """
    stages, rounds, per = jax.tree.leaves(params)[0].shape[:3]
    stage_s = np.arange(stages)

    def part(params, x, r, s, micro):
        chosen = jax.tree.map(lambda a: a[0] if rounds == 1 else jax.lax.dynamic_index_in_dim(a, r, keepdims=False), params)
        return f(chosen, x, (r * stages + s) * per, micro)

    part = jax.checkpoint(part, policy=_keep_computed if remat == "none" else stack.policy(remat), prevent_cse=False)
    part = jax.vmap(part, spmd_axis_name=axis_name())

    def tick(carry, now):
        arriving, entrance, leaving, waiting = carry
        if waiting is not None:
            waiting = _put(waiting, arriving, now["wait"])
            arriving = _select(stage_s == 0, waiting[now["resume"]], arriving)
        next_in, next_out = entrance[now["entry"]], leaving[now["exit"]]
        x = _select((stage_s == 0) & now["enters"], next_in, arriving)
        x = _split(_select(now["real"], x, next_in))  # in a bubble: something that a layer can digest
        y, aux = part(params, x, now["round"], jnp.asarray(stage_s), now["micro"])
        y = _split(y)
        # Both queues lie spread over the stages and move by one stage whenever a slot is used.
        entrance = _put(entrance, _select(now["enters"], _shift(next_in, -1), next_in), now["entry"])
        moved = _select(stage_s == stages - 1, y, _shift(next_out, -1))
        leaving = _put(leaving, _select(now["leaves"], moved, next_out), now["exit"])
        aux = jax.tree.map(lambda a: _select(now["real"], a, jnp.zeros_like(a)), aux)
        return (_shift(y, 1), entrance, leaving, waiting), aux

    depth = int(plan.delay_t.max())
    waiting = jnp.broadcast_to(x_KsBTD[0], (depth + 1, *x_KsBTD.shape[1:])) if depth else None
    ticks = {name: jnp.asarray(value) for name, value in plan.per_tick().items()}
    (_, _, y_KsBTD, _), aux_ts = jax.lax.scan(tick, (x_KsBTD[0], x_KsBTD, x_KsBTD, waiting), ticks)
    return y_KsBTD, jax.tree.map(functools.partial(_by_repeat, plan), aux_ts)


def over_stages(f, micro_Ks, *arrays, placed=()):
    """f(*placed, *arrays of one micro-batch) for every micro-batch named in micro_Ks, [K, p, ...]: each stage takes K of them in turn.

    arrays: pytrees with leading dim M, whole on every stage. placed: arrays that already are [K, p, ...].
    """
    index = np.maximum(micro_Ks, 0)
    each = jax.vmap(f, spmd_axis_name=axis_name())
    return jax.lax.map(lambda xs: each(*xs), (*placed, *jax.tree.map(lambda a: a[index], arrays)))


def axis_name():
    """The mesh axis of the stages, as vmap takes it."""
    names = axes.as_tuple(axes.current_rules()["stage"])
    return names[0] if len(names) == 1 else names


def _by_repeat(plan, aux_tsl):
    """[ticks, p, per, ...] -> [R, ...], summed over micro-batches: block r * p + s is what stage s did in round r."""
    did_tsr = plan.round_ts[..., None] == np.arange(plan.rounds)  # what a bubble reports is zero already
    did_tsr = jnp.asarray(did_tsr, aux_tsl.dtype)
    sums = jnp.einsum("tsl...,tsr->rsl...", aux_tsl, did_tsr, precision=jax.lax.Precision.HIGHEST)
    return sums.reshape(-1, *aux_tsl.shape[3:])


def _keep_computed(primitive, *_, **__):
    # What only moves or converts is made again: else every tick would keep its own converted copy of the stage's weights.
    return primitive.name not in _CHEAP


_CHEAP = {
    "broadcast_in_dim", "concatenate", "convert_element_type", "copy", "dynamic_slice", "gather", "reshape", "select_n",
    "sharding_constraint", "slice", "squeeze", "transpose",
}  # fmt: skip


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _shift(x_sBTD, by):
    """What stage s holds goes to stage (s + by) % p: one collective permute, which the partitioner does not find in a roll."""
    stages, spec = x_sBTD.shape[0], axes.spec(STATE_DIMS)
    pairs = [(s, (s + by) % stages) for s in range(stages)]
    return _mapped(lambda x: jax.lax.ppermute(x, spec[0], pairs), spec, spec)(x_sBTD)


_shift.defvjp(lambda x, by: (_shift(x, by), None), lambda by, _, g: (_shift(g, -by),))


def _split(x_sBTD):
    return axes.shard(x_sBTD, *STATE_DIMS)


def _put(queue, item, slot):
    return jax.lax.dynamic_update_index_in_dim(queue, item, slot, axis=0)


@jax.custom_vjp
def _select(mask_s, a, b):
    """a where the mask (of every stage, or one for all) is true, else b; what the backward pass keeps is the mask as it is given."""
    return jnp.where(_over_rows(mask_s, a), a, b)


def _select_bwd(mask_s, g):
    mask = _over_rows(mask_s, g)
    return None, jnp.where(mask, g, 0), jnp.where(mask, 0, g)


_select.defvjp(lambda mask_s, a, b: (_select(mask_s, a, b), mask_s), _select_bwd)


def _over_rows(mask_s, like):
    mask_s = jnp.asarray(mask_s)
    return mask_s.reshape(mask_s.shape + (1,) * (like.ndim - mask_s.ndim))

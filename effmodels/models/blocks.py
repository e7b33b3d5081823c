"""Blocks and segments: one layer's residual wiring, and the grouping of all layers into scanned runs.

Letters: B batch, T time, D model, R repeats of a period.
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from effmodels.layers.context import dropout
from effmodels.layers.norms import NORMS
from effmodels.mixers import caches
from effmodels.models import sharing
from effmodels.parallel import pipeline, stack

DROPOUT_MIXER, DROPOUT_CHANNEL = 0, 1  # sites of Ctx.key_for


class Block(nnx.Module):
    """One layer: token mixer and channel mixer, each with its norm(s) and residual; of an absent channel mixer neither.

    norm_position: "pre" x + f(norm(x)); "post" norm(x + f(x)); "sandwich" x + norm(f(norm(x))); "input" norm(x) + f(norm(x)), which is
    "post" with the norms one place on (MiniMax-01, arXiv:2501.08313). residual: "serial", or "parallel" (both mixers read the same input;
    with "pre" each keeps its own norm, as GPT-NeoX). residual_scales of a mixer's name, (a, b): a x + b f instead of x + f.
    """

    def __init__(self, kind, resolved, *, rngs):
        config = resolved.config
        self.norm_position, self.residual, self.rate = config.norm_position, config.residual, config.dropout
        self.scales = tuple(config.residual_scales.get(part.name, (1.0, 1.0)) for part in (kind.mixer, kind.channel))

        def norm():
            options = {"eps": config.norm_eps, "offset": config.norm_offset, "param_dtype": config.param_dtype}
            return NORMS[config.norm](config.d_model, rngs=rngs, **options)

        self.mixer = kind.mixer.cls(kind.mixer.config, resolved.env, rngs=rngs)
        self.channel = kind.channel.cls(kind.channel.config, resolved.env, rngs=rngs)
        self.norm_mixer = norm()
        absent, sandwich = kind.channel.cls.absent, config.norm_position == "sandwich"
        if not absent and (config.norm_position, config.residual) != ("post", "parallel"):  # there one norm follows the sum of both
            self.norm_channel = norm()
        if sandwich:
            self.norm_mixer_out = norm()
        if sandwich and not absent:
            self.norm_channel_out = norm()

    def __call__(self, x_BTD, ctx):
        """(y_BTD, LayerAux or None)."""
        y_BTD, aux, _ = self._run(x_BTD, ctx, lambda h: (self.mixer(h, ctx), None))
        return y_BTD, aux

    def prefill(self, x_BTD, ctx, state, valid_BT):
        """(y_BTD, state) with the mixer's prefill."""
        y_BTD, _, state = self._run(x_BTD, ctx, lambda h: self.mixer.prefill(h, ctx, state, valid_BT))
        return y_BTD, state

    def step(self, x_BD, ctx, state, active_B):
        """(y_BD, state) with the mixer's step."""

        def mix(h_BTD):
            y_BD, new_state = self.mixer.step(h_BTD[:, 0], ctx, state, active_B)
            return y_BD[:, None], new_state

        y_BTD, _, state = self._run(x_BD[:, None], ctx, mix)
        return y_BTD[:, 0], state

    def _run(self, x_BTD, ctx, mix):
        """The residual wiring around `mix(h) -> (y, state)` and the channel mixer; (y_BTD, aux, state)."""
        pre, out = self.norm_position != "post", self.norm_position == "sandwich"
        read_BTD = self.norm_mixer(x_BTD) if pre else x_BTD
        h_BTD, state = mix(read_BTD)
        h_BTD = dropout(self.norm_mixer_out(h_BTD) if out else h_BTD, self.rate, ctx.key_for(DROPOUT_MIXER), ctx.layout)
        if self.residual == "parallel" and not self.channel.absent:
            g_BTD, aux, _ = self._channel(x_BTD, ctx, pre, out)
            return (x_BTD + h_BTD + g_BTD if pre else self.norm_mixer(x_BTD + h_BTD + g_BTD)), aux, state
        x_BTD = self._sum(0, x_BTD, read_BTD, h_BTD)
        x_BTD = x_BTD if pre else self.norm_mixer(x_BTD)
        if self.channel.absent:
            return x_BTD, None, state
        g_BTD, aux, read_BTD = self._channel(x_BTD, ctx, pre, out)
        x_BTD = self._sum(1, x_BTD, read_BTD, g_BTD)
        return (x_BTD if pre else self.norm_channel(x_BTD)), aux, state

    def _channel(self, x_BTD, ctx, pre, out):
        read_BTD = self.norm_channel(x_BTD) if pre else x_BTD
        g_BTD, aux = self.channel(read_BTD, ctx)
        g_BTD = dropout(self.norm_channel_out(g_BTD) if out else g_BTD, self.rate, ctx.key_for(DROPOUT_CHANNEL), ctx.layout)
        return g_BTD, aux, read_BTD

    def _sum(self, site, x_BTD, read_BTD, f_BTD):
        """The residual of the mixer (0) or the channel mixer (1), whose branch has read `read_BTD` and gives `f_BTD`."""
        x_BTD = read_BTD if self.norm_position == "input" else x_BTD
        if self.scales[site] == (1.0, 1.0):
            return x_BTD + f_BTD
        # In float32: the scales themselves would be rounded to bfloat16.
        wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
        kept, added = self.scales[site]
        return (kept * x_BTD.astype(wide) + added * f_BTD.astype(wide)).astype(x_BTD.dtype)


@dataclasses.dataclass(frozen=True)
class Run:
    """Layers start .. start + len(kinds) * repeats - 1: a period of kinds, repeated."""

    start: int
    kinds: tuple
    repeats: int

    @property
    def period(self):
        return len(self.kinds)


def segments(kinds, scan_layers=True):
    """All layers as maximal (period, repeats) runs, greedily from the first layer: at each place the period that covers most layers.

    Of equal coverage the shortest period wins (fewest layers to compile). scan_layers=False: every layer is a run of its own.
    """
    runs, i = [], 0
    while i < len(kinds):
        best = (1, 1)
        for period in range(1, (len(kinds) - i) // 2 + 1 if scan_layers else 1):
            repeats = 1
            while kinds[i + repeats * period : i + (repeats + 1) * period] == kinds[i : i + period]:
                repeats += 1
            if repeats > 1 and period * repeats > best[0] * best[1]:
                best = (period, repeats)
        period, repeats = best
        runs.append(Run(i, tuple(kinds[i : i + period]), repeats))
        i += period * repeats
    return runs


class Segment(nnx.Module):
    """One run of layers; with repeats > 1 its blocks are stacked and scanned. sources: whose weights its places use (`sharing.sources`)."""

    def __init__(self, run, resolved, key, sources):
        self.start, self.repeats, self.period = run.start, run.repeats, len(run.kinds)
        self.remat, self.neighbours, self.sources = resolved.config.remat, resolved.config.scan_neighbours, sources
        rank, dtype = sharing.check(resolved.config.sharing).rank, resolved.config.param_dtype

        def block_of(kind, place):
            def build(layer_key):
                rngs = nnx.Rngs(layer_key)
                return sharing.keep_own(Block(kind, resolved, rngs=rngs), place, sources[place], rank, rngs=rngs, param_dtype=dtype)

            return build

        def layer_key(layer):
            return jax.random.fold_in(key, layer)

        blocks = []
        for p, kind in enumerate(run.kinds):
            layers = run.start + p + self.period * jnp.arange(run.repeats)
            build = block_of(kind, p)
            blocks.append(build(layer_key(layers[0])) if run.repeats == 1 else stack.stack(build, jax.vmap(layer_key)(layers)))
        self.blocks = nnx.List(blocks)

    def __call__(self, x_BTD, ctx, shared):
        """(y_BTD, tuple over the period of LayerAux or None; with repeats > 1 their leaves have a leading dim R).

        shared: what the model holds for layers that share weights.
        """
        if self.repeats == 1:
            return _period(ctx, self.sources, Period(self.blocks), x_BTD, self.start, shared, self.remat, neighbours=self.neighbours)
        period = functools.partial(_period, ctx, self.sources, remat=self.remat, in_scan=True, neighbours=self.neighbours)
        return stack.scan(period, Period(self.blocks), x_BTD, self._first_layers(), shared=shared)

    def pipelined(self, x_KsBTD, plan, ctx_of, shared):
        """`__call__` on all micro-batches of a `pipeline.Schedule` at once: (y_KsBTD, the same aux, summed over micro-batches).

        ctx_of(micro-batch) -> its Ctx. Each stage holds and runs its own repeats.
        """
        graphdef, state = nnx.split(Period(self.blocks))
        variables, tree = jax.tree.flatten(state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
        placed = [pipeline.by_stage(v[...], v.get_metadata()["info"].dim_names, plan.stages, plan.rounds) for v in variables]

        def part(arrays, x_BTD, first, micro):
            blocks = nnx.merge(graphdef, tree.unflatten([v.replace(a) for v, a in zip(variables, arrays)]))
            layers = self._first_layers(first + jnp.arange(arrays[0].shape[0], dtype=jnp.int32))
            period = functools.partial(_period, ctx_of(micro), self.sources, neighbours=self.neighbours)
            return stack.scan(period, blocks, x_BTD, layers, shared=shared)

        return pipeline.run(part, placed, x_KsBTD, plan, remat=self.remat)

    def init_state(self, batch, max_len, dtype):
        """One mixer state per place in the period; with repeats > 1 stacked [R, ...]."""
        states = [block.mixer.init_state(batch, max_len, dtype) for block in self.blocks]
        if self.repeats == 1:
            return tuple(states)
        return jax.tree.map(lambda a: jnp.broadcast_to(a, (self.repeats, *a.shape)), tuple(states))

    def decode(self, x, ctx, states, call, shared):
        """(y, states) where call(block, x, ctx, state) is a block's prefill or step."""

        def period(blocks, x, first_layer, old, shared):
            new = []
            for p, block in enumerate(_bound(blocks, self.sources, shared)):
                x, state = call(block, x, ctx.at_layer(first_layer + p), old[p])
                new.append(state)
            return x, tuple(new)

        def body(blocks, carry, repeat, shared):
            (x, states), first_layer = carry, self._first_layers(repeat)
            x, new = period(blocks, x, first_layer, caches.layer_of(states, repeat), shared)
            return (x, caches.stacked(states, new, repeat)), None

        if self.repeats == 1:
            return period(Period(self.blocks), x, self.start, states, shared)
        return stack.scan(body, Period(self.blocks), (x, states), jnp.arange(self.repeats, dtype=jnp.int32), shared=shared)[0]

    def _first_layers(self, repeats=None):
        return self.start + self.period * (jnp.arange(self.repeats, dtype=jnp.int32) if repeats is None else repeats)


def lent(resolved, key, layer, parts):
    """The parts of one layer that the model holds for others too, drawn as that layer would draw its own."""
    return sharing.Lent(Block(resolved.layers[layer], resolved, rngs=nnx.Rngs(jax.random.fold_in(key, layer))), parts)


def _bound(blocks, sources, shared):
    return [sharing.bind(block, chosen, shared, blocks.blocks) for block, chosen in zip(blocks.blocks, sources)]


def _period(ctx, sources, blocks, x_BTD, first_layer, shared, remat="none", in_scan=False, neighbours=False):
    """One period of layers; (y_BTD, tuple of LayerAux or None). remat is by layer: a long period recomputes one of them at a time.

    neighbours: equal layers in a row are scanned, so that a period of 7 + 1 layers compiles as one of 2. Their weights are stacked here.
    """
    graphdef, state = nnx.split(blocks)
    auxes, p = [], 0
    while p < len(blocks.blocks):
        alike = _alike(blocks.blocks, sources, p) if neighbours else 1
        if alike > 1:
            x_BTD, aux = _row(blocks.blocks[p : p + alike], x_BTD, ctx, first_layer + p, remat)
            auxes += [jax.tree.map(lambda a, i=i: a[i], aux) for i in range(alike)]
        else:

            def layer(state, x_BTD, p=p):
                blocks = nnx.merge(graphdef, state).blocks
                return sharing.bind(blocks[p], sources[p], shared, blocks)(x_BTD, ctx.at_layer(first_layer + p))

            x_BTD, aux = stack.checkpointed(layer, remat, in_scan)(state, x_BTD)
            auxes.append(aux)
        p += alike
    return x_BTD, tuple(auxes)


def _alike(blocks, sources, p):
    """How many blocks from place p on are equal but for their numbers; one that shares weights is like no other."""
    first, n = nnx.split(blocks[p])[0], 1
    while not sources[p] and p + n < len(blocks) and not sources[p + n] and nnx.split(blocks[p + n])[0] == first:
        n += 1
    return n


def _row(blocks, x_BTD, ctx, first_layer, remat):
    """(y_BTD, LayerAux with a leading dim or None) of equal blocks one after the other."""
    graphdef, states = nnx.split(blocks[0])[0], [nnx.split(block)[1] for block in blocks]
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *states)

    def body(x_BTD, slices):
        state, i = slices
        return nnx.merge(graphdef, state)(x_BTD, ctx.at_layer(first_layer + i))

    return jax.lax.scan(stack.checkpointed(body, remat, in_scan=True), x_BTD, (stacked, jnp.arange(len(blocks), dtype=jnp.int32)))


class Period(nnx.Module):
    """The blocks of one period, as a unit to split and scan."""

    def __init__(self, blocks):
        self.blocks = blocks

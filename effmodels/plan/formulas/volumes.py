"""What travels over each mesh axis in one training step, by formula (docs/parallel.md): no program, any mixer.

An axis that splits a weight and the rows: the weight is gathered (ZeRO-3). One that splits the rows only: gradients are summed. One that
splits a weight only: activations are summed (arXiv:1909.08053). Over a split sequence a mixer sends its state, whose size its `cost` says.
Gradients of gathered weights are scattered, but where libtpu sums them whole and lets every chip keep its part (`_gradients`).
Letters: g chips of a group, M micro-batches, D model, n shards of an axis.
"""
import dataclasses
import math
import re

import jax.numpy as jnp

from effmodels.channel.moe import capacity
from effmodels.config import named_remat
from effmodels.models import mtp
from effmodels.parallel import axes, layouts, pipeline, scatter, travel
from effmodels.parallel.state_passing import LARGEST_RING
from effmodels.plan.formulas import torus

ASYNC = "xla_enable_async_all_gather"  # the compiler's option without which programs for ASYNC_CHIPS wait for what they gather
ASYNC_CHIPS = ("v4",)
PLACE = re.compile(r"segments\.(\d+)\.blocks\.(\d+)\.(mixer|channel)\.")


@dataclasses.dataclass(frozen=True)
class Volume:
    """A collective. bytes: sent by one chip, of one call. pieces: how many collectives of the program it stands for."""

    axes: tuple
    collective: str
    bytes: float
    calls: int
    layer: str
    phase: str
    pieces: int = 1


def volumes(run):
    """The `Volume`s of one step of an `abstract.Run`, equal ones added up; empty on one chip."""
    found = {}
    for v in (*_weights(run), *_update(run), *_activations(run), *_experts(run), *_sequence(run), *_stages(run)):
        key = v.axes, v.collective, v.calls, v.layer, v.phase
        if v.axes and v.bytes:
            size, pieces = found.get(key, (0.0, 0))
            found[key] = size + v.bytes, pieces + 1
    return tuple(Volume(a, c, size, n, layer, phase, pieces) for (a, c, n, layer, phase), (size, pieces) in found.items())


def label(part):
    """The layer kind of a mixer or channel mixer, as operations are labelled."""
    return part.cls.__name__.lower()


def calls(run):
    """How often the layers of one chip run in a step: micro-batches, or ticks of the pipeline's rounds."""
    if run.stages == 1:
        return run.micro_batches
    return pipeline.schedule(run.stages, run.micro_batches, run.options.rounds).ticks


def in_a_call(run, repeats):
    """How many of a segment's repeats a chip runs at each of the `calls`: all, or those of one stage and round."""
    return max(1, repeats // (run.stages * (run.options.rounds if run.stages > 1 else 1)))


def asynchronous(run):
    """Whether the program runs its gathers beside other work."""
    return run.topology.chip.name not in ASYNC_CHIPS or bool(run.config.train.compiler_options.get(ASYNC))


def recomputes(run, name):
    """Whether the backward pass runs again what makes the value of this name (of `config.SAVEABLE`)."""
    remat = run.config.model.remat
    if (names := named_remat(remat)) is None:
        return remat == "full" or remat != "none" and name in ("kernel", "dispatch")
    return name not in (*names[0], *names[1])


def _weights(run):
    """Gathers of weights, and sums or scatters of their gradients."""
    c, rows = run.config.model, run.over("batch", "seq")
    compute, state = jnp.dtype(c.compute_dtype).itemsize, run.model.state.params
    for path, array in state.items():
        sharding, info, place = run.shardings.params[path], run.model.infos[path], PLACE.match(path)
        split = tuple(a for part in sharding.spec for a in axes.as_tuple(part) if run.sizes[a] > 1)
        experts = "expert" in info.batch_dims
        stay = run.over("expert") if experts and travels(run) else ()  # their tokens come to them
        gathered = tuple(a for a in split if a in rows and a not in stay)
        summed = tuple(a for a in rows if a not in split)
        layer, held, each_call = _owner(run, place, path), 1, 1
        if place:
            _, _, repeats = run.model.segments[int(place[1])]
            held, each_call = max(1, repeats // run.stages), in_a_call(run, repeats)
        each = math.prod(sharding.shard_shape(array.shape)) // held
        g = run.size(gathered)
        times = each_call * calls(run)
        if place is None and "vocab" in info.dim_names:
            yield from _table(run, path, each, gathered, summed)
            continue
        # What makes a mixer's result again comes long before its gradients, and its weights are gathered for each where that runs in the
        # background; those of a channel mixer, and all that are waited for, are gathered once for both.
        again = place and place[3] == "mixer" and run.config.model.remat != "none" and recomputes(run, "embed") and asynchronous(run)
        for phase in ("forward", *(("recomputed",) if again else ()), "backward"):
            yield Volume(gathered, "all-gather", each * compute * (g - 1), times, layer, phase)
        if gathered and place and info.is_matrix and not experts and run.options.gradient_sum == "ring":
            yield from _rings(run, path, each * compute, gathered, summed, times, layer)
            continue
        if experts and "embed" in info.dim_names and scatter.parsed(run.options.gradient_rings, run.sizes):
            rings = scatter.checked(run.options.gradient_rings, [a for a in gathered if a not in run.over("expert")], run.sizes)
            yield from _scattered(run, rings, each * compute * g, times, layer)
            continue
        # Inside their shard_map XLA scatters the sums of the matrices that rows enter, and not of those that they leave.
        whole = bool(stay) and "expert_mlp" in info.in_dims
        yield from _gradients(run, each * compute, gathered, summed, times, layer, whole)


def _scattered(run, rings, whole, times, layer):
    """`parallel.scatter`: of a gradient of `whole` bytes every ring begins with an equal part and goes on with what the others left.

    Half of the ways sends once more than the ring has hops.
    """
    for first in range(len(rings)):
        part = whole / len(rings)
        for ring in (*rings[first:], *rings[:first]):
            n = run.size(ring)
            yield Volume(ring, "collective-permute", part * (n - 0.5) / n, times, layer, "backward")
            part /= n


def _gradients(run, part, gathered, summed, times, layer, whole=False):
    """The sum of a weight's gradients over the rows, of which every chip keeps `part` bytes (all of it where nothing is gathered).

    Seen in programs for TPU v4: groups in at most two dims of the torus scatter. Over all three dims the gradient is summed whole, with
    ZeRO-1 over the replicas too. whole: it is not scattered anyway.
    """
    joint = gathered + summed if run.options.zero1 and "data" in summed else gathered
    over = tuple(a for a in axes.MESH_AXES if a in joint)
    g, r, n = run.size(gathered), run.size(summed), run.size(over)
    if gathered and run.platform == "tpu" and (whole or torus.dims(n, run.topology) == 3):
        yield Volume(over, "all-reduce", 2 * part * g * (n - 1) / n, times, layer, "backward")
        summed = tuple(a for a in summed if a not in over)
        r = run.size(summed)
    else:
        yield Volume(gathered, "reduce-scatter", part * (g - 1), times, layer, "backward")
    yield Volume(summed, "all-reduce", 2 * part * (r - 1) / r, times, layer, "backward")


def _rings(run, path, part, gathered, summed, times, layer):
    """`parallel.weight_ring`: as many hops as the first ring is long, then the sums over the other dims of the torus; of each in turn.

    Then the sums over replicas: with ZeRO-1 each keeps a part, which XLA scatters where it is one of the first dim, and cuts out elsewhere.
    """
    g, r = run.size(gathered), run.size(summed)
    dims, share = torus.rings(g, run.topology), 0.0
    for i in range(len(dims)):
        order = [*dims[i:], *dims[:i]]
        share += 1 + sum((order[j] - 1) / math.prod(order[: j + 1]) for j in range(1, len(order)))
    yield Volume(gathered, "collective-permute", part * g * share / len(dims), times, layer, "backward")
    if run.options.zero1 and "data" in summed:
        spec = axes.also_split(run.shardings.params[path], run.model.state.params[path].shape).spec
        split = next((d for d, names in enumerate(spec) if "data" in axes.as_tuple(names)), None)
        if split == (1 if run.model.infos[path].dim_names[0] == "layers" else 0):
            yield Volume(summed, "reduce-scatter", part * (r - 1) / r, times, layer, "backward")
            return
    yield Volume(summed, "all-reduce", 2 * part * (r - 1) / r, times, layer, "backward")


def _table(run, path, each, gathered, summed):
    """The embedding and the head: both uses of a tied table have a gradient, the lookup's in the compute dtype, the head's in float32."""
    c, m = run.config.model, run.micro_batches
    compute, g = jnp.dtype(c.compute_dtype).itemsize, run.size(gathered)
    tied, is_head = c.tie_embeddings, path == "head"
    slots = m if run.stages == 1 else -(-m // run.stages)
    # The lookup's copy is gathered once per step; the head's once per micro-batch, the same one where there is one micro-batch.
    gathers = slots if is_head else 1 + (slots if tied and slots > 1 else 0)
    yield Volume(gathered, "all-gather", each * compute * (g - 1), gathers, "head" if is_head else "embed", "forward")
    for layer, itemsize, used in (("embed", compute, not is_head), ("head", 4, is_head or tied)):
        if used and (run.stages > 1 or gathered and summed):  # of the whole table over all; each stage has micro-batches of its own
            over = tuple(a for a in axes.MESH_AXES if a in {*run.over("stage"), *gathered, *summed})
            n = run.size(over)
            yield Volume(over, "all-reduce", 2 * each * g * itemsize * (n - 1) / n, slots, layer, "backward")
        elif used:
            yield from _gradients(run, each * itemsize, gathered, summed, m, layer)


def _update(run):
    """ZeRO-1: every replica updates its part of the parameters, and they are gathered."""
    if not run.options.zero1 or run.sizes["data"] == 1:
        return
    n = run.sizes["data"]
    yield Volume(("data",), "all-gather", run.bytes("params") * (n - 1) / n, 1, "optimizer", "update")


def _activations(run):
    """Sums of [rows, time, D] over the axes that split weights but not rows."""
    c, rows = run.config.model, run.over("batch", "seq")
    compute = jnp.dtype(c.compute_dtype).itemsize
    whole = run.rows * run.time * c.d_model * compute
    for index, (start, period, repeats) in enumerate(run.model.segments):
        times = in_a_call(run, repeats) * calls(run) if repeats > 1 else run.micro_batches
        forward = []
        for place in range(period):
            kind = run.model.resolved.layers[start + place]
            for name in ("mixer", "channel"):
                into, out = _matrix_axes(run, f"segments.{index}.blocks.{place}.{name}.", rows)
                part = label(getattr(kind, name))
                forward += [(into, part)] if into and (name == "mixer" or run.stages > 1) else []
                yield from _sum(run, into, whole, times, part, "forward")
                yield from _sum(run, out, whole, times, part, "backward")
        if recomputes(run, "embed"):  # nobody needs the last one of a layer again, and in a pipeline of all layers of a tick
            for into, part in forward[:-1] if run.stages > 1 else forward:
                yield from _sum(run, into, whole, times, part, "recomputed")
    over = tuple(a for a in run.over("vocab") if a not in rows)
    if over and c.vocab_size % run.size(over) == 0:
        wide = jnp.dtype(c.param_dtype).itemsize / compute
        for layer, phase, size in (("embed", "forward", whole), ("embed", "backward", whole * wide), ("head", "backward", whole)):
            yield from _all_reduce(run, over, size, run.micro_batches, layer, phase)


def _matrix_axes(run, prefix, rows):
    """(axes over which results are partial sums, axes over which gradients of the input are) of the weights with this prefix."""
    into, out = set(), set()
    for path in run.model.state.params:
        if path.startswith(prefix):
            info, spec = run.model.infos[path], run.shardings.params[path].spec
            for dim, part in zip(info.dim_names, spec):
                mine = {a for a in axes.as_tuple(part) if a not in rows and run.sizes[a] > 1}
                if info.is_matrix and dim not in info.batch_dims:
                    (into if dim in info.in_dims else out).update(mine)
    return tuple(a for a in axes.MESH_AXES if a in into), tuple(a for a in axes.MESH_AXES if a in out)


def _sum(run, over, whole, times, layer, phase):
    """One sum of activations; with the residual stream split over the same axes (arXiv:2205.05198) a scatter and a gather."""
    if not over or set(over) <= set(run.over("res_seq")):
        n = run.size(over)
        for collective in ("reduce-scatter", "all-gather"):
            yield Volume(over, collective, whole * (n - 1) / n, times, layer, phase)
    else:
        yield from _all_reduce(run, over, whole, times, layer, phase)


def _all_reduce(run, over, whole, times, layer, phase):
    n = run.size(over)
    yield Volume(over, "all-reduce", 2 * whole * (n - 1) / n, times, layer, phase)


def travels(run):
    """Whether tokens go to experts of other chips (else the weights come to the tokens)."""
    return bool(run.over("expert")) and run.options.experts != "gather"


def way(run, config):
    """The `travel.Way` of tokens to the experts of a MoE's Config; None where no token travels."""
    over = run.over("expert")
    if not travels(run):
        return None
    form = run.options.experts if run.options.experts != "auto" else "padded" if run.platform == "cpu" else "ragged"
    limit = config.capacity_factor and capacity(config, run.config.seq_len)
    return travel.way(
        form, over, (run.rows, run.time), config.top_k, config.num_experts, run.size(over),
        groups=(config.groups, config.top_groups), capacity=limit, recv_bound=run.options.recv_bound,
    )  # fmt: skip


def _experts(run):
    """Rows to their experts, with their weights, and back, the gradients of all that, and the counts of rows.

    What a backward pass needs again is what arrived at the experts (`parallel.expert`).
    """
    over, c = run.over("expert"), run.config.model
    for part, times in parts(run, "channel"):
        found = way(run, part.config) if part.cls.reports_load else None
        if found is None:
            continue
        n, k, tokens = run.size(over), part.config.top_k, run.rows * run.time
        padded, copies = found.form == "padded", found.copies or k
        token = (n * found.arriving if padded else tokens * copies) * c.d_model * jnp.dtype(c.compute_dtype).itemsize
        carried = (n * found.rows if padded else tokens * k) * 4 * travel.LANES
        counts = 4 * (part.config.num_experts + (n if found.once else 0)) * (n - 1)
        kind, again = "all-to-all" if padded else "ragged-all-to-all", recomputes(run, "dispatch")
        for phase, each in (("forward", 2 * token + carried), ("recomputed", again * (token + carried)), ("backward", 2 * token + carried)):
            yield Volume(over, kind, each * (n - 1) / n, times, label(part), phase)
            if phase == "forward" or phase == "recomputed" and run.config.model.remat != "none":
                yield Volume(over, "all-to-all", counts, times, label(part), phase)


def _sequence(run):
    """What mixers send over a split sequence: keys and values where the state grows with the length, else the state."""
    over, c = run.over("seq"), run.config.model
    if not over:
        return
    compute, n = jnp.dtype(c.compute_dtype).itemsize, run.size(over)
    for part, times in parts(run, "mixer"):
        again = ("recomputed",) if recomputes(run, "kernel") else ()
        sent = keys(run, part)
        if not sent:
            state = run.rows * _state_bytes(run, part, 1) / run.size(run.over("act_heads"))
            stretches = layouts.runs(run.options.layout) or 1
            form = run.options.states if run.options.states != "auto" else "ring" if n <= LARGEST_RING else "log"
            hops = n - 1 if form == "ring" else 1 + math.ceil(math.log2(max(1, n - 1)))
            messages = stretches * (1 if part.cls.neighbours_only else hops)
            for phase in ("forward", *again, "backward"):
                yield Volume(over, "collective-permute", messages * state, times, label(part), phase)
            continue
        if run.options.attention == "ring":
            hops = len(layouts.shifts(run.options.layout, run.config.seq_len, n, getattr(part.config, "window", None))) - 1
            for phase, share in (("forward", 1.0), *((p, 1.0) for p in again), ("backward", 1.0 + 4 / compute)):
                yield Volume(over, "collective-permute", hops * sent * share, times, label(part), phase)
        else:
            for phase in ("forward", *again):
                yield Volume(over, "all-gather", sent * (n - 1), times, label(part), phase)
            yield Volume(over, "reduce-scatter", sent * (n - 1), times, label(part), "backward")


def keys(run, part):
    """Bytes of one chip's keys and values (and their documents), of a mixer whose state grows with the length; 0 of any other."""
    one, two = (_state_bytes(run, part, length) for length in (1, 2))
    return run.rows * run.time * (two - one) / run.size(run.over("act_heads"))


def _state_bytes(run, part, length):
    itemsize = jnp.dtype(run.config.model.compute_dtype).itemsize
    return part.cls.cost(part.config, run.model.resolved.env, length, itemsize).state_bytes


def _stages(run):
    """A tick's result to the next stage, and the two queues of micro-batches that move by one."""
    over = run.over("stage")
    if not over:
        return
    c = run.config.model
    one = run.rows * run.time * c.d_model * jnp.dtype(c.compute_dtype).itemsize * run.size(run.over("seq")) / run.size(run.over("res_seq"))
    compute, moved = jnp.dtype(c.compute_dtype).itemsize, run.options.rounds > 1  # layers to the stage of their round, gradients back
    for phase in ("forward", "backward"):
        yield Volume(over, "collective-permute", 3 * one, calls(run), "", phase)
        for path, array in run.model.state.params.items():
            place = PLACE.match(path) if moved else None
            if place and run.model.segments[int(place[1])][2] > 1:
                local = math.prod(run.shardings.params[path].shard_shape(array.shape))
                yield Volume(over, "collective-permute", local * (compute if phase == "forward" else array.dtype.itemsize), 1, "", phase)


def parts(run, name):
    """(part, how often it runs in a step) of every place in every period, and of the modules that predict further tokens."""
    for start, period, repeats in run.model.segments:
        times = in_a_call(run, repeats) * calls(run) if repeats > 1 else run.micro_batches
        for place in range(period):
            yield getattr(run.model.resolved.layers[start + place], name), times
    modules = mtp.check(run.config.model.mtp).depth
    if modules:
        yield getattr(run.model.resolved.ahead, name), modules * run.micro_batches


def _owner(run, place, path):
    if place is None:
        return path if path in ("embed", "head") else "mtp" if path.startswith("mtp.") else "norm"
    start, _, _ = run.model.segments[int(place[1])]
    return label(getattr(run.model.resolved.layers[start + int(place[2])], place[3]))

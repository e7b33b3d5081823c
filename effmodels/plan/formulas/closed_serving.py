"""Prefill and decode without compiling: the parameters under the decoding rules, the state, FLOPs by `cost`, bytes read per token."""
import dataclasses
import math

import jax
import jax.numpy as jnp

from effmodels.decode.weights import read_as
from effmodels.mixers.caches import Slots
from effmodels.parallel import axes, travel
from effmodels.plan.formulas import decoding, torus, volumes
from effmodels.plan.records import Memory, Operation
from effmodels.train import placement

PREFILL = 0.6  # of the peak: matmuls and kernels together
DECODE = 0.8  # of the memory's bandwidth: weights and states are read once per token
BASIS = "closed form"


def price(run, what):
    """(`Memory`, `Operation`s, model FLOPs of all chips, notes) of one call for batch_size sequences of seq_len tokens."""
    served, chip, c = _served(run), run.topology.chip, run.config
    rows = served.parts("batch")
    parameters, rate = served.bytes("params"), jnp.dtype(c.model.compute_dtype).itemsize
    held = decoding.state(c.model, c.batch_size, c.seq_len)
    state = decoding.local_bytes(held, served.sizes, served.rules)
    tokens = c.seq_len if what == "prefill" else 1
    flops = (run.cost.prefill_flops_per_token if what == "prefill" else run.cost.decode_flops_per_token) * tokens * c.batch_size
    stream = c.batch_size / rows * tokens * c.model.d_model * rate
    memory = Memory(
        available=chip.hbm, parameters=parameters, buffers=served.bytes("buffers"), activations=state,
        temporaries=int(6 * stream), program=0,
    )  # fmt: skip
    # Of the embedding single rows are read. What is cut out is read twice; the copy in between lies on the chip of a v4.
    embed = served.model.state.params["embed"]
    looked_up = 0 if c.model.tie_embeddings else math.prod(served.shardings.params["embed"].shard_shape(embed.shape)) * embed.dtype.itemsize
    read = parameters - looked_up + (state if what == "decode" else 0) + _cut_out(served, held if what == "decode" else None)
    work = flops / run.chips / (chip.flops * PREFILL)
    seconds = work if what == "prefill" else max(work, read / (chip.bandwidth * DECODE))
    kind = "matmul" if what == "prefill" or seconds == work else "memory"
    each = flops / run.chips
    found = [Operation(name="layers", kind=kind, calls=1, seconds=seconds, basis=BASIS, flops=each, bytes=read, phase="forward")]
    for over, collective, size in _travel(served, stream, rate):
        wire = size / torus.bandwidth(over, run, collective)
        found.append(Operation(
            name=collective, kind="collective", calls=1, seconds=wire, basis=BASIS, exposed=wire, bytes=size, axes=over,
            collective=collective, phase="forward",
        ))  # fmt: skip
    return memory, tuple(found), flops, list(decoding.notes(held, served.sizes, served.rules))


def _served(run):
    """The run under the decoding rules, its parameters in the types in which decoding reads them."""
    rules, types = axes.decode_rules(run.rules), read_as(run.config.model)
    mesh = jax.tree.leaves(run.shardings)[0].mesh
    params = {path: jax.ShapeDtypeStruct(a.shape, types.get(path, a.dtype)) for path, a in run.model.state.params.items()}
    model = dataclasses.replace(run.model, state=dataclasses.replace(run.model.state, params=params))
    shardings = placement.state_shardings(model.state, model.infos, mesh, rules, False)
    return dataclasses.replace(run, rules=rules, model=model, shardings=shardings)


def _cut_out(run, held):
    """Bytes that a scan over layers copies from its stacks for a kernel, which reads whole arrays only: experts' matrices, and caches."""
    repeats, total = [repeats for _, _, repeats in run.model.segments], 0
    for path, array in run.model.state.params.items():
        place, info = volumes.PLACE.match(path), run.model.infos[path]
        if place and repeats[int(place[1])] > 1 and "expert" in info.batch_dims and info.in_dims:
            total += math.prod(run.shardings.params[path].shard_shape(array.shape)) * array.dtype.itemsize
    segments = zip(repeats, held.layers if held else ())
    caches = [state for n, states in segments if n > 1 for state in states if isinstance(state, Slots)]
    return total + decoding.local_bytes(caches, run.sizes, run.rules)


def _travel(run, stream, itemsize):
    """(axes, collective, bytes that one chip sends): weights over the axes that split rows too, sums of activations over the others."""
    rows = run.over("batch")
    gathered = {}
    for path, sharding in run.shardings.params.items():
        split = tuple(a for part in sharding.spec for a in axes.as_tuple(part) if run.sizes[a] > 1)
        over = tuple(a for a in split if a in rows and a not in run.over("expert"))
        if over:
            local = math.prod(sharding.shard_shape(run.model.state.params[path].shape))
            gathered[over] = gathered.get(over, 0) + local * itemsize * (run.size(over) - 1)
    yield from ((over, "all-gather", size) for over, size in gathered.items())
    tensor, layers = run.over("act_heads"), run.model.resolved.layers
    if tensor:  # of every mixer, channel mixer, and shared expert; of the lookup in a table whose vocabulary is split
        mixtures = [kind.channel for kind in layers if kind.channel.cls.reports_load]
        shared = sum(bool(getattr(part.config, "shared_experts", 0)) for part in mixtures)
        sums = 2 * len(layers) + shared + bool(run.over("vocab"))
        yield tensor, "all-reduce", 2 * sums * stream * (run.size(tensor) - 1) / run.size(tensor)
    if volumes.travels(run):
        yield from _exchanged(run, stream, [kind.channel for kind in layers if kind.channel.cls.reports_load])


def _exchanged(run, stream, mixtures):
    """Rows to their experts with their weights, back, and the counts of rows."""
    over, n = run.over("expert"), run.size(run.over("expert"))
    padded = run.options.experts == "padded" or run.options.experts == "auto" and run.platform == "cpu"
    tokens, width = stream // run.config.model.d_model // jnp.dtype(run.config.model.compute_dtype).itemsize, run.config.model.d_model
    for part in mixtures:
        c = part.config
        way = travel.way("", over, (int(tokens), 1), c.top_k, c.num_experts, n, groups=(c.groups, c.top_groups))
        rows, carried = (n * way.arriving, n * way.rows) if padded else (tokens * (way.copies or c.top_k), tokens * c.top_k)
        sent = rows * 2 * width * jnp.dtype(run.config.model.compute_dtype).itemsize + carried * 4 * travel.LANES
        yield over, "all-to-all" if padded else "ragged-all-to-all", sent * (n - 1) / n
        yield over, "all-to-all", 4 * (c.num_experts + (n if way.once else 0)) * (n - 1)

"""A decoder whose largest segment is spread over the stages of a pipeline: what runs before it, in it and after it, per micro-batch.

Letters: M micro-batches, K = ceil(M / p) per stage, s one of p stages, B batch, T time, D model.
"""
import jax
import jax.numpy as jnp
import numpy as np

from effmodels.config import ConfigError
from effmodels.layers.context import Ctx
from effmodels.parallel import options, pipeline
from effmodels.parallel.axes import shards


def stages():
    """How many stages the mesh in force has; 1 without one."""
    return shards("stage")


def forward(model, tokens_MBT, fields, tail, tail_arrays=(), **static):
    """(tail's results [K, p, ...], which micro-batch each is as numpy [K, p], LayerAux of every segment summed over micro-batches).

    fields: the batched fields of Ctx, each with leading dim M, or None; static: its other fields. tail(x_BTD, ctx, *tail_arrays of the
    micro-batch) runs behind the last layer; entries of micro-batch -1 are of a copy and count nowhere.
    """
    runs = [(s.start, s.period, s.repeats) for s in model.segments]
    split = pipeline.choose(runs, stages(), options.current().rounds)
    plan = pipeline.schedule(stages(), tokens_MBT.shape[0], options.current().rounds)
    fields = {name: value for name, value in fields.items() if value is not None}

    def ctx_of(micro):
        return Ctx(**jax.tree.map(lambda a: a[micro], fields), **static)

    def before(tokens_BT, one):
        ctx = Ctx(**one, **static)
        return _run(model.segments[:split], model._embed(tokens_BT, ctx), ctx, model.shared)

    def after(x_BTD, one, rest):
        ctx = Ctx(**one, **static)
        x_BTD, auxes = _run(model.segments[split + 1 :], x_BTD, ctx, model.shared)
        return tail(x_BTD, ctx, *rest), auxes

    x_KsBTD, first = pipeline.over_stages(before, plan.entering_Ks, tokens_MBT, fields)
    x_KsBTD, middle = model.segments[split].pipelined(x_KsBTD, plan, ctx_of, model.shared)
    out, last = pipeline.over_stages(after, plan.leaving_Ks, fields, tail_arrays, placed=(x_KsBTD,))
    once_Ks = np.arange(plan.slots * plan.stages).reshape(plan.stages, plan.slots).T < plan.micro_batches
    auxes = [*total(first, once_Ks), middle, *total(last, plan.leaving_Ks >= 0)]
    return out, plan.leaving_Ks, auxes


def total(tree, counted_Ks):
    """Leaves [K, p, ...] summed over the micro-batches that count."""

    def of(a):
        return jnp.sum(jnp.where(counted_Ks.reshape(*counted_Ks.shape, *(1,) * (a.ndim - 2)), a, 0), axis=(0, 1))

    return jax.tree.map(of, tree)


def rows_as_micro_batches(batch, limit):
    """The batch as arrays [M, B / M, T], rows dealt out so that every device keeps its own; M <= limit, as large as the rows allow."""
    whole = jax.tree.leaves(batch)[0].shape[0]
    if whole % shards("batch"):
        raise ConfigError(f"pipeline: {whole} rows cannot be split over {shards('batch')} devices (rules.batch); give a multiple of that.")
    rows = whole // shards("batch")
    count = max(m for m in range(1, rows + 1) if rows % m == 0 and m <= max(1, limit))
    return {n: jnp.swapaxes(a.reshape(a.shape[0] // count, count, *a.shape[1:]), 0, 1) for n, a in batch.items()}


def _run(segments, x_BTD, ctx, shared):
    auxes = []
    for segment in segments:
        x_BTD, aux = segment(x_BTD, ctx, shared)
        auxes.append(aux)
    return x_BTD, tuple(auxes)

"""A run's state without devices: which arrays there are, and how many bytes of them lie on one chip of a mesh given by its sizes."""
import dataclasses
import functools
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from effmodels.models import Decoder, cost
from effmodels.models import state as model_state
from effmodels.models.resolve import resolve
from effmodels.parallel import axes, mesh, options, pipeline
from effmodels.train import optim, placement, schedules, step
from effmodels.train.run_config import RunConfig, jsonable


@dataclasses.dataclass(frozen=True)
class Model:
    """A model and its optimiser as shapes. segments: (start, period, repeats) of every run of layers; infos: path -> ParamInfo."""

    resolved: Any
    state: Any  # TrainState of ShapeDtypeStructs
    infos: dict
    segments: tuple


@dataclasses.dataclass(frozen=True)
class Run:
    """A checked RunConfig on a mesh of sizes. rows: of one chip's micro-batch; time: tokens of one row on one chip."""

    config: RunConfig
    model: Model
    cost: Any  # ModelCost at seq_len
    topology: Any  # topology.Topology
    sizes: dict
    rules: tuple
    options: options.Options
    micro_batch: int
    shardings: Any

    @property
    def platform(self):
        return self.topology.platform

    @property
    def chips(self):
        return self.topology.chips

    @property
    def micro_batches(self):
        return self.config.batch_size // self.micro_batch

    @property
    def rows(self):
        return self.micro_batch // self.parts("batch")

    @property
    def time(self):
        return self.config.seq_len // self.parts("seq")

    @property
    def stages(self):
        return self.parts("stage")

    def parts(self, dim):
        """Into how many pieces a dim is split."""
        return axes.parts(dim, self.sizes, self.rules)

    def over(self, *dims):
        """The mesh axes larger than 1 that split any of these dims, in the order of the mesh."""
        wanted = {a for dim in dims for a in axes.as_tuple(dict(self.rules)[dim])}
        return tuple(a for a in axes.MESH_AXES if a in wanted and self.sizes[a] > 1)

    def size(self, names):
        """The product of the sizes of mesh axes."""
        return math.prod(self.sizes[a] for a in names)

    def bytes(self, part, itemsize=None):
        """Bytes on one chip of `params`, `opt_state` or `buffers`; itemsize: as if every value had so many."""
        leaves = zip(jax.tree.leaves(getattr(self.model.state, part)), jax.tree.leaves(getattr(self.shardings, part)))
        return sum(math.prod(s.shard_shape(a.shape)) * (itemsize or jnp.dtype(a.dtype).itemsize) for a, s in leaves)


def run(config, topology, mesh_config=None):
    """The `Run` of a config (mapping) on a `Topology`; mesh_config: axis sizes instead of the config's.

    Raises ConfigError as training does.
    """
    c = RunConfig.from_mapping(config, topology.platform)
    if mesh_config is not None:
        c = dataclasses.replace(c, mesh=dict(mesh_config))
    return place(c, topology)


def place(c, topology):
    """`run` of a RunConfig."""
    sizes, rules = c.mesh_sizes(topology.chips), axes.make_rules(c.rules)
    if topology.slices > 1:
        mesh.across_slices(sizes, topology.slices)
    lengths = schedules.LengthStages(c.seq_len, c.train.length_stages)
    chosen = placement.resolve_options(c, [s.seq_len for s in lengths.stages], axes.parts("seq", sizes, rules))
    shapes = model(c)
    if axes.parts("stage", sizes, rules) > 1:
        pipeline.choose(shapes.segments, axes.parts("stage", sizes, rules), chosen.rounds)
    cost_ = _cost(c.model, c.seq_len)
    micro = c.train.micro_batch_size or placement.auto_micro_batch(c, sizes, rules, topology.platform, cost_.params)
    where = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    shardings = placement.state_shardings(shapes.state, shapes.infos, where, rules, chosen.zero1)
    return Run(c, shapes, cost_, topology, sizes, rules, chosen, micro, shardings)


_cost = functools.lru_cache(64)(cost)


def model(c):
    """The Model of a RunConfig; the same object for every mesh."""
    # No array depends on what is recomputed.
    return _shapes(dataclasses.replace(c.model, remat="none"), json.dumps(jsonable(c.optim), sort_keys=True, default=str), c.steps)


@functools.lru_cache(16)
def _shapes(model_config, optim_text, steps):
    key = jax.random.key(0, impl="threefry2x32")

    def build(key):
        return Decoder(model_config, rngs=nnx.Rngs(key))

    model = nnx.eval_shape(build, key)
    _, params, buffers = model_state.split(model)
    infos, shapes = model_state.info(model), {p: a.shape for p, a in params.items()}
    optimizer = optim.make_optimizer(json.loads(optim_text), {p: infos[p] for p in shapes}, shapes, steps)
    opt_state = jax.eval_shape(optimizer.init, params)
    state = step.TrainState(step=jax.ShapeDtypeStruct((), jnp.int32), params=params, buffers=buffers, opt_state=opt_state)
    return Model(resolve(model_config), state, infos, tuple((s.start, s.period, s.repeats) for s in model.segments))

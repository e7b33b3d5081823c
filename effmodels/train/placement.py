"""What a run decides from the sizes of its mesh, without a device: micro-batch, layout of rows, where every array of its state lies."""
import dataclasses

import jax
from jax.sharding import NamedSharding, PartitionSpec

from effmodels.config import ConfigError
from effmodels.layers.param import ParamInfo
from effmodels.models.resolve import resolve
from effmodels.parallel import axes, layouts
from effmodels.train import optim
from effmodels.train.state import TrainState

# Tokens per device in one micro-batch where the config leaves the choice: enough rows for the matmuls, few enough to fit.
MICRO_TOKENS = {"cpu": 8192, "tpu": 16_384, "gpu": 16_384}
LARGE_MODEL = 2e8  # parameters above which a CPU takes MICRO_TOKENS_LARGE at a time
MICRO_TOKENS_LARGE = 2048
MICRO_BATCHES_PER_STAGE = 4  # where the config leaves the choice: at most a fifth of a pipeline's slots is without work


def auto_micro_batch(config, sizes, rules, platform, params):
    """Sequences of one micro-batch of a RunConfig whose model has `params` values; ConfigError when the rows do not divide."""
    rows, stages = axes.parts("batch", sizes, rules), axes.parts("stage", sizes, rules)
    large = platform == "cpu" and params > LARGE_MODEL
    tokens = MICRO_TOKENS_LARGE if large else MICRO_TOKENS.get(platform, MICRO_TOKENS["gpu"])
    most = max(rows, tokens // config.seq_len * rows)
    batches = [b for _, b in config.train.batch_ramp] or [config.batch_size]
    if stages > 1:  # enough micro-batches to keep the stages busy
        most = max(rows, min(most, *(b // (MICRO_BATCHES_PER_STAGE * stages) for b in batches)))
    fitting = [n for n in range(rows, most + 1, rows) if all(b % n == 0 for b in batches)]
    if not fitting:
        raise ConfigError(f"config: batch sizes {batches} do not divide by the {rows} devices that rules.batch splits rows over.")
    return fitting[-1]


def resolve_options(config, lengths, pieces):
    """The `parallel` options with the layout chosen; ConfigError when a row does not divide or a mixer cannot follow it.

    lengths: sequence lengths of the run; pieces: into how many a row is split.
    """
    if pieces == 1:
        return dataclasses.replace(config.parallel, layout="contiguous")
    mixers = [kind.mixer for kind in resolve(config.model).layers]
    allowed = [name for name in layouts.LAYOUTS if all(name in m.cls.layouts for m in mixers)]
    layout = config.parallel.layout
    if layout == "auto":
        windows = tuple(m.config.window for m in mixers if hasattr(m.config, "window"))
        layout = layouts.choose(windows, lengths, pieces, allowed)
    if layout not in allowed:
        refusing = sorted({m.name for m in mixers if layout not in m.cls.layouts})
        raise ConfigError(
            f"config.parallel.layout={layout!r}: the mixers {', '.join(refusing)} are not right in that order (what passes a state "
            f"from token to token needs neighbours on one device). Use one of {', '.join(allowed)}."
        )
    for length in lengths:
        layouts.order(layout, length, pieces)
    return dataclasses.replace(config.parallel, layout=layout)


def state_shardings(state, infos, mesh, rules, zero1):
    """The NamedSharding of every leaf of an abstract TrainState on a (perhaps abstract) mesh. infos: path -> ParamInfo."""
    shapes = {p: a.shape for p, a in state.params.items()}

    def of(info, a, name):
        return axes.parameter_sharding(a.shape, info, mesh=mesh, rules=rules, name=name)

    params = {p: of(infos[p], a, p) for p, a in state.params.items()}
    buffers = {p: of(infos[p], a, p) for p, a in state.buffers.items()}
    names = optim.state_dim_names(state.opt_state, {p: infos[p] for p in shapes}, shapes)
    leaves, tree = jax.tree.flatten(state.opt_state)
    placed = [of(ParamInfo(tuple(n)), a, "optimiser state") for n, a in zip(tree.flatten_up_to(names), leaves)]
    if zero1:
        placed = [axes.also_split(place, a.shape) for place, a in zip(placed, leaves)]
    return TrainState(step=NamedSharding(mesh, PartitionSpec()), params=params, buffers=buffers, opt_state=tree.unflatten(placed))

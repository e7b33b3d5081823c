"""The settings that a search tries: meshes, rules, micro-batches, the optimiser's sharding and dtypes, rounds of a pipeline.

A setting is a `RunConfig` with another mesh, other rules and other options than the one asked about; `overrides` says what to type for it.
"""
import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
from flax.core import freeze

from effmodels.parallel import axes
from effmodels.plan.formulas import abstract
from effmodels.plan.formulas.volumes import ASYNC, ASYNC_CHIPS

LARGEST_TENSOR = 16
LONG_ROWS = 32_768  # tokens from which on a split sequence is tried unasked
SHORTEST_PIECE = 1024  # tokens of a split sequence
DEEP_PIPELINE = 512  # chips from which on stages are tried unasked
MICRO_TOKENS = 65_536  # of one chip and micro-batch, at most
ROUNDS = (1, 2, 4)
HALVES_MOMENTS = ("adamw", "adam", "lion")


def mesh_shapes(c, chips, wide=False):
    """{axis: size} of every mesh worth a plan for a RunConfig, those with the least splitting of single layers first.

    wide: also split sequences and stages where rows are short and chips few, for what does not fit otherwise.
    """
    rules, layers = axes.make_rules(c.rules), abstract.model(c)

    def divide(axis):
        """The divisors of `chips` by which every dim that the rules split over this axis divides."""
        sizes = {n for p, a in layers.state.params.items() for d, n in zip(layers.infos[p].dim_names, a.shape)
                 if d not in (None, "vocab") and axis in axes.as_tuple(dict(rules)[d])}  # fmt: skip
        return [n for n in _divisors(chips) if n == 1 or sizes and all(size % n == 0 for size in sizes)]

    few_rows = chips > c.batch_size
    long = wide or few_rows or c.seq_len >= LONG_ROWS or _asked(c, "seq")
    deep = wide or chips >= DEEP_PIPELINE or _asked(c, "stage")
    repeats = max(r for _, _, r in layers.segments)
    limits = {
        "tensor": [n for n in divide("tensor") if n <= LARGEST_TENSOR],
        "expert": divide("expert"),
        "seq": [n for n in _divisors(chips) if n == 1 or long and c.seq_len % (2 * n) == 0 and c.seq_len // n >= SHORTEST_PIECE],
        "stage": [n for n in _divisors(chips) if n == 1 or deep and repeats % n == 0],
    }
    fsdp_sizes = divide("fsdp")
    found = []
    for tensor, expert, seq, stage in itertools.product(*limits.values()):
        rest, used = divmod(chips, tensor * expert * seq * stage)
        if used or not rest:
            continue
        for fsdp in fsdp_sizes:
            if rest % fsdp == 0 and c.batch_size % (rest * expert) == 0:
                found.append({"data": rest // fsdp, "fsdp": fsdp, "seq": seq, "tensor": tensor, "expert": expert, "stage": stage})
    # The most promising first, in case the time does not suffice: no replicas of a large state, little splitting of layers.
    return sorted(found, key=lambda m: (m["stage"], m["tensor"] * m["seq"], m["expert"], m["data"]))


def placed(c, place, share, wide=False):
    """RunConfigs on every mesh of a Topology with every table of rules, whose state alone takes at most this share of the memory.

    Of meshes that differ in `data` and `fsdp` only: the one with the most of fsdp, and the one with the least that leaves half of the
    memory to the rest.
    """
    c, groups = asynchronous(c, place), {}
    for mesh in mesh_shapes(c, place.chips, wide):
        for one in _with_rules(dataclasses.replace(c, mesh=mesh)):
            held = state_bytes(one) / place.chip.hbm if place.chip.hbm else 0.0
            if held <= share:
                key = *(mesh[a] for a in ("stage", "tensor", "seq", "expert")), str(one.rules)
                groups.setdefault(key, []).append((held, one))
    chosen = []
    for found in groups.values():
        roomy = [one for held, one in found if held <= share / 2] or [one for _, one in found]
        chosen += [min(roomy, key=lambda one: one.mesh["fsdp"]), max((one for _, one in found), key=lambda one: one.mesh["fsdp"])]
    return list({(str(one.mesh), str(one.rules)): one for one in chosen}.values())


def state_bytes(c):
    """Bytes of the parameters and of the optimiser's state on one chip of a RunConfig with a whole mesh, ZeRO-1 where there are replicas.

    A little less than `Run.bytes`: what does not divide is taken as split.
    """
    layers, rules = abstract.model(c), dict(axes.make_rules(c.rules))
    held = total = 0
    for path, a in layers.state.params.items():
        over = {x for d in layers.infos[path].dim_names if d for x in axes.as_tuple(rules.get(d))}
        size = a.size * jnp.dtype(a.dtype).itemsize
        total, held = total + size, held + size / math.prod(c.mesh.get(x, 1) for x in over)
    moments = sum(a.size * jnp.dtype(a.dtype).itemsize for a in jax.tree.leaves(layers.state.opt_state)) / total
    return held * (1 + moments / c.mesh.get("data", 1))


def lean(c):
    """The same mesh at its least memory."""
    rows = axes.parts("batch", c.mesh, axes.make_rules(c.rules))
    return _with(c, remat="full", micro=rows, zero1=c.mesh["data"] > 1, rounds=1)


def settings(c, remat):
    """What one mesh and table of rules allows under one remat policy."""
    sizes = c.mesh
    rows = axes.parts("batch", sizes, axes.make_rules(c.rules))
    micros = [m for m in _doublings(rows, c.batch_size) if c.batch_size % m == 0 and m // rows * c.seq_len // sizes["seq"] <= MICRO_TOKENS]
    zeros = (False, True) if sizes["data"] > 1 else (False,)
    repeats = max(r for _, _, r in abstract.model(c).segments)
    rounds = [n for n in ROUNDS if repeats % (n * sizes["stage"]) == 0] if sizes["stage"] > 1 else [1]
    for micro, zero1, number in itertools.product(micros or [rows], zeros, rounds):
        yield _with(c, remat=remat, micro=micro, zero1=zero1, rounds=number)


def half_precision(c):
    """With sums of gradients, and the first moment where the optimiser has one, in bfloat16: this changes the arithmetic."""
    optim = dict(c.optim)
    if optim.get("name") in HALVES_MOMENTS:
        optim["options"] = {**(optim.get("options") or {}), "mu_dtype": "bfloat16"}
    return dataclasses.replace(c, optim=optim, train=dataclasses.replace(c.train, accumulate_dtype="bfloat16"))


def ringed(c):
    """With gradients of projections summed by permutes beside the work, where there is anything to scatter."""
    if c.mesh["fsdp"] == 1:
        return c
    return dataclasses.replace(c, parallel=dataclasses.replace(c.parallel, gradient_sum="ring"))


def asynchronous(c, place):
    """With weights gathered beside the layers' work, on chips whose compiler needs an option for that."""
    if place.chip.name not in ASYNC_CHIPS or ASYNC in c.train.compiler_options:
        return c
    return dataclasses.replace(c, train=dataclasses.replace(c.train, compiler_options=freeze({**c.train.compiler_options, ASYNC: True})))


def overrides(before, after):
    """{dotted field: value} that turn one RunConfig into the other; the whole mesh is always said."""
    found = {f"mesh.{axis}": size for axis, size in after.mesh.items() if size > 1 or _asked(before, axis)}
    found |= {f"rules.{dim}": ",".join(axes.as_tuple(v)) for dim, v in after.rules.items() if before.rules.get(dim) != v}
    pairs = {
        "train.remat": (before.train.remat, after.train.remat),
        "train.micro_batch_size": (before.train.micro_batch_size, after.train.micro_batch_size),
        "train.accumulate_dtype": (before.train.accumulate_dtype, after.train.accumulate_dtype),
        "train.compiler_options": (_text(before.train.compiler_options), _text(after.train.compiler_options)),
        "parallel.zero1": (before.parallel.zero1, after.parallel.zero1),
        "parallel.rounds": (before.parallel.rounds, after.parallel.rounds),
        "parallel.gradient_sum": (before.parallel.gradient_sum, after.parallel.gradient_sum),
        "optim.options": (dict(before.optim.get("options") or {}), dict(after.optim.get("options") or {})),
    }
    return found | {name: new for name, (old, new) in pairs.items() if new != old}


def _with_rules(c):
    """The config's own rules; where rows or experts have axes of their own, also weights split over those."""
    base = axes.as_tuple(dict(axes.make_rules(c.rules))["embed"])
    free = [a for a in ("seq", "expert") if c.mesh[a] > 1 and a not in base]
    yield c
    for more in (free[:k] for k in range(1, len(free) + 1)):
        rules = c.rules | {"embed": (*base, *more)}
        if "expert" in more:  # of experts' weights the expert dim keeps the axis
            rules["priority"] = "expert"
        yield dataclasses.replace(c, rules=rules)


def _with(c, *, remat, micro, zero1, rounds):
    return dataclasses.replace(
        c, model=dataclasses.replace(c.model, remat=remat), train=dataclasses.replace(c.train, remat=remat, micro_batch_size=micro),
        parallel=dataclasses.replace(c.parallel, zero1=zero1, rounds=rounds),
    )  # fmt: skip


def _text(options):
    """XLA's options as they are typed."""
    return ",".join(f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in options.items())


def _asked(c, axis):
    """Whether a config asks for anything but one along this axis."""
    return c.mesh.get(axis, -1 if axis == "data" else 1) != 1


def _doublings(first, last):
    while first <= last:
        yield first
        first *= 2


def _divisors(n):
    return [k for k in range(1, n + 1) if n % k == 0]

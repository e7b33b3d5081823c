"""What would fit, and what would be fastest: mesh shapes, recomputation, micro-batches, optimiser state, ranked by the closed form.

A mesh whose leanest settings do not fit is dropped with all its variants; the best few are confirmed by compiling, as far as the time goes.
"""
import dataclasses
import itertools
import time

import jax
import jax.numpy as jnp

from effmodels.config import ConfigError
from effmodels.models.blocks import segments
from effmodels.parallel import axes
from effmodels.plan import topology, units
from effmodels.plan.formulas import abstract, closed_form
from effmodels.plan.formulas.policies import policies
from effmodels.plan.schedule.dump import CompilerError
from effmodels.train.run_config import RunConfig

MARGIN = 0.95  # of a chip's memory that a plan by formula may fill
LARGEST_TENSOR = 16
LONG_ROWS = 32_768  # tokens from which on a split sequence is tried unasked
DEEP_PIPELINE = 512  # chips from which on stages are tried unasked
MICRO_TOKENS = 65_536  # of one chip and micro-batch, at most
CONFIRMED = 3  # candidates that fit by the compiler
AT_ONCE = 8  # meshes whose variants are tried together, the fastest first


@dataclasses.dataclass(frozen=True)
class Candidate:
    """overrides: {dotted field of the config: value}. plan: by the closed form; compiled: the compiler's Plan, or None."""

    overrides: dict
    plan: object
    compiled: object = None

    @property
    def best(self):
        """The plan to believe."""
        return self.compiled or self.plan

    @property
    def fits(self):
        """By the compiler where it was asked, else by formula with a margin."""
        memory = self.plan.memory
        return self.compiled.fits if self.compiled else not memory.available or memory.total <= MARGIN * memory.available

    @property
    def text(self):
        """What to paste behind the command."""
        return " ".join(f"--config.{name}={value}" for name, value in self.overrides.items())

    def line(self):
        """Time, MFU, memory and overrides, indented."""
        figures = f"{units.time(self.best.seconds)}, MFU {self.best.mfu:.1%}, {units.size(self.best.memory.total)}"
        return f"  {figures} ({'compiled' if self.compiled else 'closed form'}): {self.text or 'as it is'}"


@dataclasses.dataclass(frozen=True)
class Found:
    """candidates: those that fit, fastest first, by the compiler where it was given. unconfirmed: those that it was not asked about.

    tried: plans made. smallest: the smallest slice on which the config fits, or "".
    """

    candidates: tuple
    unconfirmed: tuple
    tried: int
    smallest: str
    seconds: float

    def text(self):
        """What was found, for people."""
        lines = [f"{self.tried} plans in {units.time(self.seconds)}; those that fit, fastest first:"]
        lines += [candidate.line() for candidate in self.candidates] or ["  none"]
        if self.unconfirmed:
            lines += ["by formula only, not confirmed by the compiler:", *(candidate.line() for candidate in self.unconfirmed)]
        return "\n".join(lines + ([f"smallest slice on which it fits: {self.smallest}"] if self.smallest else []))


def search(config, place, *, seconds=120.0, log=print, compile=None, keep=10):
    """`Found` for training a config (mapping) on a `topology.Topology`, within about so many seconds, compilations included.

    compile(config mapping with the overrides) -> Plan confirms the best ones; None: nothing is compiled. log: takes lines of progress.
    """
    start = time.monotonic()
    c = RunConfig.from_mapping(config, place.platform)
    until = start + seconds * (0.4 if compile else 0.9)
    log(f"search: meshes of {place.chips} chips, by the closed form")
    candidates, tried = _ranked(c, place, until, log)
    smallest = smallest_slice(c, place, start + seconds * (0.5 if compile else 1.0)) if time.monotonic() < start + seconds else ""
    best, rest = [x for x in candidates if x.fits][:keep], []
    if compile:
        best, rest = _confirmed(config, best, compile, start + seconds, log)
    return Found(tuple(best), tuple(rest), tried, smallest, time.monotonic() - start)


def apply(config, overrides):
    """A copy of a config (ConfigDict or dict) with {dotted field: value} set."""
    fields = config.to_dict() if hasattr(config, "to_dict") else _copied(config)
    for name, value in overrides.items():
        *sections, last = name.split(".")
        node = fields
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
    return fields


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

    long, deep = wide or c.seq_len >= LONG_ROWS or _asked(c, "seq"), wide or chips >= DEEP_PIPELINE or _asked(c, "stage")
    repeats = max(r for _, _, r in layers.segments)
    limits = {
        "tensor": [n for n in divide("tensor") if n <= LARGEST_TENSOR],
        "expert": divide("expert"),
        "seq": [n for n in _divisors(chips) if n == 1 or long and c.seq_len % (2 * n) == 0 and c.seq_len // n >= 1024],
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


def smallest_slice(c, place, until):
    """The name of the smallest slice of the same chip (one slice) on which the leanest settings fit, or ""."""
    state = sum(a.size * jnp.dtype(a.dtype).itemsize for a in jax.tree.leaves(abstract.model(c).state))
    for other in _slices(place):
        if other.chip.hbm and state > MARGIN * other.chip.hbm * other.chips:
            continue
        for mesh in mesh_shapes(c, other.chips, wide=True):
            plan = _plan(_lean(_on(c, mesh)), other)
            if plan is not None and Candidate({}, plan).fits:
                return other.name
            if time.monotonic() > until:
                return ""
    return ""


def _ranked(c, place, until, log):
    """([Candidate], plans made): every variant of every mesh that fits at all, fastest first.

    First all meshes at their least memory, then the variants of the fastest ones: whenever the time is up, the best so far are known.
    """
    meshes, tried, found = mesh_shapes(c, place.chips), 0, []

    def plans(variants, what):
        nonlocal tried
        for variant in variants:
            if time.monotonic() > until:
                log(f"search: the time is up among {what}")
                return
            plan, tried = _plan(variant, place), tried + 1
            if plan is not None:
                yield variant, Candidate(_overrides(c, variant), plan)

    def fitting(meshes):
        return [(v, x) for v, x in plans((_lean(_on(c, mesh)) for mesh in meshes), f"the {len(meshes)} meshes") if x.fits]

    lean = fitting(meshes)
    if not lean:
        log("search: no mesh fits; trying also sequences and layers in more pieces")
        more = [mesh for mesh in mesh_shapes(c, place.chips, wide=True) if mesh not in meshes]
        lean, meshes = fitting(more), meshes + more
    lean.sort(key=lambda pair: pair[1].plan.seconds)
    found = [x for _, x in lean]
    log(f"search: {len(found)} of {len(meshes)} meshes fit at their least memory")
    groups = [(r.kinds, r.repeats) for r in segments(abstract.model(c).resolved.layers, c.model.scan_layers)]
    chosen = dict.fromkeys((c.model.remat, *policies(abstract.model(c).resolved, groups, c.seq_len, place.chip, until))) if lean else ()
    for first in range(0, len(lean), AT_ONCE):
        some = lean[first : first + AT_ONCE]
        variants = (v for remat in chosen for one, _ in some for v in _variants(one, remat))
        found += [x for _, x in plans(variants, f"the variants of mesh {first + 1} to {first + len(some)}")]
        if time.monotonic() > until:
            break
    if not found:  # what changes the arithmetic is tried last
        found = [x for _, x in plans((_half_precision(_lean(_on(c, mesh))) for mesh in meshes), "sums in bfloat16")]
    unique = list({x.text: x for x in found}.values())
    log(f"search: {tried} plans in closed form, {sum(x.fits for x in unique)} fit")
    return sorted(unique, key=lambda x: x.plan.seconds), tried


def _variants(c, remat):
    """The settings of one mesh under one remat policy."""
    sizes = c.mesh
    rows = axes.parts("batch", sizes, axes.make_rules(c.rules))
    micros = [m for m in _doublings(rows, c.batch_size) if c.batch_size % m == 0 and m // rows * c.seq_len // sizes["seq"] <= MICRO_TOKENS]
    zeros, rounds = (False, True) if sizes["data"] > 1 else (False,), (1, 2) if sizes["stage"] > 1 else (1,)
    for micro, zero1, number in itertools.product(micros or [rows], zeros, rounds):
        yield _with(c, remat=remat, micro=micro, zero1=zero1, rounds=number)


def _lean(c):
    """The same mesh at its least memory."""
    rows = axes.parts("batch", c.mesh, axes.make_rules(c.rules))
    return _with(c, remat="full", micro=rows, zero1=c.mesh["data"] > 1, rounds=1)


def _half_precision(c):
    """With sums of gradients, and the first moment where the optimiser has one, in bfloat16."""
    optim = dict(c.optim)
    if optim.get("name") in ("adamw", "adam", "lion"):
        optim["options"] = {**(optim.get("options") or {}), "mu_dtype": "bfloat16"}
    return dataclasses.replace(c, optim=optim, train=dataclasses.replace(c.train, accumulate_dtype="bfloat16"))


def _with(c, *, remat, micro, zero1, rounds):
    return dataclasses.replace(
        c, model=dataclasses.replace(c.model, remat=remat), train=dataclasses.replace(c.train, remat=remat, micro_batch_size=micro),
        parallel=dataclasses.replace(c.parallel, zero1=zero1, rounds=rounds),
    )  # fmt: skip


def _on(c, mesh):
    return dataclasses.replace(c, mesh=mesh)


def _plan(c, place):
    """The closed form's Plan, or None where the settings do not go together."""
    try:
        c.check()
        return closed_form.price(abstract.place(c, place), place)
    except ConfigError:
        return None


def _overrides(before, after):
    """{dotted field: value} that turn one RunConfig into the other; the whole mesh is always said."""
    found = {f"mesh.{axis}": size for axis, size in after.mesh.items() if size > 1 or _asked(before, axis)}
    pairs = {
        "train.remat": (before.train.remat, after.train.remat),
        "train.micro_batch_size": (before.train.micro_batch_size, after.train.micro_batch_size),
        "train.accumulate_dtype": (before.train.accumulate_dtype, after.train.accumulate_dtype),
        "parallel.zero1": (before.parallel.zero1, after.parallel.zero1),
        "parallel.rounds": (before.parallel.rounds, after.parallel.rounds),
    }
    found |= {name: new for name, (old, new) in pairs.items() if new != old}
    old, new = (dict(x.optim.get("options") or {}) for x in (before, after))
    return found | {f"optim.options.{k}": v for k, v in new.items() if old.get(k) != v}


def _confirmed(config, candidates, compile, until, log):
    """(those of the best that fit by the compiler, fastest first; those that it was not asked about). Goes on until CONFIRMED fit."""
    fitting, asked, longest = [], 0, 0.0
    for candidate in candidates:
        begin = time.monotonic()
        if len(fitting) == CONFIRMED:
            break
        if begin + longest > until:
            log("search: no time left to compile the next one")
            break
        asked += 1
        log(f"search: compiling {asked}, {len(fitting)} of {CONFIRMED} confirmed: {candidate.text}")
        try:
            compiled = compile(apply(config, candidate.overrides))
        except (CompilerError, ConfigError) as error:
            log(f"search: dropped, it does not compile: {error}")
            continue
        longest = max(longest, time.monotonic() - begin)
        if compiled.fits:
            fitting.append(dataclasses.replace(candidate, compiled=compiled))
            log(f"search: fits; a step takes {compiled.seconds:.3g} s by the compiler, {candidate.plan.seconds:.3g} s by formula")
        else:
            log(f"search: does not fit: {compiled.out_of_memory or 'more memory than there is'}")
    return sorted(fitting, key=lambda x: x.best.seconds), candidates[asked:]


def _slices(place):
    """Single slices of the same chip by size, as topologies; of TPUs those whose size is a power of two."""
    name = place.chip.name
    if place.platform != "tpu":
        kind = place.name.rpartition(":")[0]
        yield from (topology.parse(f"{kind}:{2**k}") for k in range(13))
        return
    yield from (topology.parse(topology.slice_name(name, n)) for n in topology.named_slices(name) if n & (n - 1) == 0)


def _asked(c, axis):
    """Whether a config asks for anything but one along this axis."""
    return c.mesh.get(axis, -1 if axis == "data" else 1) != 1


def _doublings(first, last):
    while first <= last:
        yield first
        first *= 2


def _divisors(n):
    return [k for k in range(1, n + 1) if n % k == 0]


def _copied(value):
    return {k: _copied(v) for k, v in value.items()} if hasattr(value, "items") else value

"""What would fit, and what would be fastest: the settings of `variants` and `policies`, ranked by the closed form.

A mesh whose leanest settings do not fit is dropped with all its variants; the best few are confirmed by compiling, as far as the time goes.
"""
import collections
import dataclasses
import math
import shlex
import time

import jax
import jax.numpy as jnp

from effmodels.config import ConfigError
from effmodels.models.blocks import segments
from effmodels.plan import topology, units
from effmodels.plan.formulas import abstract, closed_form, variants
from effmodels.plan.formulas.policies import policies
from effmodels.plan.schedule.dump import CompilerError
from effmodels.train.run_config import RunConfig

MARGIN = 0.95  # of a chip's memory that a plan by formula may fill
CONFIRMED = 3  # candidates that fit by the compiler
AT_ONCE = 8  # meshes whose variants are tried together, the fastest first
SUMMED = 4  # of these variants that are also tried with other ways to sum gradients
WORTHWHILE = 0.98  # of the step time without them
OF_ONE_MESH = 3  # candidates that share mesh and rules
LEANEST = 24  # settings that are tried on a slice to see whether a config fits there
TELL_EVERY = 10.0  # seconds
CHANGES = " (less precise: sums in bfloat16)"


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
    def changes(self):
        """Whether it computes with less precision than the config asks for."""
        return bool({"train.accumulate_dtype", "optim.options"} & set(self.overrides))

    @property
    def text(self):
        """What to paste behind the command."""
        return " ".join(shlex.quote(f"--config.{name}={value}") for name, value in self.overrides.items())

    def line(self):
        """Time, MFU, memory and overrides, indented."""
        figures = f"{units.time(self.best.seconds)}, MFU {self.best.mfu:.1%}, {units.size(self.best.memory.total)}"
        return f"  {figures} ({'compiled' if self.compiled else 'closed form'}): {self.text or 'as it is'}" + CHANGES * self.changes


@dataclasses.dataclass(frozen=True)
class Found:
    """candidates: those that fit, fastest first, by the compiler where it was given. unconfirmed: those that it was not asked about.

    tried: plans made. smallest: the smallest slice on which the config fits, or ""; all_asked: whether there was time to ask about all.
    """

    candidates: tuple
    unconfirmed: tuple
    tried: int
    smallest: str
    seconds: float
    all_asked: bool = True

    def text(self):
        """What was found, for people."""
        lines = [f"{self.tried} plans in {units.time(self.seconds)}; those that fit, fastest first:"]
        lines += [candidate.line() for candidate in self.candidates] or ["  none"]
        if self.unconfirmed:
            lines += ["by formula only, not confirmed by the compiler:", *(candidate.line() for candidate in self.unconfirmed)]
        if self.smallest or not self.all_asked:
            known = self.smallest or "not known"
            lines.append(f"smallest slice on which it fits: {known}" + ("" if self.all_asked else ", or a smaller one: the time was up"))
        return "\n".join(lines)


def search(config, place, *, seconds=120.0, log=print, compile=None, keep=10):
    """`Found` for training a config (mapping) on a `topology.Topology`, within about so many seconds, compilations included.

    compile(config mapping with the overrides) -> Plan confirms the best ones; None: nothing is compiled. log: takes lines of progress.
    """
    start = time.monotonic()
    c = RunConfig.from_mapping(config, place.platform)
    log(f"search: meshes of {place.chips} chips, by the closed form")
    candidates, tried = _ranked(c, place, start + seconds * (0.35 if compile else 0.75), log)
    smallest, all_asked = smallest_slice(c, place, start + seconds * (0.5 if compile else 1.0), log)
    best, rest = _spread(candidates, keep), []
    if compile:
        best, rest = _confirmed(config, best, compile, start + seconds, log)
    return Found(tuple(best), tuple(rest), tried, smallest, time.monotonic() - start, all_asked)


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


def smallest_slice(c, place, until, log=lambda text: None):
    """(name of the smallest slice of the same chip on which the leanest settings fit, or ""; whether all smaller ones were asked).

    Sizes are halved in between: what fits on some chips fits on more.
    """
    state = sum(a.size * jnp.dtype(a.dtype).itemsize for a in jax.tree.leaves(abstract.model(c).state))
    sizes = [x for x in _slices(place) if not x.chip.hbm or state <= MARGIN * x.chip.hbm * x.chips]
    low, high, found = 0, len(sizes), ""
    while low < high:
        middle = (low + high) // 2
        log(f"search: does it fit on {sizes[middle].name}?")
        if not variants.mesh_shapes(c, sizes[middle].chips, wide=True):
            high = middle  # the rows do not suffice for so many chips
            continue
        fits = _fits_on(c, sizes[middle], until)
        if fits is None:
            return found, False
        found, low, high = (sizes[middle].name, low, middle) if fits else (found, middle + 1, high)
    return found, True


def _fits_on(c, place, until):
    """Whether the leanest of the settings with the smallest states fit on a Topology; None where the time is up before it is known."""
    settings = sorted(variants.placed(c, place, MARGIN, wide=True), key=variants.state_bytes)
    for one in settings[:LEANEST]:
        plan = _plan(variants.lean(one), place)
        if plan is not None and Candidate({}, plan).fits:
            return True
        if time.monotonic() > until:
            return None
    return False


def _ranked(c, place, until, log):
    """([Candidate], plans made): every variant of every mesh that fits at all, fastest first.

    First all meshes at their least memory, then the variants of the fastest ones: whenever the time is up, the best so far are known.
    """
    tried, found, told = 0, [], time.monotonic()

    def plans(settings, what):
        nonlocal tried, told
        for one in settings:
            now = time.monotonic()
            if now > until:
                log(f"search: the time is up among {what}")
                return
            if now - told > TELL_EVERY:
                told = now
                log(f"search: {tried} plans made, at {what}")
            plan, tried = _plan(one, place), tried + 1
            if plan is not None:
                yield one, Candidate(variants.overrides(c, one), plan)

    def fitting(settings, what="the meshes at their least memory"):
        return [(one, x) for one, x in plans(settings, what) if x.fits]

    meshes = variants.placed(c, place, MARGIN)
    lean = fitting(map(variants.lean, meshes))
    if not lean:
        log("search: no mesh fits; trying also sequences and layers in more pieces")
        meshes = variants.placed(c, place, MARGIN, wide=True)
        lean = fitting(map(variants.lean, meshes))
    if not lean:
        log("search: no mesh fits; trying also sums in bfloat16, which changes the arithmetic")
        meshes = [variants.half_precision(one) for one in variants.placed(variants.half_precision(c), place, MARGIN, wide=True)]
        lean = fitting(map(variants.lean, meshes))
    lean.sort(key=lambda pair: pair[1].plan.seconds)
    found = [x for _, x in lean]
    log(f"search: {len(found)} of {len(meshes)} meshes and tables of rules fit at their least memory")
    resolved, chosen = abstract.model(c).resolved, ()
    if lean:
        groups = [(r.kinds, r.repeats) for r in segments(resolved.layers, c.model.scan_layers)]
        traced_until = (time.monotonic() + until) / 2  # the rest is for the plans
        chosen = dict.fromkeys((c.model.remat, *policies(resolved, groups, c.seq_len, place.chip, traced_until)))
    for first in range(0, len(lean), AT_ONCE):
        some = [one for one, _ in lean[first : first + AT_ONCE]]
        what = f"the variants of mesh {first + 1} to {first + len(some)}"
        pairs = list(plans((v for remat in chosen for one in some for v in variants.settings(one, remat)), what))
        best = sorted((pair for pair in pairs if pair[1].fits), key=lambda pair: pair[1].plan.seconds)[:SUMMED]
        more = (change(one) for one, _ in best for change in (variants.ringed, variants.half_precision))
        found += [x for _, x in pairs] + [x for _, x in plans(more, "other ways to sum")]
        if time.monotonic() > until:
            break
    unique = list({x.text: x for x in found}.values())
    log(f"search: {tried} plans in closed form, {sum(x.fits for x in unique)} fit")
    return sorted(unique, key=lambda x: x.plan.seconds), tried


def _spread(candidates, keep):
    """The fastest that fit, few of one mesh and table of rules; changed arithmetic only where it gains something."""
    fits, count, chosen = [x for x in candidates if x.fits], collections.Counter(), []
    exact = min((x.plan.seconds for x in fits if not x.changes), default=math.inf)
    for x in fits:
        group = tuple(sorted((k, v) for k, v in x.overrides.items() if k.startswith(("mesh.", "rules."))))
        if count[group] < OF_ONE_MESH and (not x.changes or x.plan.seconds < WORTHWHILE * exact):
            chosen.append(x)
            count[group] += 1
    return chosen[:keep]


def _plan(c, place):
    """The closed form's Plan, or None where the settings do not go together."""
    try:
        c.check()
        return closed_form.price(abstract.place(c, place), place)
    except ConfigError:
        return None


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


def _copied(value):
    return {k: _copied(v) for k, v in value.items()} if hasattr(value, "items") else value

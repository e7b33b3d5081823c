"""Parameter sharing: layers that use the same weights, each with an unedited mixer of its own that is bound to them.

    model.sharing = {"mixer": "cycle:4", "channel": "neighbours:2", "norms": "none", "rank": 8}

"cycle:n": layer i uses the weights of layer i % n (Universal Transformer, arXiv:1807.03819, at n = 1; recursive models at larger n).
"neighbours:n": n layers in a row use those of their first (MobileLLM, arXiv:2402.14905, at n = 2). rank > 0: every user adds a low-rank
matrix of its own to each shared matrix (relaxed recursive transformers, arXiv:2410.20672). "diagonal:n", of dense channel mixers: of two
layers in a row the second uses the first one's diagonal blocks of every matrix cut into n by n, which saves 1 / 2n of their parameters.
Prefix and suffix layers keep their own. States, balancing biases, dropout and `ctx.layer` are never shared.
"""
import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from effmodels.config import ConfigError, build
from effmodels.layers.param import Buffer, param, zeros

PARTS = ("mixer", "channel", "norms")
RULES = ("cycle", "neighbours", "diagonal")
LOW_RANK = "_low_rank"  # behind the name of the module it adds to


@dataclasses.dataclass(frozen=True)
class Sharing:
    """The checked `model.sharing`: for each part of a layer a rule, and the rank of what every user adds to a shared matrix."""

    mixer: str = "none"
    channel: str = "none"
    norms: str = "none"
    rank: int = 0


@dataclasses.dataclass(frozen=True)
class Tie:
    """How one part of a layer shares its weights. group: what names them, absolute in a cycle, else None; place and size of the layer in
    its group of neighbours; blocks: n of diagonal blocks, 0: whole. Layers of a scanned stack have equal ties."""

    group: int | None
    place: int
    size: int
    blocks: int = 0


@dataclasses.dataclass(frozen=True)
class Source:
    """Whose weights a part uses: those of entry `entry` of what the model holds, or of the block at `place` of the same period; with
    `blocks` only the diagonal ones of so many by so many."""

    entry: int | None = None
    place: int | None = None
    blocks: int = 0


def check(mapping):
    """The `Sharing` of a mapping; raises ConfigError naming the field."""
    sharing = build(Sharing, mapping, "model.sharing")
    for part in PARTS:
        _rule(sharing, part)
    if sharing.rank < 0 or sharing.rank and all(getattr(sharing, part) == "none" for part in ("mixer", "channel")):
        raise ConfigError(f"model.sharing.rank: expected a rank >= 0 with a shared mixer or channel, got {sharing.rank}.")
    diagonal = [part for part in PARTS if _rule(sharing, part)[0] == "diagonal"]
    if diagonal and (diagonal != ["channel"] or sharing.rank):
        raise ConfigError(f"model.sharing: 'diagonal:n' is for the channel alone and without a rank, got {sharing}.")
    return sharing


def groups(sharing, part, layers):
    """{layer: its group, a tuple of layers whose first one owns the weights} of the absolute `layers` that take part."""
    rule, n = _rule(sharing, part)
    found = {}
    name = {None: lambda i: i, "cycle": lambda i: i % n, "neighbours": lambda i: i // n, "diagonal": lambda i: i // 2}[rule]
    for i in layers:
        found.setdefault(name(i), []).append(i)
    return {i: tuple(group) for group in found.values() for i in group}


def tied(config, kinds):
    """kinds (LayerKind per layer) with their ties; raises ConfigError where layers of different kinds would use the same weights."""
    sharing = check(config.sharing)
    layers = range(len(config.prefix), config.num_layers - len(config.suffix))
    ties = {i: {} for i in range(config.num_layers)}
    for part in PARTS:
        rule, n = _rule(sharing, part)
        blocks = n if rule == "diagonal" else 0
        for i, group in groups(sharing, part, layers).items():
            if part == "norms" and kinds[i].channel.cls.absent != kinds[group[0]].channel.cls.absent:
                raise ConfigError(
                    f"model.sharing.norms={sharing.norms!r}: layers {group[0]} and {i} would use the same norms, but one of them has no "
                    "channel mixer and so one norm less; choose n to follow the pattern."
                )
            if blocks and kinds[i].channel.cls.reports_load:
                raise ConfigError(f"model.sharing.channel='diagonal:{n}' is for dense channel mixers, not {kinds[i].channel.name!r}.")
            if part != "norms" and getattr(kinds[i], part) != getattr(kinds[group[0]], part):
                raise ConfigError(
                    f"model.sharing.{part}={getattr(sharing, part)!r}: layers {group[0]} and {i} would use the same weights, but are "
                    f"{getattr(kinds[group[0]], part).name!r} and {getattr(kinds[i], part).name!r}; choose n to follow the pattern."
                )
            if len(group) > 1:
                ties[i][part] = Tie(group[0], 0, 0) if rule == "cycle" else Tie(None, group.index(i), len(group), blocks)
    return tuple(dataclasses.replace(kind, ties=tuple(ties[i].items())) for i, kind in enumerate(kinds))


def owners(kinds):
    """{(part, layer): the layer that owns the weights} of every layer that shares."""
    found = {}
    for i, kind in enumerate(kinds):
        for part, tie in kind.ties:
            found[part, i] = i - tie.place if tie.group is None else tie.group
    return found


def sources(runs, kinds):
    """(what the model holds: [(owner, its parts)], per run a tuple over its places of ((part, Source), ...)).

    A group inside one repeat of a period is held by the first block of the group there, any other by the model.
    """
    owner_of = owners(kinds)
    where = {}
    for index, run in enumerate(runs):
        for offset in range(run.period * run.repeats):
            where[run.start + offset] = index, offset // run.period
    inside = {}
    for (part, i), owner in owner_of.items():
        inside[part, owner] = inside.get((part, owner), True) and where[i] == where[owner]
    held = {owner: [p for p in PARTS if inside.get((p, owner)) is False] for _, owner in sorted(inside)}
    held = [(owner, tuple(parts)) for owner, parts in sorted(held.items()) if parts]
    entries = {owner: j for j, (owner, _) in enumerate(held)}
    found = []
    for run in runs:
        places = []
        for p in range(run.period):
            per_repeat = []
            for r in range(run.repeats):
                first = run.start + r * run.period
                used = {part: owner_of[part, first + p] for part in PARTS if (part, first + p) in owner_of}
                cut = {part: tie.blocks if tie.place else 0 for part, tie in kinds[first + p].ties}
                per_repeat.append(tuple(
                    (part, Source(place=o - first, blocks=cut[part]) if inside[part, o] else Source(entry=entries[o], blocks=cut[part]))
                    for part, o in used.items()))
            if any(one != per_repeat[0] for one in per_repeat):
                raise ConfigError(
                    f"model.sharing: the layers from {run.start} on repeat every {run.period}, which cuts through groups that share "
                    "weights; use model.scan_layers=False, or another n."
                )
            places.append(per_repeat[0])
        found.append(tuple(places))
    return held, tuple(found)


class Lent(nnx.Module):
    """The parts of one layer that the model holds for all layers that use them; what is not a parameter stays with the users."""

    def __init__(self, block, parts):
        for name in names(block, parts):
            setattr(self, name, without(getattr(block, name), Buffer))


class LowRank(nnx.Module):
    """A low-rank matrix a b for every matrix of a module, under the same names; b starts at zero."""

    def __init__(self, infos, rank, *, rngs, param_dtype):
        for path, (info, shape) in infos.items():
            setattr(self, "_".join(path), Factors(info, shape, rank, rngs=rngs, param_dtype=param_dtype))

    def added(self, path, value):
        """The array at `path` of the module with its low-rank matrix added."""
        factors = getattr(self, "_".join(path), None)
        return value if factors is None else value + factors.product().astype(value.dtype)


class Factors(nnx.Module):
    """a [in, rank] and b [rank, out], per batch entry of the matrix they are added to."""

    def __init__(self, info, shape, rank, *, rngs, param_dtype):
        sizes = dict(zip(info.dim_names, shape))
        batch, out = info.batch_dims, tuple(d for d in info.dim_names if d not in info.in_dims and d not in info.batch_dims)
        a_dims, b_dims = (*batch, *info.in_dims, "rank"), (*batch, "rank", *out)
        sizes["rank"] = rank
        self.a = param(
            jax.random.normal, rngs.params(), [sizes[d] for d in a_dims], a_dims, in_dims=info.in_dims, batch_dims=batch, dtype=param_dtype
        )  # fmt: skip
        self.b = param(zeros, rngs.params(), [sizes[d] for d in b_dims], b_dims, in_dims=("rank",), batch_dims=batch, dtype=param_dtype)
        letters = {d: chr(ord("a") + i) for i, d in enumerate((*info.dim_names, "rank"))}
        self.spec = ",".join("".join(letters[d] for d in dims) for dims in (a_dims, b_dims)) + "->" + "".join(
            letters[d] for d in info.dim_names)

    def product(self):
        """a b in the order of the matrix's dims."""
        return jnp.einsum(self.spec, self.a[...], self.b[...])


def saved(kinds, env, sharing):
    """({(part, layer): owner} of what a layer uses whole and another holds, the number of values in all low-rank matrices less that of the
    diagonal blocks that another holds)."""
    owner_of, added = owners(kinds), 0
    cut = {(part, i): tie.blocks for i, kind in enumerate(kinds) for part, tie in kind.ties if tie.place}
    once = {key: owner for key, owner in owner_of.items() if key[1] != owner and not cut.get(key)}
    for part, i in owner_of:
        if cut.get((part, i)):
            made = getattr(kinds[i], part)
            module = nnx.eval_shape(lambda made=made: made.cls(made.config, env, rngs=nnx.Rngs(0)))
            added -= sum(math.prod(shape) // cut[part, i] for _, shape in matrices(module).values())
        if sharing.rank and part != "norms":
            made = getattr(kinds[i], part)
            module = nnx.eval_shape(lambda made=made: made.cls(made.config, env, rngs=nnx.Rngs(0)))
            for info, shape in matrices(module).values():
                sizes = dict(zip(info.dim_names, shape))
                batch, into = (math.prod(sizes[d] for d in dims) for dims in (info.batch_dims, info.in_dims))
                added += sharing.rank * (batch * into + math.prod(shape) // into)
    return once, added


def names(block, parts):
    """The attributes of a block that belong to these parts."""
    modules = [name for name, value in vars(block).items() if isinstance(value, nnx.Module)]
    return [name for name in modules if part_of(name) in parts and not name.endswith(LOW_RANK)]


def part_of(name):
    """The part that an attribute of a block belongs to."""
    return "norms" if name.startswith("norm_") else name


def matrices(module):
    """{path: (ParamInfo, shape)} of the module's matrices."""
    flat = ((path, v.get_metadata()["info"], v.get_value().shape) for path, v in nnx.to_flat_state(nnx.state(module, nnx.Param)))
    return {path: (info, shape) for path, info, shape in flat if info.is_matrix}


def without(module, kind):
    """The module with its variables of one kind taken out."""
    for path, _ in nnx.to_flat_state(nnx.state(module, kind)):
        setattr(_at(module, path[:-1]), path[-1], None)
    return module


def bound(own, lender, low_rank, blocks=0):
    """A copy of the module `own` with the parameters of `lender`, to which low_rank (or None) adds; with `blocks` only diagonal ones."""
    copy = nnx.merge(*nnx.split(own))
    for path, variable in nnx.to_flat_state(nnx.state(lender, nnx.Param)):
        value = variable.get_value()
        info = variable.get_metadata()["info"]
        if blocks:
            if not info.is_matrix:
                continue
            value = with_diagonal(_at(own, path)[...], value, blocks)
        setattr(_at(copy, path[:-1]), path[-1], nnx.Param(value if low_rank is None else low_rank.added(path, value), info=info))
    return copy


def bind(block, chosen, shared, blocks):
    """The block with the weights that it borrows; chosen: ((part, Source), ...), shared: what the model holds, blocks: of the period."""
    if not chosen:
        return block
    copy, chosen = nnx.merge(*nnx.split(block)), dict(chosen)
    for name in names(block, chosen):
        source = chosen[part_of(name)]
        lender = getattr(blocks[source.place] if source.entry is None else shared[source.entry], name)
        setattr(copy, name, bound(getattr(block, name), lender, getattr(block, name + LOW_RANK, None), source.blocks))
    return copy


def keep_own(block, place, chosen, rank, *, rngs, param_dtype):
    """The new block without the parameters that it borrows, and with the low-rank matrices that it adds to them."""
    chosen = dict(chosen)
    for name in names(block, chosen):
        if rank and name in ("mixer", "channel"):
            setattr(block, name + LOW_RANK, LowRank(matrices(getattr(block, name)), rank, rngs=rngs, param_dtype=param_dtype))
        source = chosen[part_of(name)]
        if source.blocks:
            _keep_off_diagonal(getattr(block, name), source.blocks)
        elif source.place != place:
            without(getattr(block, name), nnx.Param)
    return block


def off_diagonal(a_RC, n):
    """[R, C (n - 1) / n]: a matrix cut into n by n blocks without those on the diagonal, its rows closed up."""
    R, C = a_RC.shape
    if R % n or C % n:
        raise ConfigError(f"model.sharing: a matrix of {R} x {C} cannot be cut into {n} x {n} equal blocks; choose n to divide both.")
    at = jnp.asarray([[j for j in range(n) if j != i] for i in range(n)], jnp.int32)
    return jnp.take_along_axis(a_RC.reshape(n, R // n, n, C // n), at[:, None, :, None], axis=2).reshape(R, C - C // n)


def with_diagonal(rest, a_RC, n):
    """The matrix [R, C] with the diagonal blocks of a and, elsewhere, the blocks that `off_diagonal` left."""
    R, C = a_RC.shape
    i, j = jnp.arange(n)[:, None], jnp.arange(n)
    at = jnp.clip(j - (j > i), 0, n - 2)
    others = jnp.take_along_axis(rest.reshape(n, R // n, n - 1, C // n), at[:, None, :, None], axis=2)
    return jnp.where((i == j)[:, None, :, None], a_RC.reshape(n, R // n, n, C // n), others).reshape(R, C)


def _rule(sharing, part):
    text = getattr(sharing, part)
    if text == "none":
        return None, 1
    rule, _, n = text.partition(":")
    if rule not in RULES or not n.isdigit() or int(n) < (1 if rule == "cycle" else 2):
        raise ConfigError(f"model.sharing.{part}: expected none, cycle:n (n >= 1), neighbours:n or diagonal:n (n >= 2), got {text!r}.")
    return rule, int(n)


def _keep_off_diagonal(module, n):
    for path, variable in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        info = variable.get_metadata()["info"]
        if info.is_matrix:
            setattr(_at(module, path[:-1]), path[-1], nnx.Param(off_diagonal(variable.get_value(), n), info=info))


def _at(module, path):
    for key in path:
        module = module[key] if isinstance(key, int) else getattr(module, key)
    return module

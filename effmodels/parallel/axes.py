"""Names of dims, the rules that map them to mesh axes, and `shard`, which applies them.

An *axis* belongs to a mesh, a *dim* to an array. Layers name dims; only a rules table says where a dim goes. The table in force is part of
jit's cache key (`jax.make_user_context`), so that changing it can never run a stale program.
"""
import contextlib
import math

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from effmodels.config import ConfigError, nearest
from effmodels.parallel import options, torus

# Slowest-varying first: tensor neighbours sit closest in the interconnect, stages and data replicas farthest.
MESH_AXES = ("stage", "data", "fsdp", "expert", "seq", "tensor")

ACTIVATION_DIMS = (
    "batch", "seq", "res_seq", "kv_seq", "act_embed", "act_heads", "act_kv_heads", "act_mlp", "act_vocab", "act_expert", "tokens",
)  # fmt: skip
PARAMETER_DIMS = (
    "embed", "heads", "kv_heads", "head_dim", "value_dim", "mlp", "expert", "expert_mlp", "vocab", "layers", "stage", "norm", "rank",
)  # fmt: skip
DIMS = ACTIVATION_DIMS + PARAMETER_DIMS

DEFAULT_RULES = {
    "batch": ("data", "fsdp", "expert"),
    "seq": "seq",
    "res_seq": "seq",
    "kv_seq": None,
    "act_embed": None,
    "act_heads": "tensor",
    "act_kv_heads": "tensor",
    "act_mlp": "tensor",
    "act_vocab": "tensor",
    "act_expert": "expert",
    "tokens": ("data", "fsdp", "expert", "seq"),
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "value_dim": None,
    "mlp": "tensor",
    "expert": "expert",
    "expert_mlp": "tensor",
    "vocab": "tensor",
    "layers": "stage",
    "stage": "stage",
    "norm": None,
    "priority": (),
}

PRIORITY = "priority"

_RULES = jax.make_user_context(default_value=None)


def make_rules(overrides=None):
    """The default table with a run's overrides, as the hashable form that the context carries; names are checked.

    A value is None, an axis, a tuple of axes, or text as typed on a command line: "default", "none", "data,fsdp". "priority" names dims:
    of two dims of an array that want one axis, the first of them gets it.
    """
    table = dict(DEFAULT_RULES)
    for dim, axes in (overrides or {}).items():
        if dim == PRIORITY:
            table[PRIORITY] = _dims_named(axes)
            continue
        if dim not in DIMS:
            raise ConfigError(f"rules: unknown dim {dim!r}.{nearest(dim, DIMS)}")
        if axes == "default":
            continue
        if isinstance(axes, str):
            axes = None if axes.lower() in ("", "none") else tuple(a.strip() for a in axes.split(","))
        for axis in as_tuple(axes):
            if axis not in MESH_AXES:
                raise ConfigError(f"rules.{dim}: unknown mesh axis {axis!r}.{nearest(axis, MESH_AXES)}")
        axes = as_tuple(axes)
        table[dim] = axes[0] if len(axes) == 1 else axes or None
    return tuple(sorted(table.items()))


def decode_rules(rules=None):
    """The table used while decoding: a sequence of one token cannot be split, so no dim of time is; stages become copies of the model."""
    table = dict(rules or make_rules())
    batch = (*as_tuple(table["batch"]), *as_tuple(table["stage"]))
    table.update(seq=None, res_seq=None, kv_seq=None, layers=None, stage=None, batch=batch, tokens=batch)
    return tuple(sorted(table.items()))


def _dims_named(dims):
    dims = tuple(d.strip() for d in dims.split(",") if d.strip()) if isinstance(dims, str) else tuple(dims or ())
    for dim in dims:
        if dim not in DIMS:
            raise ConfigError(f"rules.{PRIORITY}: unknown dim {dim!r}.{nearest(dim, DIMS)}")
    return dims


@contextlib.contextmanager
def use(mesh, rules=None, parallel=None):
    """Inside, `shard` and `parallel.ops` place arrays on `mesh` by `rules` (default: DEFAULT_RULES), run as `parallel` (Options) says."""
    rules = rules if isinstance(rules, tuple) else make_rules(rules)
    with jax.set_mesh(mesh), _RULES(rules), options.use(parallel), torus.use(mesh):
        yield mesh


def rules_in_force(rules):
    """Context manager: inside, `current_rules()` is this table (of `make_rules`); the mesh stays as it is."""
    return _RULES(rules)


def whole_rows():
    """Context manager: inside, no dim of time is split, as for rows that are not those of the text."""
    if current_mesh() is None:
        return contextlib.nullcontext()
    return _RULES(tuple(sorted({**current_rules(), "seq": None, "res_seq": None, "kv_seq": None}.items())))


def current_rules():
    """The table in force, as a dict."""
    return dict(_RULES.value) if _RULES.value is not None else DEFAULT_RULES


def current_mesh():
    """The abstract mesh in force, or None: no mesh, or inside a shard_map, where every axis is already manual."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh is None or mesh.empty or any(t == AxisType.Manual for t in mesh.axis_types):
        return None
    return mesh


def spec(dim_names, *, rules=None, mesh=None, array="array"):
    """The PartitionSpec of an array whose dims have these names (None: a dim that is never split).

    Raises ConfigError for an unknown dim, and for a mesh axis that two dims of the array want and rules.priority gives to neither, naming
    the array and both rules.
    """
    rules = current_rules() if rules is None else dict(rules)
    mesh = mesh or current_mesh()
    present = MESH_AXES if mesh is None else mesh.axis_names
    first = {dim: i for i, dim in reversed(list(enumerate(rules.get(PRIORITY, ()))))}
    owner, wanted = {}, []
    for i, dim in enumerate(dim_names):
        if dim is not None and dim not in DIMS:
            raise ConfigError(f"{array}: unknown dim {dim!r}.{nearest(dim, DIMS)}")
        wanted.append(tuple(a for a in as_tuple(rules.get(dim) if dim else None) if a in present))
        for axis in wanted[-1]:
            other = dim_names[owner.get(axis, i)]
            if axis in owner and first.get(other) == first.get(dim):
                raise ConfigError(
                    f"{array} {tuple(dim_names)}: mesh axis {axis!r} is wanted by two dims, {other!r} (rules.{other}="
                    f"{rules[other]!r}) and {dim!r} (rules.{dim}={rules[dim]!r}). Change one of the two rules, or name the "
                    f"dim that gets it in rules.{PRIORITY}."
                )
            if axis not in owner or first.get(dim, len(first)) < first.get(other, len(first)):
                owner[axis] = i
    entries = [tuple(a for a in axes if owner[a] == i) for i, axes in enumerate(wanted)]
    return PartitionSpec(*(axes[0] if len(axes) == 1 else axes or None for axes in entries))


def shards(dim, *, mesh=None, rules=None):
    """Into how many pieces a dim is split."""
    mesh = mesh or current_mesh()
    if mesh is None:
        return 1
    return parts(dim, mesh.shape, current_rules() if rules is None else rules)


def parts(dim, sizes, rules):
    """Into how many pieces a dim is split by axes of these sizes, {axis: size}."""
    return math.prod(sizes[a] for a in as_tuple(dict(rules).get(dim)) if a in sizes)


def shard(x, *dim_names):
    """x, placed by the rules in force; x itself without a mesh. Raises ConfigError when a dim cannot be split evenly."""
    mesh = current_mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, checked_spec(x.shape, dim_names, mesh=mesh, array="activation"))


def checked_spec(shape, dim_names, *, mesh, rules=None, array):
    """`spec`, with every size checked against the mesh."""
    if len(shape) != len(dim_names):
        raise ConfigError(f"{array}: {len(shape)} dims {tuple(shape)} but {len(dim_names)} names {tuple(dim_names)}.")
    placed = spec(dim_names, rules=rules, mesh=mesh, array=array)
    for size, dim, axes in zip(shape, dim_names, placed):
        pieces = math.prod(mesh.shape[a] for a in as_tuple(axes))
        if size % pieces:
            table = current_rules() if rules is None else dict(rules)
            raise ConfigError(
                f"{array} {tuple(dim_names)}: {dim}={size} cannot be split over {pieces} devices (rules.{dim}={table[dim]!r}, mesh "
                f"{dict(mesh.shape)}). Use a multiple of {pieces}, another mesh, or rules.{dim}=none."
            )
    return placed


def parameter_sharding(shape, info, *, mesh, rules=None, name="parameter"):
    """The NamedSharding of a stored parameter or of a moment of the same shape.

    A vocabulary that does not divide is stored whole, as is a stack of layers that is no pipeline's.
    """
    whole = ("vocab", "layers")
    names = tuple(None if d in whole and n % shards(d, mesh=mesh, rules=rules) else d for n, d in zip(shape, info.dim_names))
    return NamedSharding(mesh, checked_spec(shape, names, mesh=mesh, rules=rules, array=name))


def also_split(sharding, shape, axis="data"):
    """The NamedSharding with `axis` added to the largest dim that it divides, or unchanged if there is none (ZeRO-1, arXiv:1910.02054)."""
    mesh, parts = sharding.mesh, [as_tuple(p) for p in (*sharding.spec, *(None,) * (len(shape) - len(sharding.spec)))]
    size = mesh.shape.get(axis, 1)
    if size == 1 or any(axis in p for p in parts):
        return sharding
    local = [n // math.prod(mesh.shape[a] for a in p) for n, p in zip(shape, parts)]
    fitting = [i for i, n in enumerate(local) if n % size == 0]
    if not fitting:
        return sharding
    best = max(fitting, key=lambda i: local[i])
    parts[best] = (*parts[best], axis)
    return NamedSharding(mesh, PartitionSpec(*(p[0] if len(p) == 1 else p or None for p in parts)))


def as_tuple(axes):
    """A rule's value (None, one axis or several) as a tuple of axes."""
    if axes is None:
        return ()
    return (axes,) if isinstance(axes, str) else tuple(axes)

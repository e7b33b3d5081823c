"""Optimisers by name on flat dicts of arrays, grouped by what the dims mean and never by how many there are.

One update of a scanned (stacked) model equals one of the unrolled model, for every optimiser; `layers` and `expert` are batch dims:
  elementwise   sees the arrays as they are; stacking cannot matter;
  whole-tree    statistics over all parameters at once (Prodigy): sums do not care how the terms are stacked either;
  per-entry     statistics per array (LAMB's trust ratio, Muon's orthogonalisation, Adafactor's factors and RMS): vmapped over the batch
                dims, for Adafactor on a rows x columns view made from the dim names.
The update of every optimiser is  -lr(step) * multiplier * direction - lr(step) * weight_decay * p,  decay only where the mask says so.
"""
import fnmatch
import functools
import inspect
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from effmodels.config import ConfigError, nearest
from effmodels.train.schedules import make_schedule

_ELEMENTWISE = ("adabelief adadelta adagrad adam adamax adamaxw adamw adan amsgrad lion nadam nadamw optimistic_adam_v2 "
                "optimistic_gradient_descent radam rmsprop sgd sign_sgd signum yogi acprop ademamix adopt cocob madgrad "
                "simplified_ademamix").split()
_WHOLE_TREE = "dadapt_adamw dog dowg prodigy".split()
_PER_ENTRY = "fromage lamb lars novograd".split()
_MATRIX = "adafactor muon".split()
OPTIMIZERS = tuple(sorted(_ELEMENTWISE + _WHOLE_TREE + _PER_ENTRY + _MATRIX))

_REFUSED = {
    "lbfgs": "its line search evaluates the loss again",
    "polyak_sgd": "its update needs the loss value",
    "momo": "its update needs the loss value",
    "momo_adam": "its update needs the loss value",
    "sophia": "it needs Hessian estimates",
    "galore": "its projections are not kept per parameter",
    "sm3": "its state is kept per axis",
    "rprop": "its learning rate is no schedule",
    "noisy_sgd": "its noise depends on how layers are stacked",
    "dpsgd": "it needs a gradient per example",
    "schedule_free": "it evaluates at other parameters than it trains",
    "schedule_free_sgd": "it evaluates at other parameters than it trains",
    "schedule_free_adamw": "it evaluates at other parameters than it trains",
}
# Steps whose size does not depend on the gradient's scale: muP's hidden learning rate goes as 1 / width (arXiv:2203.03466, table 8).
_MUP_WIDTH = set("adabelief adam adamax adamaxw adamw adan amsgrad lion nadam nadamw radam sign_sgd signum yogi ademamix adopt acprop "
                 "rmsprop".split())
_FIELDS = set("name lr schedule warmup_steps final_lr_ratio decay_steps decay_ratio decay_shape decay_half_life b1 b2 eps weight_decay "
              "decay_embeddings clip options frozen".split())
_MUON_OPTIONS = set("ns_coeffs ns_steps beta eps mu_dtype nesterov preconditioning consistent_rms adam_lr_ratio".split())


FROZEN = "frozen"


class Groups(NamedTuple):
    """path -> what happens to it."""

    optimizer: dict  # name of the optimiser, FROZEN for none
    decay: dict  # bool
    lr_multiplier: dict  # float; muP and Muon's AdamW part


def make_optimizer(optim_config, infos, shapes, steps, *, mup_width_multiplier=None, sequential_above=None):
    """The optax transformation of config.optim for parameters with these ParamInfos and shapes (path -> tuple).

    optim_config: name; lr, schedule and its fields (see make_schedule); b1, b2, eps for optimisers that take them (None = optax's default;
    never for Adafactor, whose eps means something else); weight_decay, decay_embeddings (True); clip (global norm; 0 or None = off);
    options, the optimiser's own keyword arguments with dtypes as strings (muon: those of optax.contrib.scale_by_muon, `consistent_rms`,
    `adam_lr_ratio`); frozen: shell patterns of paths ("media.encoder.*") of parameters that stay as they are, without optimiser state and
    outside the gradient norm.
    Decay: matrices (and embeddings if so configured); never norms, biases or other vectors.
    Statistics are float32 also for bfloat16 parameters or gradients, unless an option such as `mu_dtype` says otherwise.
    mup_width_multiplier: width / base width; see `groups`.
    sequential_above: arrays of more bytes are updated layer by layer in a loop, which saves twice their size in temporaries where memory
    is short (a CPU); None never does. Not for arrays whose `layers` dim is sharded.
    update(grads, state, params, grad_scale=s) is the update for s * grads, without a scaled or float32 copy of large gradients.
    State: {"grad_norm": norm of the gradients before clipping, "groups": {optimiser: its optax state}, "decay": DecayState}.
    """
    c = _checked(optim_config)
    schedule = make_schedule(c, steps)
    g = groups(c, infos, mup_width_multiplier=mup_width_multiplier)
    for path, info in infos.items():
        if len(info.dim_names) != len(shapes[path]):
            raise ValueError(f"make_optimizer: {path} has shape {tuple(shapes[path])} but dim names {info.dim_names}.")
    above = math.inf if sequential_above is None else sequential_above
    parts = {}
    trained = [p for p in infos if g.optimizer[p] != FROZEN]
    for name in dict.fromkeys(g.optimizer[p] for p in trained):
        mine = {p: i for p, i in infos.items() if g.optimizer[p] == name}
        parts[name] = mine, _direction(name, c, schedule, mine, above, mup_width_multiplier)
    decay = _decoupled_decay(float(c["weight_decay"]), schedule, g.decay)

    def init(params):
        states = {name: part.init({p: params[p] for p in mine}) for name, (mine, part) in parts.items()}
        return {"grad_norm": jnp.zeros((), jnp.float32), "groups": states, "decay": decay.init(params)}

    def update(grads, state, params=None, *, grad_scale=None, **_):
        if params is None:
            raise ValueError("optimizer.update needs the parameters: update(grads, state, params).")
        norm, scale = global_norm({p: grads[p] for p in trained}, above), grad_scale
        if grad_scale is not None:
            norm = norm * grad_scale
        if c["clip"]:
            factor = jnp.minimum(1.0, c["clip"] / jnp.maximum(norm, 1e-30))
            scale = factor if scale is None else scale * factor
        updates, states = {}, {}
        for name, (mine, part) in parts.items():
            u, states[name] = part.update({p: grads[p] for p in mine}, state["groups"][name], {p: params[p] for p in mine}, scale)
            updates |= {p: x if g.lr_multiplier[p] == 1 else x * g.lr_multiplier[p] for p, x in u.items()}
        updates = {p: updates[p] if p in updates else jnp.zeros_like(params[p]) for p in grads}
        updates, decayed = decay.update(updates, state["decay"], params)
        return updates, {"grad_norm": norm, "groups": states, "decay": decayed}

    return optax.GradientTransformationExtraArgs(init, update)


def global_norm(tree, sequential_above=math.inf):
    """The float32 Euclidean norm of all arrays of a dict together."""
    def square_sum(x):
        # A reduction over the squares of a large array keeps them all on CPU; one layer at a time it keeps few.
        if x.ndim > 1 and x.size * 4 > sequential_above:
            return jnp.sum(jax.lax.map(square_sum, x))
        return jnp.sum(jnp.square(x.astype(jnp.float32)))
    return jnp.sqrt(sum(square_sum(x) for x in tree.values()))


def groups(optim_config, infos, *, mup_width_multiplier=None):
    """Groups: which optimiser, decay and learning-rate multiplier each parameter gets.

    muP (arXiv:2203.03466): matrices that are neither embedding nor head have their Adam-type learning rate divided by the width multiplier
    m, embedding and head by sqrt(m): they are drawn with std 1/sqrt(width) and scaled by the model, which is the paper's table 8 up to a
    change of units. Decay is left alone. Muon then uses the spectral scale sqrt(max(1, out / in)), which transfers by itself.
    """
    c = _checked(optim_config)
    name, width = c["name"], float(mup_width_multiplier or 1)
    optimizer, decay, multiplier = {}, {}, {}
    frozen = _frozen(c["frozen"], infos)
    for path, info in infos.items():
        if path in frozen:
            optimizer[path], decay[path], multiplier[path] = FROZEN, False, 1.0
            continue
        hidden = info.is_matrix and "vocab" not in info.dim_names
        optimizer[path] = ("muon" if hidden else "adamw") if name == "muon" else name
        decay[path] = bool(c["weight_decay"]) and (hidden or "vocab" in info.dim_names and (is_head(info) or c["decay_embeddings"]))
        table = "vocab" in info.dim_names and optimizer[path] in _MUP_WIDTH
        multiplier[path] = 1 / width if hidden and optimizer[path] in _MUP_WIDTH | {"adafactor"} else width**-0.5 if table else 1.0
        if name == "muon" and not hidden:
            multiplier[path] *= float(c["options"].get("adam_lr_ratio", 1.0))
    if width != 1:
        _check_mup(c)
    return Groups(optimizer, decay, multiplier)


def is_head(info):
    """True for the output projection: it sums over the model dim and gives vocabulary entries in its last dims."""
    return info.is_matrix and "vocab" in info.dim_names and info.dim_names[-1] == "vocab"


def describe(optim_config, infos, shapes, *, mup_width_multiplier=None):
    """(text, dict) for the run's log: one row per (optimiser, decay, multiplier) with its arrays and parameter count."""
    g = groups(optim_config, infos, mup_width_multiplier=mup_width_multiplier)
    rows = {}
    for path in infos:
        rows.setdefault((g.optimizer[path], g.decay[path], g.lr_multiplier[path]), []).append(path)
    table = [{"optimizer": name, "weight_decay": decay, "lr_multiplier": multiplier, "parameters": sum(math.prod(shapes[p]) for p in paths),
              "paths": paths} for (name, decay, multiplier), paths in rows.items()]
    lines = []
    for row in table:
        leaves = sorted({p.rsplit(".", 1)[-1] if "." in p else p for p in row["paths"]})
        rate = "" if row["lr_multiplier"] == 1 else f", lr x {row['lr_multiplier']:.4g}"
        decays = "" if row["optimizer"] == FROZEN else ", decay" if row["weight_decay"] else ", no decay"
        lines.append(f"{row['optimizer']}{rate}{decays}: {row['parameters']:,} parameters in "
                     f"{len(row['paths'])} arrays ({', '.join(leaves)})")
    return "\n".join(lines), {"groups": table}


def state_dim_names(abstract_opt_state, infos, shapes):
    """The optimiser state's tree with a tuple of dim names per leaf, for sharding rules; () for scalars and counters.

    A moment with its parameter's shape has its names; a factored one has the batch names and the first name of the dims it keeps.
    """
    def names(keypath, leaf):
        last = keypath[-1] if keypath else None
        path = getattr(last, "key", None) if isinstance(last, jax.tree_util.DictKey) else None
        if path not in infos:
            return (None,) * len(leaf.shape)
        if tuple(leaf.shape) == tuple(shapes[path]):
            return infos[path].dim_names
        view = _View(infos[path], shapes[path], matrix=True)
        for group, size in zip(view.groups, view.core):
            if tuple(leaf.shape) == (*view.batch, size):
                return (*(infos[path].dim_names[d] for d in view.batch_dims), infos[path].dim_names[group[0]] if group else None)
        return tuple(infos[path].dim_names[view.batch_dims[i]] if i < len(view.batch) and n == view.batch[i] else None
                     for i, n in enumerate(leaf.shape))
    return jax.tree_util.tree_map_with_path(names, abstract_opt_state)


class _View:
    """An array as [batch dims..., rows, columns], or [batch dims..., core dims...] when `matrix` is false, and back.

    Rows and columns are the input and the output dims of a matrix, or vocab and the rest of an embedding, in their order in the array;
    without either the core is one vector.
    """

    def __init__(self, info, shape, *, matrix):
        names, dims = info.dim_names, range(len(shape))
        self.batch_dims = [d for d in dims if names[d] in info.batch_dims]
        core = [d for d in dims if d not in self.batch_dims]
        first = [d for d in core if names[d] in info.in_dims] if info.is_matrix else [d for d in core if names[d] == "vocab"]
        second = [d for d in core if d not in first]
        if not matrix:
            self.groups = [[d] for d in core]
        elif first and second:
            self.groups = sorted((first, second))
        else:
            self.groups = [core]
        self.order = self.batch_dims + [d for group in self.groups for d in group]
        self.moved = tuple(shape[d] for d in self.order)
        self.batch = tuple(shape[d] for d in self.batch_dims)
        self.core = tuple(math.prod(shape[d] for d in group) for group in self.groups)

    def batch_first(self, x):
        """Batch dims first, then the dims of the first and of the second group; one entry reshapes to `core`."""
        return x.transpose(self.order)

    def back(self, x):
        """The inverse of batch_first."""
        return x.transpose(sorted(range(len(self.order)), key=self.order.__getitem__))


def _direction(name, c, schedule, infos, above, mup_width_multiplier):
    """The _Part of one group of parameters: the update without decay, already times -lr(step)."""
    if name == "muon":
        return _muon(c, schedule, infos, above, spectral=(mup_width_multiplier or 1) != 1)
    build = getattr(optax, name, None) or getattr(optax.contrib, name)
    accepted = inspect.signature(build).parameters
    options = {} if c["name"] == "muon" else dict(c["options"])
    for key in options:
        if key not in accepted or key in ("learning_rate", "weight_decay", "weight_decay_rate", "mask", "weight_decay_mask"):
            raise ConfigError(f"optim.options: {name} does not take {key!r} here.{nearest(key, set(accepted) - {'learning_rate'})}")
    if name != "adafactor":
        options = {k: c[k] for k in ("b1", "b2", "eps") if c[k] is not None and k in accepted} | options
    if "weight_decay" in accepted:
        options["weight_decay"] = 0.0
    inner = build(schedule, **{k: _dtype(k, v) for k, v in options.items()})
    if name in _PER_ENTRY + _MATRIX:
        return _per_entry(inner, infos, above, matrix=name in _MATRIX)
    return _on_arrays(inner)


def _muon(c, schedule, infos, above, spectral):
    """Muon (arXiv:2502.16982): orthogonalised momentum, scaled to Adam's update size 0.2 sqrt(max(in, out)) unless consistent_rms=None."""
    options = {k: _dtype(k, v) for k, v in c["options"].items()}
    for key in options:
        if key not in _MUON_OPTIONS:
            raise ConfigError(f"optim.options: muon does not take {key!r} here.{nearest(key, _MUON_OPTIONS)}")
    options.pop("adam_lr_ratio", None)
    rms = options.pop("consistent_rms", None if spectral else 0.2)
    dims = {}
    for path, info in infos.items():
        core = [n for n in info.dim_names if n not in info.batch_dims]
        inputs = tuple(d for d, n in enumerate(core) if n in info.in_dims)
        dims[path] = optax.contrib.MuonDimensionNumbers(inputs, tuple(d for d in range(len(core)) if d not in inputs))

    def scale(path, update):
        fan_in = math.prod(update.shape[d] for d in dims[path].reduction_axis)
        fan_out = math.prod(update.shape[d] for d in dims[path].output_axis)
        return update * (math.sqrt(max(1, fan_out / fan_in)) if rms is None else rms * math.sqrt(max(fan_in, fan_out)))

    inner = optax.contrib.scale_by_muon(weight_dimension_numbers=lambda params: {p: dims[p] for p in params}, **options)
    shape_scale = optax.stateless(lambda updates, _: {p: scale(p, u) for p, u in updates.items()})
    return _per_entry(optax.chain(inner, shape_scale, optax.scale_by_learning_rate(schedule)), infos, above, matrix=False)


class _Part(NamedTuple):
    """A transformation whose update also takes the clipping factor (or None) and any float dtype; it computes in float32."""

    init: Callable
    update: Callable


def _float32(x, scale=None):
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return x if scale is None else x * scale


def _on_arrays(inner):
    """`inner` on the arrays as they are."""
    def init(params):
        return inner.init(jax.tree.map(_float32, params))

    def update(grads, state, params, scale):
        return inner.update({p: _float32(x, scale) for p, x in grads.items()}, state, jax.tree.map(_float32, params))

    return _Part(init, update)


def _per_entry(inner, infos, above, *, matrix):
    """`inner` as if every batch entry (layer, expert) of every array were a parameter of its own.

    The state has inner's structure: statistics of path p are stacked over p's batch dims, counters are shared. Conversions and views happen
    inside the loop over layers where there is one, so that they never exist for all layers at once.
    """
    def entry(path, x):
        """(view, abstract state of one entry of the array): where a state leaf belongs is read off its key path."""
        view = _View(infos[path], x.shape, matrix=matrix)
        return view, jax.eval_shape(inner.init, {path: jax.ShapeDtypeStruct(view.core, jnp.promote_types(x.dtype, jnp.float32))})

    def whole(params):
        return jax.eval_shape(inner.init, {p: jax.ShapeDtypeStruct(entry(p, x)[0].core, jnp.promote_types(x.dtype, jnp.float32))
                                           for p, x in params.items()})

    def parts_of(path, state):
        """(leaves of this path, shared leaves) by key path."""
        leaves = jax.tree_util.tree_flatten_with_path(state)[0]
        mine = [k[-1] == jax.tree_util.DictKey(path) for k, _ in leaves]
        return tuple({jax.tree_util.keystr(k): v for (k, v), m in zip(leaves, mine) if m == kind} for kind in (True, False))

    def fill(abstract, leaves):
        return jax.tree_util.tree_map_with_path(lambda k, _: leaves[jax.tree_util.keystr(k)], abstract)

    def over_batch(f, view, nbytes, args):
        """f over all batch dims; its results are (batched, shared)."""
        loop = view.batch and nbytes > above
        for _ in view.batch[1 if loop else 0:]:
            f = jax.vmap(f, out_axes=(0, None))
        if not loop:
            return f(*args)
        batched, shared = jax.lax.map(lambda xs: f(*xs), args)
        return batched, jax.tree.map(lambda x: x[0], shared)

    def init(params):
        leaves = {}
        for path, x in params.items():
            view, _ = entry(path, x)

            def one(value, path=path, view=view):
                return parts_of(path, inner.init({path: _float32(value).reshape(view.core)}))
            own, shared = over_batch(one, view, x.size * 4, (view.batch_first(x),))
            leaves |= own | shared
        return fill(whole(params), leaves)

    def update(grads, state, params, scale):
        old = {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_flatten_with_path(state)[0]}
        leaves, updates = {}, {}
        for path, x in params.items():
            view, abstract = entry(path, x)
            own, shared = parts_of(path, fill(abstract, old))

            def one(grad, own, value, path=path, view=view, abstract=abstract, shared=shared):
                grad, value = _float32(grad, scale).reshape(view.core), _float32(value).reshape(view.core)
                new, state = inner.update({path: grad}, fill(abstract, own | shared), {path: value})
                own, shared = parts_of(path, state)
                return (new[path].reshape(view.moved[len(view.batch):]), own), shared
            (new, own), shared = over_batch(one, view, x.size * 4, (view.batch_first(grads[path]), own, view.batch_first(x)))
            updates[path] = view.back(new)
            leaves |= own | shared
        return updates, fill(state, leaves)

    return _Part(init, update)


class DecayState(NamedTuple):
    """Steps taken."""

    count: jax.Array


def _decoupled_decay(rate, schedule, mask):
    """updates - lr(step) * rate * p where the mask is true."""
    def init(params):
        del params
        return DecayState(jnp.zeros((), jnp.int32))

    def update(updates, state, params=None):
        factor = schedule(state.count) * rate if rate else None
        new = {p: u - (factor * params[p]).astype(u.dtype) if mask[p] else u for p, u in updates.items()}
        return new, DecayState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


def _checked(config):
    """config.optim as a plain dict with every default, or ConfigError with the nearest name."""
    c = dict(config.to_dict() if hasattr(config, "to_dict") else config)
    for key in c:
        if key not in _FIELDS:
            raise ConfigError(f"optim: unknown field {key!r}.{nearest(key, _FIELDS)}")
    defaults = {"name": "adamw", "b1": None, "b2": None, "eps": None, "weight_decay": 0.0, "decay_embeddings": True, "clip": None}
    c = defaults | c | {"options": dict(c.get("options") or {}), "frozen": c.get("frozen") or ()}
    if c["name"] in _REFUSED:
        raise ConfigError(f"optim.name: {c['name']!r} cannot be used here: {_REFUSED[c['name']]}. Available: {', '.join(OPTIMIZERS)}.")
    if c["name"] not in OPTIMIZERS:
        raise ConfigError(f"optim.name: unknown {c['name']!r}.{nearest(c['name'], OPTIMIZERS)}")
    return c


def _frozen(patterns, infos):
    """The paths that match; ConfigError for a pattern that matches none, or where all of them match."""
    found = set()
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        matching = fnmatch.filter(infos, pattern)
        if not matching:
            raise ConfigError(f"optim.frozen: {pattern!r} matches no parameter.{nearest(pattern, infos)}")
        found.update(matching)
    if len(found) == len(infos):
        raise ConfigError("optim.frozen: nothing is left to train; give fewer patterns.")
    return found


def _check_mup(c):
    name = c["name"]
    if name == "adafactor" and c["options"].get("multiply_by_parameter_scale", True):
        raise ConfigError("optim: muP with adafactor needs options={'multiply_by_parameter_scale': False}; its relative step sizes already "
                          "depend on the width.")
    if name == "muon" and c["options"].get("consistent_rms") is not None:
        raise ConfigError("optim: muP with muon uses the spectral scale; leave out options['consistent_rms'].")
    if name not in _MUP_WIDTH | {"adafactor", "muon"}:
        known = ", ".join(sorted(_MUP_WIDTH | {"adafactor", "muon"}))
        raise ConfigError(f"optim: no muP rates are known for {name!r}; use one of {known}.")


@functools.cache
def _float_dtypes():
    return {n: jnp.dtype(n) for n in ("bfloat16", "float16", "float32", "float64")}


def _dtype(key, value):
    """Options whose name speaks of a dtype may be strings."""
    if "dtype" in key and isinstance(value, str):
        if value not in _float_dtypes():
            raise ConfigError(f"optim.options.{key}: unknown dtype {value!r}.{nearest(value, _float_dtypes())}")
        return _float_dtypes()[value]
    return value

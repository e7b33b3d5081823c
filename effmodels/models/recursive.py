"""A model whose layers share weights, made from one whose layers do not (relaxed recursive transformers, arXiv:2410.20672, section 2.3)."""
import math

import jax.numpy as jnp
from flax import nnx

from effmodels.config import ConfigError
from effmodels.models import sharing
from effmodels.models import state as model_state
from effmodels.models.decoder import Decoder


def recursive(model, config):
    """A Decoder of `config` from a trained `model` of the same config without sharing.

    A shared array is the mean of those of its users; each user's low-rank matrix is the best of its rank for what it differs by (truncated
    singular value decomposition), so that with full rank and equal vectors (norms) the model computes the same. Raises ConfigError when the
    models differ otherwise.
    """
    if any(getattr(sharing.check(config.sharing), part).startswith("diagonal") for part in sharing.PARTS):
        raise ConfigError("recursive: layers that share diagonal blocks only are not made from others; use cycle:n or neighbours:n.")
    plain = {f: v for f, v in vars(config).items() if f not in ("sharing", "remat", "scan_layers", "scan_neighbours", "implementation")}
    differ = [f for f, v in plain.items() if getattr(model.config, f) != v]
    if differ or model.config.sharing:
        differ = ", ".join(differ) or "sharing"
        raise ConfigError(f"recursive: the given model must have the same config without sharing, not another {differ}.")
    target = Decoder(config, rngs=nnx.Rngs(0))
    given, names = _by_name(model), model_state.manifest(target)
    owner_of = sharing.owners(target.resolved.layers)
    infos = _infos(target)
    means, found = {}, {}
    for name in names:
        if name.startswith("shared."):
            _, owner, rest = name.split(".", 2)
            part = sharing.part_of(rest.split(".")[0])
            users = [i for (p, i), o in owner_of.items() if (p, o) == (part, int(owner))]
            means[name] = found[name] = sum(given[f"layers.{i}.{rest}"] for i in users) / len(users)
        elif sharing.LOW_RANK not in name:
            found[name] = given[name]
    for name in names:
        if sharing.LOW_RANK in name and name.endswith(".a"):
            _, layer, module, key, _ = name.split(".")
            part = module.removesuffix(sharing.LOW_RANK)
            shared = f"shared.{owner_of[part, int(layer)]}.{part}."
            rest = next(n.removeprefix(shared) for n in means if n.startswith(shared) and n.removeprefix(shared).replace(".", "_") == key)
            left = given[f"layers.{layer}.{part}.{rest}"] - means[shared + rest]
            rank = sharing.check(config.sharing).rank
            found[name], found[name[:-1] + "b"] = _factors(left, infos[shared + rest], rank)
    graphdef, params, buffers = model_state.split(target)
    for held in (params, buffers):
        for path, array in held.items():
            held[path] = _placed(array, [(i, found[n]) for n, (p, i) in names.items() if p == path])
    return model_state.merge(graphdef, params, buffers)


def _by_name(model):
    """canonical name -> array."""
    _, params, buffers = model_state.split(model)
    arrays = {**params, **buffers}
    return {name: arrays[path] if index is None else arrays[path][index] for name, (path, index) in model_state.manifest(model).items()}


def _infos(model):
    """canonical name -> ParamInfo of one layer."""
    infos = model_state.info(model)
    return {
        name: infos[path] if index is None else type(infos[path])(
            infos[path].dim_names[1:], infos[path].in_dims, tuple(d for d in infos[path].batch_dims if d != "layers"))
        for name, (path, index) in model_state.manifest(model).items()
    }  # fmt: skip


def _placed(array, given):
    value = given[0][1] if given[0][0] is None else jnp.stack([v for _, v in sorted(given, key=lambda pair: pair[0])])
    if value.shape != array.shape:
        raise ConfigError(f"recursive: expected an array of {array.shape}, got {value.shape}.")
    return value.astype(array.dtype)


def _factors(array, info, rank):
    """(a, b) whose product is the best approximation of that rank of every matrix of the array, in the dims of `sharing.Factors`."""
    into = [d for d in info.dim_names if d in info.in_dims]
    out = [d for d in info.dim_names if d not in info.in_dims and d not in info.batch_dims]
    order = [info.dim_names.index(d) for d in (*info.batch_dims, *into, *out)]
    sizes = dict(zip(info.dim_names, array.shape))
    lead, rows, columns = ([sizes[d] for d in dims] for dims in (info.batch_dims, into, out))
    matrix = jnp.transpose(array, order).reshape(*lead, math.prod(rows), math.prod(columns))
    u, s, v = jnp.linalg.svd(matrix, full_matrices=False)
    keep = min(rank, s.shape[-1])
    root = jnp.sqrt(s[..., :keep])
    a, b = u[..., :keep] * root[..., None, :], root[..., :, None] * v[..., :keep, :]
    pad = [(0, 0)] * len(lead)
    a = jnp.pad(a, [*pad, (0, 0), (0, rank - keep)])
    b = jnp.pad(b, [*pad, (0, rank - keep), (0, 0)])
    return a.reshape(*lead, *rows, rank), b.reshape(*lead, rank, *columns)


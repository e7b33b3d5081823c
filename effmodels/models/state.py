"""A model's arrays as plain dictionaries by path, and the canonical names that do not depend on how layers were grouped."""
import re

import jax
from flax import nnx

from effmodels.layers.param import Buffer
from effmodels.models import sharing

_IN_SEGMENT = re.compile(r"segments\.(\d+)\.blocks\.(\d+)\.(.+)")
_SHARED = re.compile(r"shared\.(\d+)\.(.+)")
_STACKED = re.compile(r"(media\..*layers)\.(.+)")


def split(model):
    """(graphdef, params, buffers): dicts of arrays by path, such as "segments.0.blocks.1.mixer.wq" or "embed"."""
    graphdef, params, buffers = nnx.split(model, nnx.Param, Buffer)
    return graphdef, _flat(params), _flat(buffers)


def merge(graphdef, params, buffers):
    """The model of `split`'s graphdef with these arrays."""
    flat = {_key(path): value for path, value in {**params, **buffers}.items()}
    return nnx.merge(graphdef, nnx.State(_nest(flat)))


def info(model):
    """path -> ParamInfo of every parameter and buffer; the model may be abstract."""
    return {_path(keys): v.get_metadata()["info"] for keys, v in nnx.to_flat_state(nnx.state(model))}


def manifest(model):
    """canonical name -> (path, index into the stack or None), for every parameter and buffer.

    Canonical: "embed", "head", "final_norm.scale", "layers.<absolute i>.<mixer|channel|norm...>.<param>"; never a segment index. Weights
    that layers share are "shared.<first layer that uses them>...", those of an encoder's layers "media.encoder.layers.<i>...".
    """
    kinds, runs = model.resolved.layers, model.segments
    lenders, held = set(sharing.owners(kinds).items()), [owner for owner, _ in sharing.sources(runs, kinds)[0]]
    trained = {_path(keys) for keys, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    names, sizes = {}, {_path(keys): v.shape for keys, v in nnx.to_flat_state(nnx.state(model))}
    for path in info(model):
        match, stacked = _IN_SEGMENT.fullmatch(path), _STACKED.fullmatch(path)
        if stacked:
            names |= {f"{stacked[1]}.{i}.{stacked[2]}": (path, i) for i in range(sizes[path][0])}
        elif match is None:
            j = _SHARED.fullmatch(path)
            names[path if j is None else f"shared.{held[int(j[1])]}.{j[2]}"] = (path, None)
        if match is None:
            continue
        run, rest = runs[int(match[1])], match[3]
        part = sharing.part_of(rest.split(".")[0])
        for r in range(run.repeats):
            layer = run.start + r * run.period + int(match[2])
            owns = ((part, layer), layer) in lenders and path in trained
            names[f"{'shared' if owns else 'layers'}.{layer}.{rest}"] = (path, r if run.repeats > 1 else None)
    return names


def num_params(model):
    """The number of trained values; the model may be abstract."""
    return sum(v.size for v in jax.tree.leaves(nnx.split(model, nnx.Param, ...)[1]))


def _flat(state):
    return {_path(keys): v.get_value() for keys, v in nnx.to_flat_state(state)}


def _path(keys):
    return ".".join(map(str, keys))


def _key(path):
    return tuple(int(k) if k.isdigit() else k for k in path.split("."))


def _nest(flat):
    nested = {}
    for keys, value in flat.items():
        node = nested
        for k in keys[:-1]:
            node = node.setdefault(k, {})
        node[keys[-1]] = value
    return nested

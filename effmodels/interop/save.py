"""A model as a Hugging Face folder: the inverse of `load`, tensor by tensor, one on the host at a time."""
import json
import math
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np

from effmodels.interop import folder, record, safetensors
from effmodels.interop.compare import differences
from effmodels.interop.errors import InteropError
from effmodels.interop.fields import Fields
from effmodels.interop.load import canonical_shapes
from effmodels.interop.registry import FAMILIES, get_family
from effmodels.interop.table import expand
from effmodels.interop.tokenizer import save_tokenizer
from effmodels.models import state as model_state

MAX_SHARD_BYTES = 5_000_000_000
MARGIN = 1 << 20  # bytes of headers and JSON


def save_pretrained(model, path, *, tokenizer=None, model_type=None, dtype=None, max_shard_bytes=MAX_SHARD_BYTES):
    """Writes config.json, safetensors files of at most max_shard_bytes (a larger tensor has a file of its own) and tokenizer files.

    model_type: the family to write it as; default: the one it was loaded from, else the first whose config can say all of it. dtype: of all
    tensors; default: as they are, and as they were in the file for a model that `load_pretrained` made. Other weights in the folder are
    replaced. Raises InteropError, with nothing written, when no family can hold the model or the disk has no room.
    """
    path = pathlib.Path(path).expanduser()
    graphdef, params, buffers = model_state.split(model)
    del graphdef
    arrays, manifest = {**params, **buffers}, model_state.manifest(model)
    if not all(a.is_fully_addressable for a in arrays.values()):
        raise InteropError("save_pretrained: the arrays are spread over several processes; write from one (restore the run there first).")
    family, config, origin = _family(model, model_type)
    entries = expand(family, canonical_shapes(arrays, manifest), model.resolved)
    tensors, embedding = {}, None
    for entry in entries:
        name = entry.theirs if origin is None or origin.prefixed else entry.theirs.removeprefix(family.prefix)
        tensors[name] = _tensor(entry, arrays, manifest, _dtype(entry, name, arrays, manifest, dtype, origin))
        embedding = tensors[name] if entry.pieces[0].name == "embed" else embedding
    if origin is not None and origin.duplicate is not None:
        tensors[origin.duplicate] = embedding
    copies = origin.copies if origin is not None else {} if family.copies is None else family.copies(model.resolved)
    tensors |= {name: tensors[original] for name, original in copies.items()}
    shards = _shards(tensors, max_shard_bytes)
    _check_disk(path, sum(map(_nbytes, tensors.values())))
    path.mkdir(parents=True, exist_ok=True)
    _write(path, shards, tensors)
    main = jnp.dtype(dtype or model.config.param_dtype).name
    text = {"architectures": [family.architecture], "model_type": family.model_type, "dtype": main, **config}
    (path / folder.CONFIG).write_text(json.dumps(text | {"dtype": main}, indent=2) + "\n")
    if tokenizer is not None:
        save_tokenizer(tokenizer, path)
    return family.model_type


def _family(model, model_type):
    """(Family, fields of config.json, Record or None)."""
    origin = record.of(model)
    if origin is not None and model_type in (None, origin.model_type):
        config = {k: v for k, v in origin.config.items() if k not in ("torch_dtype", "dtype")}
        return get_family(origin.model_type), config, origin
    refused = {}
    for name in [model_type] if model_type else FAMILIES:
        family = get_family(name)
        try:
            return family, export_fields(family, model), None
        except InteropError as error:
            refused[name] = str(error)
    if model_type:
        raise InteropError(f"this model cannot be written as {model_type}: {refused[model_type]}")
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
    raise InteropError(f"no family of checkpoints can hold this model. {reasons}")


def export_fields(family, model):
    """config.json's fields of a model in a family; InteropError when they, read again, would give another model."""
    fields = family.write(model.resolved)
    shapes = canonical_shapes(*_arrays(model))
    again = family.read(Fields(fields, family.model_type))
    if family.seen is not None:
        again = family.seen(again, [entry.theirs for entry in expand(family, shapes, model.resolved)])
    found = differences(model.config, again)
    if found:
        raise InteropError(f"its config cannot say {', '.join(found[:6])}")
    expand(family, shapes, model.resolved)
    return fields


def _arrays(model):
    _, params, buffers = model_state.split(model)
    return {**params, **buffers}, model_state.manifest(model)


def _dtype(entry, name, arrays, manifest, dtype, origin):
    if dtype is not None:
        return np.dtype(jnp.dtype(dtype))
    if origin is not None and name in origin.dtypes:
        return np.dtype(jnp.dtype(origin.dtypes[name]))
    return np.dtype(arrays[manifest[entry.pieces[0].name][0]].dtype)


def _tensor(entry, arrays, manifest, dtype):
    """(dtype, shape, function that makes it)."""

    def make():
        out = np.empty(entry.shape, dtype)
        for piece in entry.pieces:
            path, layer = manifest[piece.name]
            index = tuple(i for i in (layer, piece.index) if i is not None)
            array = arrays[path]
            piece.put(out, np.asarray(array[index] if index else array))
        return out

    return dtype, entry.shape, make


def _nbytes(tensor):
    return math.prod(tensor[1]) * tensor[0].itemsize


def _shards(tensors, most):
    """Names of tensors per file, in order, each file at most `most` bytes or one tensor."""
    shards, size = [[]], 0
    for name, tensor in tensors.items():
        if shards[-1] and size + _nbytes(tensor) > most:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _nbytes(tensor)
    return shards


def _check_disk(path, need):
    at = path
    while not at.exists():
        at = at.absolute().parent
    free = shutil.disk_usage(at).free
    if need + MARGIN > free:
        raise InteropError(f"{path}: the weights take {need / 1e9:.2f} GB and {free / 1e9:.2f} GB of disk is free; nothing was written.")


def _write(path, shards, tensors):
    """The safetensors files and their index; weights of an earlier save are removed once the new ones are whole."""
    n = len(shards)
    names = [folder.WEIGHTS] if n == 1 else [f"model-{k + 1:05d}-of-{n:05d}.safetensors" for k in range(n)]
    for name, shard in zip(names, shards):
        safetensors.write(path / name, {t: tensors[t] for t in shard}, {"format": "pt"})
    index = path / folder.INDEX
    if n > 1:
        where = {t: name for name, shard in zip(names, shards) for t in shard}
        total = sum(map(_nbytes, tensors.values()))
        index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2) + "\n")
    elif index.exists():
        index.unlink()
    for stale in path.glob("model*.safetensors"):
        if stale.name not in names:
            stale.unlink()

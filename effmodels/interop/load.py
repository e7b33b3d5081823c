"""Weights of the outside into a model: every tensor used exactly once, read from mapped files straight onto the mesh."""
import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import SingleDeviceSharding

from effmodels.data.tokenizer import from_file
from effmodels.interop import place
from effmodels.interop.errors import InteropError
from effmodels.interop.fields import Fields
from effmodels.interop.folder import Folder
from effmodels.interop.layout import contiguous
from effmodels.interop.record import Record
from effmodels.interop.registry import get_family
from effmodels.interop.table import expand
from effmodels.models import Decoder
from effmodels.models import state as model_state
from effmodels.parallel import axes

FLOATS = ("float64", "float32", "float16", "bfloat16")


def load_pretrained(path, *, dtype=None, mesh=None, rules=None, overrides=None):
    """(model, tokenizer or None) of a Hugging Face folder: config.json, one or several safetensors files, tokenizer files.

    dtype: of parameters and of the computation; None: every array as in the file. mesh, rules: where arrays go, shard by shard; default:
    the first device. overrides: fields of ModelConfig that do not change shapes (compute_dtype, scan_layers, implementation, remat, ...).
    Raises InteropError (a ConfigError) for an unknown model type, a field that is not supported, missing, extra or misshapen tensors,
    pickles, corrupt files, too little memory; all before anything is loaded.
    """
    folder, family, config = _described(path)
    kept = dtype is None
    dtype = _main_dtype(folder) if kept else jnp.dtype(dtype).name
    config = {**config, "param_dtype": dtype, "compute_dtype": dtype, **(overrides or {})}
    model = nnx.eval_shape(functools.partial(_build, config), jax.random.key(0))
    graphdef, params, buffers = model_state.split(model)
    manifest = model_state.manifest(model)
    leaves = {**params, **buffers}
    table = expand(family, canonical_shapes(leaves, manifest), model.resolved)
    entries, record = _match(folder, family, table, model.resolved)
    dtypes = _dtypes(folder, entries, manifest, {p: a.dtype for p, a in leaves.items()}, set(params) if kept else set())
    tokenizer = load_tokenizer(folder.path, model.config.vocab_size)
    shardings = _shardings(model, leaves, mesh, rules)
    place.check_memory(shardings, {p: (leaves[p].shape, dtypes[p]) for p in leaves})
    arrays = _load(folder, entries, manifest, leaves, dtypes, shardings)
    model = model_state.merge(graphdef, {p: arrays[p] for p in params}, {p: arrays[p] for p in buffers})
    exceptions = {e.theirs: folder.dtype(e.theirs).name for e in entries if kept and folder.dtype(e.theirs) != _leaf(e, manifest, dtypes)}
    model.pretrained = Record(family.model_type, folder.config, exceptions, **record).to_json()
    return model, tokenizer


def pretrained_config(path):
    """The mapping of a ModelConfig of a Hugging Face folder; raises InteropError as `load_pretrained`. No tensor is read."""
    return _described(path)[2]


def _described(path):
    """(Folder, Family, mapping of a ModelConfig) of a Hugging Face folder."""
    folder = Folder(path)
    family, config = model_config(folder.config)
    return folder, family, config if family.seen is None else family.seen(config, folder.names())


def model_config(fields):
    """(Family, mapping of a ModelConfig) of the object in a config.json; InteropError for what is not supported."""
    model_type = fields.get("model_type")
    if model_type is None:
        raise InteropError("config.json has no model_type.")
    family = get_family(model_type)
    fields = Fields(fields, model_type)
    if fields.given("quantization_config"):
        raise InteropError("config.json: quantization_config: quantised checkpoints are not read; take the bfloat16 or float32 one.")
    config = family.read(fields)
    unread = fields.unread()
    if unread:
        text = ", ".join(f"{k}={str(v)[:60]}" for k, v in unread.items())
        warnings.warn(f"config.json of this {model_type} has fields that are not known here and are left out: {text}", stacklevel=3)
    return family, config


def load_tokenizer(path, vocab_size):
    """The tokenizer of a folder, or None where it has none; InteropError when it has more ids than the model."""
    found = [path / name for name in ("tokenizer.json", "tokenizer.model") if (path / name).exists()]
    if not found:
        return None
    tokenizer = from_file(found[0])
    if tokenizer.vocab_size > vocab_size:
        raise InteropError(f"{found[0]} has ids up to {tokenizer.vocab_size - 1}, and config.json a vocabulary of {vocab_size}.")
    return tokenizer


def canonical_shapes(leaves, manifest):
    """canonical name -> shape of one layer's array. leaves: path -> array."""
    return {name: tuple(leaves[path].shape[0 if i is None else 1 :]) for name, (path, i) in manifest.items()}


def _build(config, key):
    return Decoder(config, rngs=nnx.Rngs(key))


def _main_dtype(folder):
    """The dtype of most values; InteropError for tensors that are not of floating point."""
    sizes = {}
    for name in folder.names():
        sizes[folder.dtype(name).name] = sizes.get(folder.dtype(name).name, 0) + np.prod(folder.shape(name), dtype=np.int64)
    floats = {name: n for name, n in sizes.items() if name in FLOATS}
    if not floats:
        raise InteropError(f"{folder.path}: no tensor is of {', '.join(FLOATS)}; found {', '.join(sizes) or 'none'}.")
    return max(floats, key=floats.get)


def _match(folder, family, entries, resolved):
    """(entries under the file's names, {prefixed, duplicate, copies}); InteropError unless every tensor is used exactly once and fits."""
    names = set(folder.names())
    prefixed = not family.prefix or any(n.startswith(family.prefix) for n in names)
    entries = entries if prefixed else [_renamed(e, family.prefix) for e in entries]
    wanted = {e.theirs: e for e in entries}
    duplicate = None
    if resolved.config.tie_embeddings:
        duplicate = _tied_copy(folder, family, wanted, prefixed)
    copies = {} if family.copies is None else family.copies(resolved)
    copies = copies if prefixed else {n.removeprefix(family.prefix): o.removeprefix(family.prefix) for n, o in copies.items()}
    copies = {n: o for n, o in copies.items() if n in names}
    missing = [n for n in wanted if n not in names]
    extra = [n for n in folder.names() if n not in wanted and n != duplicate and n not in copies and not family.ignores(n)]
    shaped = [
        f"{n} is {list(folder.shape(n))} and config.json asks for {list(e.shape)}"
        for n, e in wanted.items() if n in names and folder.shape(n) != e.shape
    ]  # fmt: skip
    typed = [f"{n} has dtype {folder.dtype(n).name}" for n in wanted if n in names and folder.dtype(n).name not in FLOATS]
    problems = [_listed("missing ", missing), _listed("not known: ", extra), _listed("", shaped), _listed("", typed)]
    if any(problems):
        text = "; ".join(filter(None, problems))
        raise InteropError(f"{folder.path}: the tensors are not those of its {family.model_type} config: {text}.")
    for name, original in copies.items():
        if not _equal(folder.read(name), folder.read(original)):
            raise InteropError(f"{folder.path}: {name} must repeat {original}, but they differ.")
    return entries, {"prefixed": prefixed, "duplicate": duplicate, "copies": copies}


def _tied_copy(folder, family, wanted, prefixed):
    """The name of a head that is stored beside the embedding it is tied to; InteropError when the two differ."""
    head = next((r.theirs for r in family.rules if r.ours == "head"), None)
    if head is None or head not in folder.files:
        return None
    table = next(e.theirs for e in wanted.values() if e.pieces[0].name == "embed")
    if table in folder.files and not _equal(folder.read(head), folder.read(table)):
        raise InteropError(f"{folder.path}: config.json ties the embeddings, but {head} and {table} differ.")
    return head


def _equal(a, b):
    """Whether two mapped tensors have the same bits, compared in parts."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return all(x.tobytes() == y.tobytes() for x, y in zip(np.array_split(a, len(a) // 4096 + 1), np.array_split(b, len(b) // 4096 + 1)))


def _renamed(entry, prefix):
    return dataclasses.replace(entry, theirs=entry.theirs.removeprefix(prefix))


def _listed(title, names, most=6):
    return title + ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "") if names else ""


def _dtypes(folder, entries, manifest, own, kept):
    """path -> dtype of the loaded array: the model's own, but for the paths in `kept` the file's (the widest of a stack's)."""
    held = {}
    for entry in entries:
        for piece in entry.pieces:
            held.setdefault(manifest[piece.name][0], set()).add(folder.dtype(entry.theirs))
    found = own | {path: functools.reduce(jnp.promote_types, sorted(held[path], key=str)) for path in kept}
    if any(d == np.float64 for d in found.values()) and not jax.config.jax_enable_x64:
        raise InteropError("float64 weights need jax_enable_x64; ask for dtype='float32', or set it.")
    return found


def _leaf(entry, manifest, dtypes):
    return dtypes[manifest[entry.pieces[0].name][0]]


def _shardings(model, leaves, mesh, rules):
    if mesh is None:
        return dict.fromkeys(leaves, SingleDeviceSharding(jax.local_devices()[0]))
    rules, infos = axes.make_rules(dict(rules) if rules else None), model_state.info(model)
    return {p: axes.parameter_sharding(leaf.shape, infos[p], mesh=mesh, rules=rules, name=p) for p, leaf in leaves.items()}


def _load(folder, entries, manifest, leaves, dtypes, shardings):
    """path -> jax.Array."""
    sources, layers = {}, {}
    for entry in entries:
        for piece in entry.pieces:
            sources.setdefault(piece.name, []).append((entry.theirs, piece))
    for name, (path, i) in manifest.items():
        layers.setdefault(path, {})[i] = name

    def reader(path):
        return lambda layer, index: _read(folder, sources[layers[path][layer]], index, dtypes[path])

    return {
        path: place.fill(leaf.shape, dtypes[path], shardings[path], reader(path), None not in layers[path]) for path, leaf in leaves.items()
    }


def _read(folder, sources, index, dtype):
    """Our array of one layer at `index`, a copy in row-major order, from its tensor or from one tensor per entry of its first dim."""
    if sources[0][1].index is None:
        ((name, piece),) = sources
        return contiguous(piece.take(folder.read(name))[index], dtype)
    parts = sorted(sources, key=lambda s: s[1].index)[index[0]]
    first = parts[0][1].take(folder.read(parts[0][0]))[index[1:]]
    out = np.empty((len(parts), *first.shape), dtype)
    for row, (name, piece) in zip(out, parts):
        row[...] = piece.take(folder.read(name))[index[1:]]
    return out

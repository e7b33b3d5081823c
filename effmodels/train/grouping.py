"""The leaves of a TrainState by canonical name, so that a state saved in one grouping of the layers fits into any other.

A leaf is known by its slot (where it is in the state without the parameter's path: "params", "opt_state.groups.adamw.0.mu") and the path of
the parameter it belongs to; the manifest tells which canonical names the path holds. One canonical part is (slot, canonical name).
"""
import dataclasses
import functools

import jax
from jax.sharding import NamedSharding, PartitionSpec


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of a state. names: its canonical names, one per layer if `stacked`, () for counters."""

    slot: str
    path: str | None
    names: tuple
    stacked: bool

    @property
    def key(self):
        """The name of the array in the checkpoint."""
        return self.slot if self.path is None else f"{self.slot}:{self.path}"

    def parts(self):
        """[(canonical part name, index into the stack or None)]."""
        if self.path is None:
            return [(self.slot, None)]
        return [(f"{self.slot}:{n}", i if self.stacked else None) for i, n in enumerate(self.names)]

    def part_shape(self, shape):
        """The shape of one part of an array of this shape."""
        return tuple(shape[1:]) if self.stacked else tuple(shape)


def leaves(state, manifest):
    """{key: (Leaf, array)} of a TrainState, concrete or abstract, in its order. manifest: canonical name -> (path, index or None)."""
    held, found = owners(manifest), {}
    for keypath, value in jax.tree_util.tree_flatten_with_path(state)[0]:
        last = keypath[-1]
        path = last.key if isinstance(last, jax.tree_util.DictKey) and last.key in held else None
        slot = ".".join(map(_name, keypath if path is None else keypath[:-1]))
        if path is None and slot.startswith(("params.", "buffers.")):
            raise ValueError(f"checkpoint: {slot} is not in the model's manifest.")
        leaf = Leaf(slot, path, *(held[path] if path else ((), False)))
        if leaf.stacked and (not value.shape or value.shape[0] != len(leaf.names)):
            raise ValueError(f"checkpoint: {leaf.key} has shape {value.shape}, but its manifest names {len(leaf.names)} layers.")
        found[leaf.key] = leaf, value
    return found


def owners(manifest):
    """path -> (canonical names in stack order, stacked)."""
    held = {}
    for name, (path, index) in manifest.items():
        held.setdefault(path, []).append((index, name))
    found = {}
    for path, entries in held.items():
        stacked = entries[0][0] is not None
        if not stacked and len(entries) > 1 or stacked and sorted(i for i, _ in entries) != list(range(len(entries))):
            raise ValueError(f"manifest: {path} is held by {entries}; a stack needs indices 0, 1, ... once each.")
        found[path] = tuple(n for _, n in (sorted(entries) if stacked else entries)), stacked
    return found


def rebuild(state, values):
    """A TrainState like `state` with `values` in the order of its leaves."""
    return jax.tree.unflatten(jax.tree.structure(state), values)


def source_sharding(source, target, target_sharding):
    """Where an array of the saved grouping goes, so that its parts lie as those of the target leaf do."""
    if not isinstance(target_sharding, NamedSharding):
        return target_sharding
    if source.stacked == target.stacked:
        return target_sharding if len(source.names) == len(target.names) else NamedSharding(
            target_sharding.mesh, PartitionSpec(None, *target_sharding.spec[1:]))
    spec = tuple(target_sharding.spec)
    spec = spec[1:] if target.stacked else spec
    return NamedSharding(target_sharding.mesh, PartitionSpec(*((None, *spec) if source.stacked else spec)))


def regroup(arrays, sources, targets):
    """{target key: array} from {source key: array}, which is emptied on the way: a source is dropped once all its parts are taken.

    sources: source key -> Leaf; targets: target key -> (Leaf, sharding). Bit-equal: slices and stacks only.
    """
    where = {part: (key, i) for key, leaf in sources.items() for part, i in leaf.parts()}
    uses = {}
    for leaf, _ in targets.values():
        for part, _ in leaf.parts():
            uses[where[part][0]] = uses.get(where[part][0], 0) + 1
    out = {}
    for key, (leaf, sharding) in targets.items():
        pieces = []
        for part, _ in leaf.parts():
            source, i = where[part]
            pieces.append(arrays[source] if i is None else _take(sharding if not leaf.stacked else None)(arrays[source], i))
            uses[source] -= 1
            if not uses[source]:
                del arrays[source]
        out[key] = _stack(sharding)(*pieces) if leaf.stacked else jax.device_put(pieces[0], sharding)
    return out


@functools.cache
def _take(sharding):
    return jax.jit(lambda x, i: jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False), **_out(sharding))


@functools.cache
def _stack(sharding):
    return jax.jit(lambda *xs: jax.numpy.stack(xs), **_out(sharding))


def _out(sharding):
    return {} if sharding is None else {"out_shardings": sharding}


def _name(key):
    for attribute in ("name", "key", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    raise TypeError(f"unknown tree key {key!r}")

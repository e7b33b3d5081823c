"""Checkpoints: asynchronous, atomic, by canonical name, with a digest per leaf that is checked before anything is trusted.

One step is one Orbax folder <directory>/<step> with two items that appear together or not at all: `state`, the arrays as they are
(stacked), and `meta`, JSON: manifest, shapes, digests, and what the host needs (data position, tokens, config, versions).

Memory. A synchronous save writes from the arrays themselves, no copy. An asynchronous one also reads them in place; a step that donates
them meanwhile gets a copy of the state. A restore into the same grouping holds the state and one array (the largest) more; into another
grouping the saved arrays are sliced one by one and dropped: the state and two of its largest arrays. Nothing is initialised first.
"""
import hashlib
import json
import logging
import shutil
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import checkpoint_managers

from effmodels.config import ConfigError
from effmodels.train import grouping
from effmodels.train.digest import digests
from effmodels.train.state import TrainState, nbytes

FORMAT = 1
_TMP = ".orbax-checkpoint-tmp"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message says which and what to do."""


class CheckpointMismatch(CheckpointError):
    """A checkpoint of another model or optimiser."""


class _Damaged(Exception):
    """What is wrong with one step's files."""


class Checkpointer:
    """Saves and restores TrainStates in one directory (local or gs://). Reading changes nothing in it; the first save cleans left-overs.

    keep: the last so many steps are kept; keep_best: and so many with the lowest `best_metric` in save(metrics=...) (best_mode "max":
    the highest).
    mode: "async" (the files are written while training goes on) or "sync" (no copy of the state, see above).
    """

    def __init__(self, directory, *, keep=2, keep_best=0, best_metric="loss", best_mode="min", mode="async", check_finite=True, log=None):
        if mode not in ("async", "sync"):
            raise ConfigError(f"checkpoint.mode={mode!r} must be 'async' or 'sync'.")
        if keep < 1 or keep_best < 0 or best_mode not in ("min", "max"):
            raise ConfigError(f"checkpoint: keep={keep} must be at least 1, keep_best={keep_best} not negative, best_mode 'min' or 'max'.")
        self.directory = epath.Path(directory)
        if not _is_remote(self.directory):
            self.directory = epath.Path(self.directory.expanduser().resolve())
        self._policy = _Keep(keep, keep_best, best_metric, best_mode)
        self._mode, self._check_finite = mode, check_finite
        self._log = log or _warn
        self._lazy_manager, self._damaged, self._wrote = None, {}, False

    def steps(self):
        """Finished steps in the directory, rising."""
        if not self.directory.exists():
            return []
        # A bucket has no atomic rename: there the mark that Orbax writes last tells a finished step.
        done = (lambda p: (p / "commit_success.txt").exists()) if _is_remote(self.directory) else (lambda p: True)
        return sorted(int(p.name) for p in self.directory.iterdir() if p.name.isdigit() and done(p))

    def latest(self):
        """The newest finished step, or None."""
        steps = [s for s in self.steps() if s not in self._damaged]
        return steps[-1] if steps else None

    def save(self, step, state, *, manifest, host, metrics=None):
        """Saves a TrainState as `step`; False if this step is already there.

        host: JSON-able dict that restore() gives back. Raises CheckpointError, with nothing written, when the disk has no room, a value is
        not finite (check_finite), or a newer step is there.
        """
        self.wait()
        self._prepare_to_write()
        newest = self.latest()
        if newest is not None and step <= newest:
            if step == newest:
                return False
            raise CheckpointError(f"checkpoint: step {step} is older than step {newest} in {self.directory}; a run that goes on from an "
                                  "older step needs a --workdir of its own.")
        self._check_space(step, state)
        leaves = grouping.leaves(state, manifest)
        values, bad = digests({k: x for k, (_, x) in leaves.items()}, {k for k, (leaf, _) in leaves.items() if leaf.stacked})
        if self._check_finite:
            self._refuse_non_finite(step, leaves, bad)
        meta = {
            "format": FORMAT,
            "manifest": {n: list(where) for n, where in manifest.items()},
            "leaves": {k: [leaf.slot, leaf.path, list(x.shape), x.dtype.name] for k, (leaf, x) in leaves.items()},
            "digests": {k: [f"{d:016x}" for d in np.atleast_1d(values[k]).tolist()] for k in leaves},
            "host": _jsonable(host),
        }
        meta["sha256"] = _sha256(meta)
        arrays = {k: x for k, (_, x) in leaves.items()}
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(arrays), meta=ocp.args.JsonSave(meta))
        self._manager.save(int(step), args=args, metrics={k: float(v) for k, v in (metrics or {}).items()}, force=True)
        return True

    def restore(self, abstract_state, *, manifest, step=None):
        """(TrainState, host, step) of the newest good checkpoint, or of `step`.

        abstract_state: TrainState of ShapeDtypeStructs with shardings (any mesh, any grouping of the same layers); opt_state=None
        restores the model only. A damaged step is named and passed over for the one before it. Raises CheckpointMismatch for a
        checkpoint of another model, CheckpointError if none is good.
        """
        wanted = grouping.leaves(_with_shardings(abstract_state), manifest)
        for _, x in wanted.values():
            x.sharding.shard_shape(x.shape)  # a sharding that does not divide is the caller's error, no damage
        steps = self.steps() if step is None else [int(step)]
        if not steps or step is not None and int(step) not in self.steps():
            have = f"it has {self.steps()}" if self.steps() else "it has none"
            raise CheckpointError(f"checkpoint: no {'checkpoint' if step is None else f'step {step}'} in {self.directory}; {have}.")
        for s in reversed(steps):
            try:
                read = self._read_step(s, wanted, model_only=abstract_state.opt_state is None)
            except (CheckpointMismatch, MemoryError, PermissionError):
                raise
            except Exception as error:  # whatever broken files make Orbax, zarr or JSON raise
                if "RESOURCE_EXHAUSTED" in str(error):
                    raise
                self._damaged[s] = str(error).strip().split("\n")[0][:300] or type(error).__name__
                older = [t for t in steps if t < s]
                then = f"going back to step {older[-1]}" if older else "no older one is left"
                self._log(f"WARNING: checkpoint {self.directory / str(s)} is DAMAGED and passed over; {then}. Reason: {self._damaged[s]}")
                continue
            values, host = self._fit(*read, wanted)
            return grouping.rebuild(abstract_state, [values[k] for k in wanted]), host, s
        reasons = "; ".join(f"step {s}: {self._damaged[s]}" for s in reversed(steps))
        raise CheckpointError(f"checkpoint: no good checkpoint in {self.directory} ({reasons}). Restore one from a backup, or start in a "
                              "new --workdir.")

    def restore_model(self, abstract_params, abstract_buffers, *, manifest, step=None):
        """(params, buffers, step): restore() without the optimiser's state, which is not read."""
        abstract = TrainState(jax.ShapeDtypeStruct((), np.int32), abstract_params, abstract_buffers, None)
        state, _, step = self.restore(abstract, manifest=manifest, step=step)
        return state.params, state.buffers, step

    def wait(self):
        """Blocks until what was saved is on disk; raises what went wrong in the background."""
        if self._lazy_manager is not None:
            self._lazy_manager.wait_until_finished()

    def close(self):
        """wait(), then lets go of threads; the Checkpointer can be used again."""
        if self._lazy_manager is not None:
            self._lazy_manager.close()
            self._lazy_manager = None

    @property
    def _manager(self):
        if self._lazy_manager is None:
            remote = _is_remote(self.directory)
            # A local file per array, uncompressed, is written from the array in place: no copy, three times as fast as OCDBT with zstd,
            # which saves 7 % of float32 weights. A bucket gets few large objects instead.
            at_once = 1 if jax.default_backend() == "cpu" else None  # GB of restored arrays in flight: on CPU they share the memory
            state = ocp.PyTreeCheckpointHandler(use_ocdbt=remote, use_compression=remote, restore_concurrent_gb=at_once)
            options = ocp.CheckpointManagerOptions(
                create=False, preservation_policy=self._policy, best_fn=self._policy.rank, best_mode="min",
                enable_async_checkpointing=self._mode == "async",
            )  # fmt: skip
            self._lazy_manager = ocp.CheckpointManager(
                self.directory, options=options, item_names=("state", "meta"),
                item_handlers={"state": state, "meta": ocp.JsonCheckpointHandler()},
            )  # fmt: skip
        return self._lazy_manager

    def _prepare_to_write(self):
        """Once before the first save: the directory, left-overs of a killed save, damaged steps out of the way."""
        if self._wrote:
            return
        if jax.process_index() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            for child in self.directory.iterdir():
                if _TMP in child.name:
                    self._log(f"removing {child}, left over from a save that was interrupted")
                    child.rmtree()
            for s, reason in self._damaged.items():
                aside = self.directory.parent / f"{self.directory.name}-damaged" / str(s)
                if aside.exists():
                    aside.rmtree()
                aside.parent.mkdir(parents=True, exist_ok=True)
                (self.directory / str(s)).rename(aside)
                self._log(f"moved the damaged checkpoint of step {s} to {aside} ({reason}); delete it when it is of no more use")
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices("effmodels:checkpoint:prepare")
        if self._lazy_manager is not None:
            self._lazy_manager.reload()
        self._damaged, self._wrote = {}, True

    def _check_space(self, step, state):
        if _is_remote(self.directory):
            return
        need, free = nbytes(state) + 2**24, shutil.disk_usage(self.directory).free
        if need > free:
            last = self.latest()
            kept = f"the last good checkpoint is step {last}" if last is not None else "there is no checkpoint yet"
            raise CheckpointError(f"checkpoint: step {step} needs {need / 1e9:.2f} GB and {free / 1e9:.2f} GB is free at {self.directory}; "
                                  f"nothing was written, {kept}. Make room, lower checkpoint.keep or keep_best, or give a --workdir "
                                  "elsewhere.")

    def _refuse_non_finite(self, step, leaves, bad):
        named = [part for k, (leaf, _) in leaves.items() for (part, _), n in zip(leaf.parts(), np.atleast_1d(bad[k])) if n]
        if named:
            more = f" and {len(named) - 8} more" if len(named) > 8 else ""
            raise CheckpointError(f"checkpoint: step {step} is not saved, its values are not finite in {', '.join(named[:8])}{more}.")

    def _read_step(self, step, wanted, model_only):
        """(arrays by key, in the saved grouping where the wanted one differs; saved leaves; host), all verified."""
        meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
        if not isinstance(meta, dict) or meta.get("sha256") != _sha256({k: v for k, v in meta.items() if k != "sha256"}):
            raise _Damaged("the checksum of its metadata is wrong")
        if meta["format"] != FORMAT:
            raise CheckpointMismatch(f"checkpoint: step {step} in {self.directory} has format {meta['format']}, not {FORMAT} as here.")
        saved = _saved_leaves(meta, model_only)
        self._compare(step, saved, wanted)
        places = _places(saved, wanted)
        abstract = {k: jax.ShapeDtypeStruct(shape, np.dtype(dtype), sharding=places[k]) for k, (_, shape, dtype) in saved.items()}
        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
        args = ocp.args.PyTreeRestore(abstract, restore_args=restore_args, partial_restore=True)
        arrays = dict(self._manager.restore(step, args=ocp.args.Composite(state=args)).state)
        self._verify(meta, saved, arrays)
        return arrays, saved, meta["host"]

    def _fit(self, arrays, saved, host, wanted):
        """({key: array} as wanted, host)."""
        out = {k: arrays.pop(k) for k, (leaf, _) in wanted.items() if k in saved and saved[k][0] == leaf}
        targets = {k: (leaf, x.sharding) for k, (leaf, x) in wanted.items() if k not in out}
        return out | grouping.regroup(arrays, {k: saved[k][0] for k in arrays}, targets), host

    def _verify(self, meta, saved, arrays):
        found, _ = digests(arrays, {k for k, (leaf, *_) in saved.items() if leaf.stacked})
        bad = []
        for k, (leaf, *_) in saved.items():
            got = [f"{d:016x}" for d in np.atleast_1d(found[k]).tolist()]
            bad += [part for (part, _), a, b in zip(leaf.parts(), got, meta["digests"][k]) if a != b]
        if bad:
            more = f" and {len(bad) - 4} more" if len(bad) > 4 else ""
            raise _Damaged(f"wrong digest of {', '.join(bad[:4])}{more}")

    def _compare(self, step, saved, wanted):
        """CheckpointMismatch unless both hold the same parts with the same shapes and dtypes."""
        have = {part: (leaf.part_shape(shape), dtype) for leaf, shape, dtype in saved.values() for part, _ in leaf.parts()}
        want = {part: (leaf.part_shape(x.shape), x.dtype.name) for leaf, x in wanted.values() for part, _ in leaf.parts()}
        where = f"checkpoint: step {step} in {self.directory}"
        for kind, mine in (("model", lambda p: not p.startswith("opt_state")), ("optimiser", lambda p: p.startswith("opt_state"))):
            missing = [p for p in want if mine(p) and p not in have]
            extra = [p for p in have if mine(p) and p not in want]
            changed = [f"{p} is {_show(have[p])}, here {_show(want[p])}" for p in want if mine(p) and p in have and have[p] != want[p]]
            text = [t for t in (_list("only here: ", missing), _list("only in the checkpoint: ", extra), _list("", changed)) if t]
            if text:
                raise CheckpointMismatch(f"{where} is a checkpoint of another {kind}. {'; '.join(text)}. Use the config it was trained "
                                         "with, or another --workdir.")


class _Quiet(logging.Filter):
    """Orbax says at every save of plain files that there is nothing of OCDBT to merge."""

    def filter(self, record):
        return "Skipping merge of OCDBT" not in str(record.msg)


logging.getLogger("absl").addFilter(_Quiet())


class _Keep(checkpoint_managers.PreservationPolicy):
    """Orbax's question which steps to keep: the last ones and the best ones."""

    def __init__(self, last, best, metric, mode):
        self._last, self._best, self._metric, self._sign = last, best, metric, 1 if mode == "min" else -1

    def rank(self, metrics):
        """Lower is better; steps without the metric, or with NaN, come last."""
        value = (metrics or {}).get(self._metric)
        return float("inf") if value is None or value != value else self._sign * float(value)

    def should_preserve(self, checkpoints, *, context):
        del context
        ranked = sorted((self.rank(c.metrics), -c.step) for c in checkpoints)
        best = {-step for rank, step in ranked[: self._best] if rank < float("inf")}
        last = {c.step for c in sorted(checkpoints, key=lambda c: c.step)[-self._last :]}
        return [c.step in best | last for c in checkpoints]


def _places(saved, wanted):
    """{key: sharding} of the saved arrays: as wanted, or for another grouping so that their parts lie as wanted."""
    homes = {part: (leaf, x.sharding) for leaf, x in wanted.values() for part, _ in leaf.parts()}
    return {k: grouping.source_sharding(leaf, *homes[leaf.parts()[0][0]]) for k, (leaf, *_) in saved.items()}


def _saved_leaves(meta, model_only):
    """{key: (Leaf, shape, dtype name)} of what the checkpoint holds."""
    owners = grouping.owners({n: tuple(where) for n, where in meta["manifest"].items()})
    found = {}
    for key, (slot, path, shape, dtype) in meta["leaves"].items():
        if not (model_only and slot.startswith("opt_state")):
            found[key] = grouping.Leaf(slot, path, *(owners[path] if path else ((), False))), tuple(shape), dtype
    return found


def _with_shardings(state):
    """Abstract leaves without a sharding get one: replicated over the mesh of the others (adam's count), else the default device."""
    meshes = [x.sharding.mesh for x in jax.tree.leaves(state) if isinstance(getattr(x, "sharding", None), NamedSharding)]
    default = NamedSharding(meshes[0], PartitionSpec()) if meshes else jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or default), state)


def _warn(text):
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


def _jsonable(host):
    try:
        return json.loads(json.dumps(host))
    except TypeError as error:
        raise TypeError(f"checkpoint: `host` must hold only what JSON holds: {error}.") from None


def _sha256(meta):
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _show(shape_and_dtype):
    shape, dtype = shape_and_dtype
    return f"{dtype}{list(shape)}"


def _list(title, names, most=6):
    if not names:
        return ""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return title + ", ".join(n.removeprefix("params:") for n in names[:most]) + more


def _is_remote(path):
    return "://" in str(path) or str(path).startswith(("/gs/", "/bigstore/"))

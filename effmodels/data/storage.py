"""Folders that appear at once or not at all: written under a temporary name, checksummed, renamed when complete.

Arrays are raw files described by a manifest (dtype, shape, sha256), so that they are appended while written and memory-mapped when read.
"""
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import time
import uuid

import numpy as np

from effmodels.data.options import DataError

MANIFEST = "manifest.json"
# Contents up to this size are hashed each time a folder is opened (about 1 GB/s); above it only sizes are, and each row when it is read.
VERIFY_BYTES = 256_000_000


class DamagedError(DataError):
    """A prepared file is not what was written."""


def digest(value):
    """sha256 of a JSON-able value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write_json(path, value):
    """Writes through a temporary name, so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    temporary.write_text(json.dumps(value, indent=1))
    os.replace(temporary, path)


def read_json(path):
    """The parsed file; None where there is none; a damaged one is named."""
    try:
        return json.loads(pathlib.Path(path).read_text())
    except FileNotFoundError:
        return None
    except ValueError as e:
        raise DamagedError(f"{path} is damaged ({e}). Delete it and run again.") from e


def check_space(folder, needed, what):
    """Raises before anything is written when the disk cannot hold it."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(f"Writing {what} needs about {needed / 1e6:.1f} MB, but {folder} has {free / 1e6:.1f} MB free. "
                        "Free some space, or set config.data.cache_dir (or $EFFMODELS_DATA) to a larger disk.")


@contextlib.contextmanager
def new_folder(target, *, needed, what):
    """Yields a temporary folder that becomes `target` in one rename; when the block raises nothing is left behind."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target.parent)
    check_space(target.parent, needed, what)
    temporary = target.with_name(f"{target.name}.tmp-{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        yield temporary
        shutil.rmtree(target, ignore_errors=True)
        os.rename(temporary, target)
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(f"The disk filled up while writing {what} under {target.parent}. "
                            "Free some space, or set config.data.cache_dir (or $EFFMODELS_DATA) to a larger disk.") from e
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def lock(folder, log):
    """One process prepares, the others on this machine wait and then read what it wrote."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = open(folder / ".lock", "w")
    except OSError as e:
        if folder.is_dir():  # a read-only cache can still be read
            yield
            return
        raise DataError(f"The data cache {folder} cannot be made ({e.strerror}). Set config.data.cache_dir or $EFFMODELS_DATA.") from e
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log(f"data: waiting for another process that prepares data in {folder}")
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as e:
            log(f"data: {folder} cannot be locked ({e.strerror}); processes starting together may each prepare the data")
        yield


class Progress:
    """One line at most every two seconds."""

    def __init__(self, log, what, total, unit_bytes=True, every=2.0):
        self.log, self.what, self.total, self.every = log, what, total, every
        self.scale, self.unit = (1e6, "MB") if unit_bytes else (1, "items")
        self.done, self.start = 0, time.monotonic()
        self.last = self.start

    def __call__(self, amount):
        self.done += amount
        now = time.monotonic()
        if now - self.last < self.every:
            return
        self.last = now
        rate = self.done / (now - self.start)
        left = max(self.total - self.done, 0) / max(rate, 1e-9)
        self.log(f"data: {self.what} {self.done / self.scale:.1f} of {self.total / self.scale:.1f} {self.unit}, "
                 f"{rate / self.scale:.2f} {self.unit}/s, {left:.0f} s left")

    @property
    def seconds(self):
        return time.monotonic() - self.start


class ArrayWriter:
    """Appends arrays to raw files in a folder; `close` writes the manifest that `ArrayFolder` reads."""

    def __init__(self, folder):
        self.folder, self.files, self.arrays = folder, {}, {}

    def append(self, name, array):
        """Rows are added along the first axis; dtype and the other axes are fixed by the first call."""
        array = np.ascontiguousarray(array)
        if name not in self.files:
            self.files[name] = (open(self.folder / f"{name}.bin", "wb"), hashlib.sha256())
            self.arrays[name] = {"dtype": array.dtype.str, "shape": [0, *array.shape[1:]]}
        entry = self.arrays[name]
        if entry["dtype"] != array.dtype.str or entry["shape"][1:] != list(array.shape[1:]):
            raise TypeError(f"{name}: rows of {array.dtype.str}{list(array.shape[1:])} appended to {entry}.")
        f, sha = self.files[name]
        data = memoryview(array.reshape(-1)).cast("B") if array.size else b""
        f.write(data)
        sha.update(data)
        entry["shape"][0] += array.shape[0]

    def close(self, meta):
        for name, (f, sha) in self.files.items():
            f.flush()
            os.fsync(f.fileno())
            f.close()
            self.arrays[name]["sha256"] = sha.hexdigest()
        write_json(self.folder / MANIFEST, {"arrays": self.arrays, **meta})


class ArrayFolder:
    """Memory-mapped arrays of a folder written by ArrayWriter: folder[name]; `meta` is the manifest."""

    def __init__(self, folder, *, verify=True):
        self.folder = pathlib.Path(folder)
        self.meta = read_json(self.folder / MANIFEST)
        if self.meta is None:
            raise DamagedError(f"{self.folder} has no {MANIFEST}. Delete the folder and run again: it is rebuilt.")
        self._open = {}
        sizes = {name: self._check_size(name, entry) for name, entry in self.meta["arrays"].items()}
        if verify and sum(sizes.values()) <= VERIFY_BYTES:
            for name, entry in self.meta["arrays"].items():
                self._check_sha256(name, entry)

    def __contains__(self, name):
        return name in self.meta["arrays"]

    def __getitem__(self, name):
        if name not in self._open:
            entry = self.meta["arrays"][name]
            shape, dtype = tuple(entry["shape"]), np.dtype(entry["dtype"])
            empty = 0 in shape  # an empty file cannot be mapped
            self._open[name] = np.empty(shape, dtype) if empty else np.memmap(self._path(name), dtype, "r", shape=shape)
        return self._open[name]

    def _path(self, name):
        return self.folder / f"{name}.bin"

    def _check_size(self, name, entry):
        want = int(np.prod(entry["shape"], dtype=np.int64)) * np.dtype(entry["dtype"]).itemsize
        path = self._path(name)
        if not path.exists():
            raise DamagedError(f"{path} is missing. Delete {self.folder} and run again: it is rebuilt.")
        if path.stat().st_size != want:
            raise DamagedError(f"{path} has {path.stat().st_size} bytes, {want} were written. "
                               f"Delete {self.folder} and run again: it is rebuilt.")
        return want

    def _check_sha256(self, name, entry):
        if file_sha256(self._path(name)) != entry["sha256"]:
            raise DamagedError(f"{self._path(name)} is damaged: its sha256 is not the one recorded when it was written. "
                               f"Delete {self.folder} and run again: it is rebuilt.")


def open_or_none(folder, log, *, verify=True):
    """An intact ArrayFolder, or None where it must be (re)built; damage is said."""
    if not folder.exists():
        return None
    try:
        return ArrayFolder(folder, verify=verify)
    except DamagedError as e:
        log(f"data: {e} Rebuilding it now.")
        return None


def _sweep(folder):
    """Removes temporary folders of processes that died more than a day ago."""
    for path in folder.glob("*.tmp-*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > 86_400:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

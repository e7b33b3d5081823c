"""The safetensors format: a header of JSON, then the tensors' bytes in a row. Read by memory map, written as a stream.

Format: 8 bytes (little-endian length n of the header), n bytes of JSON {name: {dtype, shape, data_offsets: [begin, end]}}, the data.
"""
import contextlib
import json
import math
import os
import pathlib

import ml_dtypes
import numpy as np

from effmodels.interop.errors import InteropError

DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2, "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U64": np.uint64,
    "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # bytes; the format's own bound
ALIGN = 8


class SafetensorsFile:
    """One memory-mapped file, its header checked against its size; raises InteropError for whatever is truncated or corrupt."""

    def __init__(self, path):
        self.path = pathlib.Path(path)
        size = self.path.stat().st_size
        header, self._start = _header(self.path, size)
        self.metadata = header.pop("__metadata__", {})
        self.entries = {name: _entry(self.path, name, e) for name, e in header.items()}
        _check_extent(self.path, self.entries, size - self._start)
        self._map = np.memmap(self.path, np.uint8, "r") if size > self._start else np.zeros(size, np.uint8)

    def names(self):
        """Names of the tensors, in the order of the file."""
        return sorted(self.entries, key=lambda n: self.entries[n][2])

    def dtype(self, name):
        """numpy dtype of a tensor."""
        return self.entries[name][0]

    def shape(self, name):
        """Shape of a tensor."""
        return self.entries[name][1]

    def read(self, name):
        """The tensor as a read-only array over the mapped file; no byte is read before it is used."""
        dtype, shape, begin, end = self.entries[name]
        return self._map[self._start + begin : self._start + end].view(dtype).reshape(shape)


def _header(path, size):
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(size - 8, MAX_HEADER):
            header = length if len(prefix) == 8 else "at least 2"
            raise InteropError(
                f"{path}: not a whole safetensors file: its header should have {header} bytes, and the file has {size}. It is truncated or "
                "of another format; fetch it again."
            )
        text = file.read(length)
    try:
        header = json.loads(text)
    except ValueError as error:
        raise InteropError(f"{path}: the header of this safetensors file is no JSON ({error}); it is corrupt, fetch it again.") from None
    if not isinstance(header, dict):
        raise InteropError(f"{path}: the header of this safetensors file is no JSON object; it is corrupt, fetch it again.")
    return header, 8 + length


def _entry(path, name, entry):
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end))
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise InteropError(f"{path}: corrupt header entry of tensor {name!r}: {str(entry)[:200]}.")
    if dtype not in DTYPES:
        raise InteropError(f"{path}: tensor {name!r} has dtype {dtype!r}; known are {', '.join(DTYPES)}.")
    need = math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
    if end - begin != need:
        raise InteropError(f"{path}: corrupt: tensor {name!r} {dtype}{list(shape)} needs {need} bytes, its header gives {end - begin}.")
    return np.dtype(DTYPES[dtype]), shape, begin, end


def _check_extent(path, entries, data_bytes):
    at = 0
    for name, (_, _, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if begin != at:
            raise InteropError(f"{path}: corrupt: tensor {name!r} begins at byte {begin} of the data, where byte {at} was due.")
        at = end
    if at != data_bytes:
        verb = "truncated" if data_bytes < at else "corrupt"
        raise InteropError(f"{path}: {verb}: its tensors take {at} bytes and the file holds {data_bytes}; fetch it again.")


def write(path, tensors, metadata=None):
    """Writes {name: (dtype, shape, function that gives the array)} as one file, one array at a time; the file appears when it is whole."""
    path, at, header = pathlib.Path(path), 0, {}
    if metadata:
        header["__metadata__"] = metadata
    for name, (dtype, shape, _) in tensors.items():
        size = math.prod(shape) * np.dtype(dtype).itemsize
        header[name] = {"dtype": NAMES[np.dtype(dtype)], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGN)
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name, (dtype, shape, make) in tensors.items():
                array = np.ascontiguousarray(make())
                if array.shape != tuple(shape) or array.dtype != np.dtype(dtype):
                    raise ValueError(f"{name}: made {array.dtype}{array.shape}, announced {np.dtype(dtype)}{tuple(shape)}.")
                file.write(array.reshape(-1).view(np.uint8))
        os.replace(partial, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()

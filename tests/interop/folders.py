"""Folders as a hub would hold them, made from the committed references."""
import base64
import json
import pathlib

import numpy as np

from effmodels.interop import safetensors
from tests.interop.draws import weights

REFERENCES = pathlib.Path(__file__).parent / "references"
ALL = sorted(p.stem for p in REFERENCES.glob("*.json"))


def reference(case):
    """The parsed reference of a case."""
    return json.loads((REFERENCES / f"{case}.json").read_text())


def logits(ref):
    """[T, V] float32 of every row."""
    vocab = ref["config"]["vocab_size"]
    return [np.frombuffer(base64.b64decode(text), np.float32).reshape(-1, vocab) for text in ref["logits"]]


def tensors(ref):
    """{name: array} of a reference's checkpoint."""
    kind = ref["config"]["model_type"]
    return {n: weights(n, tuple(shape), kind).astype(dtype) for n, (dtype, *shape) in ref["tensors"].items()}


def write(path, arrays, config, dtype=None):
    """A folder with one safetensors file."""
    path.mkdir(parents=True, exist_ok=True)
    arrays = {n: a if dtype is None else a.astype(dtype) for n, a in arrays.items()}
    safetensors.write(path / "model.safetensors", {n: (a.dtype, a.shape, lambda a=a: a) for n, a in arrays.items()}, {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    return path


def folder(path, case, dtype=None, **config):
    """A folder of a case, with fields of its config.json replaced."""
    ref = reference(case)
    return write(path, tensors(ref), ref["config"] | config, dtype)


def contents(path):
    """{name: (dtype, shape, bytes)} of all tensors of a folder, read without the code under test where it may matter."""
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        raw = file.read_bytes()
        size = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + size])
        for name, e in header.items():
            if name != "__metadata__":
                begin, end = e["data_offsets"]
                found[name] = e["dtype"], tuple(e["shape"]), raw[8 + size + begin : 8 + size + end]
    return found

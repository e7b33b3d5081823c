"""Image files in the IDX format of MNIST: train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-... in one folder, perhaps with .gz.

On Debian, `apt install dataset-fashion-mnist` puts 60,000 + 10,000 of them under /usr/share/datasets/fashion-mnist.
"""
import gzip
import pathlib

import numpy as np

from effmodels.data.images.base import Source
from effmodels.data.images.digits import NAMES
from effmodels.data.options import DataError
from effmodels.data.sources import File, file_sha256

FILES = {"train": "train", "validation": "t10k"}
CLOTHES = ("a t-shirt", "trousers", "a pullover", "a dress", "a coat", "a sandal", "a shirt", "a sneaker", "a bag", "an ankle boot")


class Idx(Source):
    """Base of sources of IDX files; a subclass names the classes."""

    reads_paths = True
    things: tuple = ()

    @classmethod
    def identity(cls, source):
        files = [_find(source, split, kind) for split in FILES for kind in ("images-idx3", "labels-idx1")]
        return [cls.__name__, 1, [file_sha256(File(p.name, p, 0, 0, True)) for p in files]]

    @classmethod
    def documents(cls, source, split):
        images, labels = (read(_find(source, split, kind)) for kind in ("images-idx3", "labels-idx1"))
        for number, (image, label) in enumerate(zip(images, labels)):
            yield f"{FILES[split]}:{number}", image, f"a picture of {cls.things[label]}"


class IdxDigits(Idx):
    """MNIST: "a picture of a three"."""

    things = tuple(f"a {name}" if name[0] != "e" else f"an {name}" for name in NAMES)


class IdxFashion(Idx):
    """Fashion-MNIST: "a picture of a coat"."""

    things = CLOTHES


def read(path):
    """The uint8 array of an IDX file; DataError for a damaged one."""
    try:
        data = gzip.open(path, "rb").read() if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise DataError(f"{path} cannot be read: {error}. Fetch it again.") from error
    dims = data[3] if len(data) > 4 else 0
    shape = np.frombuffer(data, ">i4", dims, 4) if len(data) >= 4 + 4 * dims else np.array([-1])
    if data[:3] != b"\0\0\x08" or len(data) != 4 + 4 * dims + np.prod(shape, dtype=np.int64):
        raise DataError(f"{path} is not a whole IDX file of bytes. Fetch it again.")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dims).reshape(shape)


def _find(source, split, kind):
    name = f"{FILES[split]}-{kind}-ubyte"
    for folder in map(pathlib.Path, source["paths"]):
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    raise DataError(f"config.data.name={source['name']!r}: no {name} or {name}.gz in paths={source['paths']!r}; give its folder.")

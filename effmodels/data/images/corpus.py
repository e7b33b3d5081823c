"""Images and captions as ArrayRecord shards, written once by TFDS: `<cache>/images/<hash>` with corpus.json beside the shards."""
import dataclasses
import gzip
import pathlib

import numpy as np

from effmodels.data import storage
from effmodels.data.corpus import SPLITS
from effmodels.data.images.registry import get_source
from effmodels.data.options import DataError

FORMAT = 1
CHUNK = 256  # records per read


@dataclasses.dataclass(frozen=True)
class ImageCorpus:
    """The documents of both splits; `open` gives the captions, as a corpus of text does, `images` the images too."""

    hash: str
    manifest: dict
    source: dict
    folder: pathlib.Path

    def bytes(self, split):
        """Of all captions."""
        return self.manifest["splits"][split]["bytes"]

    def documents(self, split):
        """How many."""
        return self.manifest["splits"][split]["documents"]

    def open(self, split, log):
        """Yields (name, 0, caption) in the stored order."""
        for name, _, caption in self.images(split):
            yield name, 0, caption

    def images(self, split):
        """Yields (name, image uint8 [H, W, C], caption bytes) in the stored order."""
        from effmodels.data import tfds_text

        records = tfds_text.read(self.folder / self.manifest["tfds"], split)
        for start in range(0, len(records), CHUNK):
            for record in records.__getitems__(list(range(start, min(start + CHUNK, len(records))))):
                yield record["name"].decode(), np.asarray(record["image"]), record["caption"]


def prepare(source, cache, log):
    """The `ImageCorpus` of one entry of `options["sources"]`, built where it is not there yet."""
    reader = get_source(source["name"])
    key = storage.digest([FORMAT, source["name"], reader.identity(source)])[:24]
    folder = cache / "images" / key
    manifest = storage.read_json(folder / "corpus.json")
    return ImageCorpus(key, manifest or _build(reader, source, folder, key, log), source, folder)


def _build(reader, source, target, key, log):
    from effmodels.data import tfds_text
    from effmodels.data.images.tfds_images import LocalImages

    log(f"data: reading images of {source['name']!r}")
    seen, captions = {split: {"documents": 0, "bytes": 0} for split in SPLITS}, []

    def documents(split):
        for name, image, caption in reader.documents(source, split):
            text = caption.encode()
            seen[split]["documents"] += 1
            seen[split]["bytes"] += len(text)
            if split == "validation":
                captions.append(text)
            yield name, image[..., None] if image.ndim == 2 else image, text

    with storage.new_folder(target, needed=1_000_000, what="the images") as folder:
        shards = tfds_text.write(folder, [s for s in SPLITS if next(iter(reader.documents(source, s)), None)], documents, LocalImages)
        for split in SPLITS:
            if not seen[split]["documents"]:
                raise DataError(f"config.data.name={source['name']!r}: no image falls into the {split} split; change config.data.holdout.")
        joined = b"".join(captions)
        manifest = {
            "format": FORMAT, "hash": key, "name": source["name"], "splits": seen, "tfds": shards,
            "gzip": {"bytes": len(joined), "compressed": len(gzip.compress(joined, 9))},
        }  # fmt: skip
        storage.write_json(folder / "corpus.json", manifest)
    log(f"data: {seen['train']['documents']} images with captions to train on, {seen['validation']['documents']} held out")
    return manifest

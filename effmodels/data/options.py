"""The fields of `config.data`, their defaults, and the one check that every field given is one that exists."""
import difflib
import os
import pathlib
from collections.abc import Mapping

from effmodels.data.images.registry import IMAGE_SOURCES, get_source

DEFAULTS = {
    "name": "local",  # "local": the files under `paths`; a source of images (IMAGE_SOURCES); any other name: that TFDS dataset, e.g. "lm1b"
    "paths": (),  # files, folders, globs; empty: the running Python's own standard library
    "column": "text",  # field of .jsonl records, column of .parquet files, feature of a TFDS dataset
    "train_split": "train",  # TFDS datasets only
    "validation_split": "",  # TFDS datasets only; empty: "validation", else "test", else a holdout of the training split
    "data_dir": "",  # TFDS datasets only; empty: where TFDS keeps its data
    "holdout": 0.02,  # fraction of the documents that is never trained on, chosen by a hash of their names
    "tokenizer": "bytes",  # "bytes", "bpe:<vocabulary size>", a tokenizer.json, or a SentencePiece .model
    "bpe_train_bytes": 256_000_000,  # the vocabulary is learned from at most so much of the training split
    "packing": "concat",  # "concat": concatenate and split; "best_fit": documents kept whole where they fit
    "mixture": (),  # several corpora: dicts with any of MIXTURE_FIELDS; fields left out are taken from here
    "cache_dir": "",  # empty: $EFFMODELS_DATA, else ~/.cache/effmodels
}
SOURCE_FIELDS = ("name", "paths", "column", "train_split", "validation_split", "data_dir", "holdout")
MIXTURE_FIELDS = (*SOURCE_FIELDS, "weight")
PACKINGS = ("concat", "best_fit")


class DataError(ValueError):
    """Something about the data that the user can put right; the message says how."""


def defaults():
    """All fields of `config.data` with their defaults, as a plain dict."""
    return dict(DEFAULTS)


def nearest(given, known):
    """ "; did you mean 'x'?" when one of the known names is close, else the list of them."""
    close = difflib.get_close_matches(str(given), [str(k) for k in known], n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(map(str, known))}."


def resolve(config, images=None):
    """Checked fields of `config.data` (a ConfigDict, a mapping or None), each present; `sources` lists the corpora with their weights.

    images: whether the model reads images, which then must be what the data are; None: not known yet.
    """
    fields = _fields(config, DEFAULTS, "config.data")
    options = {**DEFAULTS, **fields}
    if options["packing"] not in PACKINGS:
        raise DataError(f"config.data.packing={options['packing']!r} is not a packing policy; {nearest(options['packing'], PACKINGS)}")
    base = {name: options[name] for name in SOURCE_FIELDS}
    mixture = options["mixture"] or ({},)
    if isinstance(mixture, (str, Mapping)) or hasattr(mixture, "to_dict"):
        raise DataError("config.data.mixture must be a tuple of dicts such as {'paths': ('a',), 'weight': 2.0}, "
                        f"but it is a {type(mixture).__name__}.")
    options["sources"] = tuple(_source(base, entry, i) for i, entry in enumerate(mixture))
    _check_images(options, images)
    return options


def _check_images(options, images):
    names = [source["name"] for source in options["sources"]]
    found = [name for name in names if name in IMAGE_SOURCES]
    if len(found) and len(names) > 1:
        raise DataError(f"config.data.mixture: {found[0]!r} is a source of images, which is read alone; leave mixture empty.")
    if images and not found:
        raise DataError(f"model.media is set, but config.data.name={names[0]!r} has no images; use one of {', '.join(IMAGE_SOURCES)}.")
    if images is False and found:
        raise DataError(f"config.data.name={found[0]!r} is a source of images, but the model reads none; set model.media, or another name.")


def cache_dir(options):
    """Folder of everything that is prepared once."""
    chosen = options["cache_dir"] or os.environ.get("EFFMODELS_DATA") or "~/.cache/effmodels"
    return pathlib.Path(chosen).expanduser()


def _fields(config, known, where):
    given = config.to_dict() if hasattr(config, "to_dict") else dict(config or {})
    for name in given:
        if name not in known:
            raise DataError(f"{where} has no field {name!r}; {nearest(name, tuple(known))}")
    return given


def _source(base, entry, i):
    source = {"weight": 1.0, **base, **_fields(entry, MIXTURE_FIELDS, f"config.data.mixture[{i}]")}
    source["paths"] = (source["paths"],) if isinstance(source["paths"], (str, os.PathLike)) else tuple(source["paths"])
    if source["name"] in IMAGE_SOURCES:
        if source["paths"] and not get_source(source["name"]).reads_paths:
            raise DataError(f"config.data.name={source['name']!r} reads no files, but paths={source['paths']} is given; leave it empty.")
    elif source["name"] != "local" and source["paths"]:
        raise DataError(f"config.data.name={source['name']!r} names a TFDS dataset, but paths={source['paths']} is given too. "
                        "Use name='local' for files, or leave paths empty.")
    if not 0 <= source["holdout"] < 1:
        raise DataError(f"config.data.holdout={source['holdout']} must be a fraction in [0, 1); 0.02 holds out one document in fifty.")
    if not source["weight"] > 0:
        raise DataError(f"config.data.mixture[{i}].weight={source['weight']} must be above 0.")
    return source

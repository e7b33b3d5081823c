"""The TFDS side: a builder of ArrayRecord shards from documents, and TFDS datasets by name; no TensorFlow in either.

Importing this module imports tensorflow_datasets (0.4 s): only what writes or reads a corpus does so, not a warm start.
"""
import contextlib
import difflib
import os

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from effmodels.data.options import DataError


class Local:
    """What builders of documents that lie here share: `split_documents(split)` yields the arguments of `example`, a (key, features)."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, splits, split_documents, **kwargs):
        self.splits, self.split_documents = splits, split_documents  # TFDS refuses splits without documents
        self.failure = None
        super().__init__(file_format="array_record", **kwargs)  # the default, tfrecord, needs TensorFlow

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(self.features()))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in self.splits}

    def _generate_examples(self, split):
        try:
            for document in self.split_documents(split):
                yield self.example(*document)
        except Exception as e:  # TFDS rewrites messages on their way up
            self.failure = e
            raise


class LocalText(Local, tfds.core.GeneratorBasedBuilder):
    """Documents are (name, offset, text); TFDS shuffles them by a hash of the key and writes ArrayRecord shards."""

    def features(self):
        return {"name": tfds.features.Text(), "offset": tfds.features.Scalar(np.int64), "text": tfds.features.Text()}

    def example(self, name, offset, text):
        return f"{name}#{offset}", {"name": name, "offset": offset, "text": text}


def write(folder, splits, split_documents, kind=LocalText):
    """Writes the splits below `folder` with a builder of this kind; returns the folder of the shards, relative to it."""
    with quiet():
        builder = kind(splits=splits, split_documents=split_documents, data_dir=os.fspath(folder))
    try:
        with quiet():
            builder.download_and_prepare()
    except Exception:
        if builder.failure is not None:
            raise builder.failure from None
        raise
    return os.path.relpath(builder.data_dir, folder)


def read(folder, split):
    """Random access to {"name", "offset", "text"} of a folder that `write` made; text is bytes."""
    with quiet():
        builder = tfds.builder_from_directory(os.fspath(folder))
        return builder.as_data_source(split) if split in builder.info.splits else ()


def by_name(name, data_dir, log):
    """A prepared TFDS dataset in a format that can be read without TensorFlow; downloads it where it must, and says so."""
    try:
        builder = tfds.builder(name, data_dir=data_dir or None, file_format="array_record")
    except tfds.core.DatasetNotFoundError as e:
        known = tfds.list_builders(with_community_datasets=False)
        close = difflib.get_close_matches(name.split("/")[0].split(":")[0], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "tensorflow_datasets.list_builders() lists the names."
        raise DataError(f"config.data.name={name!r} is neither 'local' nor a TFDS dataset; {hint}") from e
    from tensorflow_datasets.core.download import downloader

    downloader.MAX_RETRIES = 0  # ten retries a file would keep an offline machine busy for minutes
    if not os.path.exists(os.path.join(builder.data_dir, "dataset_info.json")):
        log(f"data: preparing TFDS dataset {builder.info.full_name} in {builder.data_dir} (this may download it)")
    try:
        builder.download_and_prepare()
    except Exception as e:
        raise DataError(f"TFDS dataset {name!r} is not in {builder.data_dir} and could not be prepared "
                        f"({type(e).__name__}: {_first_line(e)}). "
                        "It may need a network; prepare it on a machine that has one and copy the folder, set config.data.data_dir, "
                        "or use config.data.name='local'.") from e
    return builder


def pick_splits(builder, source):
    """(training split, validation split or None for a holdout) that exist in the dataset."""
    names = list(builder.info.splits)
    for field in ("train_split", "validation_split"):
        wanted = source[field].split("[")[0]
        if wanted and wanted not in names:
            raise DataError(f"config.data.{field}={source[field]!r}: {builder.info.full_name} has the splits {', '.join(names)}.")
    automatic = next((s for s in ("validation", "test") if s in names and s != source["train_split"]), None)
    return source["train_split"], source["validation_split"] or automatic


def open_split(builder, split, column):
    """Random access to one split, after a check that `column` is a text feature."""
    features = builder.info.features
    names = list(features.keys()) if hasattr(features, "keys") else []
    if column not in names:
        raise DataError(f"TFDS dataset {builder.info.full_name} has no feature {column!r}; it has: {', '.join(names) or 'none'}. "
                        "Set config.data.column.")
    if not isinstance(features[column], tfds.features.Text):
        raise DataError(f"TFDS dataset {builder.info.full_name}: feature {column!r} is {type(features[column]).__name__}, "
                        "text is expected. Set config.data.column.")
    return builder.as_data_source(split)


@contextlib.contextmanager
def quiet():
    """TFDS prints, logs and draws a bar; ours is one progress line (written past this redirection by the caller)."""
    from tensorflow_datasets.core.utils import tqdm_utils

    shown = getattr(tqdm_utils, "_active", True)
    tfds.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.WARNING)
    try:
        with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):
            yield
    finally:
        tfds.display_progress_bar(shown)
        logging.set_verbosity(verbosity)


def _first_line(error):
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else "no message"

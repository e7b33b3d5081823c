"""The TFDS side of images: a builder of ArrayRecord shards, without TensorFlow. Importing this module imports tensorflow_datasets."""
import os

import numpy as np
import tensorflow_datasets as tfds

from effmodels.data.tfds_text import quiet


class LocalImages(tfds.core.GeneratorBasedBuilder):
    """`split_documents(split)` yields (name, image uint8 [H, W, C], caption bytes)."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, splits, split_documents, **kwargs):
        self.splits, self.split_documents, self.failure = splits, split_documents, None
        super().__init__(file_format="array_record", **kwargs)  # the default, tfrecord, needs TensorFlow

    def _info(self):
        # Several unknown dims need an encoding; of these zlib is a lossless one without TensorFlow.
        image = tfds.features.Tensor(shape=(None, None, None), dtype=np.uint8, encoding="zlib")
        features = {"name": tfds.features.Text(), "image": image, "caption": tfds.features.Text()}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in self.splits}

    def _generate_examples(self, split):
        try:
            for name, image, caption in self.split_documents(split):
                yield name, {"name": name, "image": image, "caption": caption}
        except Exception as error:  # TFDS rewrites messages on their way up
            self.failure = error
            raise


def write(folder, splits, split_documents):
    """Writes the splits below `folder`; returns the folder of the shards, relative to it."""
    with quiet():
        builder = LocalImages(splits=splits, split_documents=split_documents, data_dir=os.fspath(folder))
    try:
        with quiet():
            builder.download_and_prepare()
    except Exception:
        if builder.failure is not None:
            raise builder.failure from None
        raise
    return os.path.relpath(builder.data_dir, folder)

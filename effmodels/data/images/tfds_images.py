"""The TFDS side of images: a builder of ArrayRecord shards, without TensorFlow. Importing this module imports tensorflow_datasets."""
import numpy as np
import tensorflow_datasets as tfds

from effmodels.data.tfds_text import Local


class LocalImages(Local, tfds.core.GeneratorBasedBuilder):
    """Documents are (name, image uint8 [H, W, C], caption bytes)."""

    def features(self):
        # Several unknown dims need an encoding; of these zlib is a lossless one without TensorFlow.
        image = tfds.features.Tensor(shape=(None, None, None), dtype=np.uint8, encoding="zlib")
        return {"name": tfds.features.Text(), "image": image, "caption": tfds.features.Text()}

    def example(self, name, image, caption):
        return name, {"name": name, "image": image, "caption": caption}

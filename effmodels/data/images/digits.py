"""The handwritten digits that scikit-learn brings along: 1,797 images of 8 x 8 pixels (CC-BY 4.0)."""
import numpy as np

from effmodels.data.images.base import Source
from effmodels.data.options import DataError
from effmodels.data.sources import held_out

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class Digits(Source):
    """"a picture of a three"; needs scikit-learn, no network."""

    @classmethod
    def identity(cls, source):
        return ["digits", 1, source["holdout"]]

    @classmethod
    def documents(cls, source, split):
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise DataError("config.data.name='digits' reads images that scikit-learn brings along: pip install scikit-learn.") from error
        digits = load_digits()
        for number, (image, label) in enumerate(zip(digits.images, digits.target)):
            name = f"digits:{number}"
            if held_out(name, source["holdout"]) == (split == "validation"):
                yield name, np.rint(image * (255 / 16)).astype(np.uint8), f"a picture of a {NAMES[label]}"

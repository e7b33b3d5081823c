"""The sources of images with captions by name. A new one is a file beside this one and a line here."""
from effmodels.registry import load

IMAGE_SOURCES = {
    "digits": "effmodels.data.images.digits:Digits",
    "idx_digits": "effmodels.data.images.idx:IdxDigits",
    "idx_fashion": "effmodels.data.images.idx:IdxFashion",
    "shapes": "effmodels.data.images.shapes:Shapes",
}


def get_source(name):
    """The Source class of a registry name; ConfigError with the nearest name if unknown."""
    return load(IMAGE_SOURCES, name, "source of images")

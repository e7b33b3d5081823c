"""Drawn images of one shape, with a caption that says which: always at hand, on every machine the same."""
import numpy as np

from effmodels.data.images.base import Source
from effmodels.data.sources import held_out

SIZE, COUNT = 32, 4096  # pixels of a side, images
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 230), "yellow": (230, 210, 40), "white": (245, 245, 245),
           "purple": (150, 50, 190)}  # fmt: skip
FORMS = {
    "circle": lambda y, x: x**2 + y**2 <= 1,
    "square": lambda y, x: np.maximum(abs(x), abs(y)) <= 0.85,
    "triangle": lambda y, x: (y <= 0.8) & (abs(x) <= (y + 1) / 1.9),
    "cross": lambda y, x: (np.minimum(abs(x), abs(y)) <= 0.3) & (np.maximum(abs(x), abs(y)) <= 1),
}
PLACES = {"in the middle": (0.5, 0.5), "at the top": (0.25, 0.5), "at the bottom": (0.75, 0.5), "on the left": (0.5, 0.25),
          "on the right": (0.5, 0.75)}  # fmt: skip
SIZES = {"small": 0.13, "large": 0.22}  # radius as a share of the side


class Shapes(Source):
    """COUNT images: "a small red circle on the left"; what they show, where exactly and their background are drawn by number."""

    @classmethod
    def identity(cls, source):
        return ["shapes", 1, SIZE, COUNT, source["holdout"]]

    @classmethod
    def documents(cls, source, split):
        for number in range(COUNT):
            name = f"shapes:{number}"
            if held_out(name, source["holdout"]) == (split == "validation"):
                yield (name, *draw(number))


def draw(number):
    """(image uint8 [32, 32, 3], caption) of one number."""
    rng = np.random.default_rng([number, SIZE])
    colour, form, place, size = (list(table)[rng.integers(len(table))] for table in (COLOURS, FORMS, PLACES, SIZES))
    radius, (y, x) = SIZES[size], PLACES[place] + rng.uniform(-0.04, 0.04, 2)
    image = np.full((SIZE, SIZE, 3), rng.integers(0, 70, 3)) + rng.integers(-12, 13, (SIZE, SIZE, 3))
    at = (np.arange(SIZE) + 0.5) / SIZE
    inside = FORMS[form]((at[:, None] - y) / radius, (at - x) / radius)
    image = np.where(inside[..., None], np.array(COLOURS[colour]) + rng.integers(-10, 11, (SIZE, SIZE, 3)), image)
    return image.clip(0, 255).astype(np.uint8), f"a {size} {colour} {form} {place}"

"""What a model that reads images asks of the data: how images are prepared, and the arrays that a batch has for them."""
import numpy as np

from effmodels import data
from effmodels.config import ConfigError
from effmodels.data.images.preprocess import patches
from effmodels.data.images.rows import image_token
from effmodels.models.resolve import resolve


def image_spec(model_config):
    """The `data.ImageSpec` of a ModelConfig, or None of a model of text; ConfigError for a model of films, which no source has."""
    media = resolve(model_config).media
    if media is None:
        return None
    if media.config.frames > 1:
        raise ConfigError(f"model.media.frames={media.config.frames}: no source of data has images of several frames; use frames=1.")
    encoder = media.encoder[1]
    return data.ImageSpec(
        size=encoder.image_size, patch=encoder.patch, channels=encoder.channels, mean=encoder.mean, std=encoder.std,
        placeholders=media.placeholders, images=media.config.images,
    )  # fmt: skip


def arrays(model_config):
    """{name: (shape after the rows, dtype)} of a batch's arrays besides those of text."""
    media = resolve(model_config).media
    return {} if media is None else media.arrays()


def with_image(model, tokenizer, image, tokens):
    """(tokens of a row that begins with the image, {"source": Memory}) to generate from: as in training, bos and placeholders go before.

    image: uint8 [H, W] or [H, W, C]. Raises ConfigError for a model that reads no images.
    """
    spec = image_spec(model.config)
    if spec is None:
        raise ConfigError("this model reads no images (model.media is not set); leave the image out.")
    return _begun(model, tokenizer, patches(image, spec), tokens)


def first_image(model, prepared, tokens):
    """`with_image` of the first image of the validation split, as its row has it."""
    return _begun(model, prepared.tokenizer, prepared.validation[0]["source_patches"][0], tokens)


def _begun(model, tokenizer, patches_NC, tokens):
    places = [image_token(tokenizer)] * model.media.resolved.placeholders
    memory = {"source": model.media(patches_NC[None, None], np.ones((1, 1), np.int32))}
    return [tokenizer.bos_id, *places, *np.asarray(tokens).tolist()], memory

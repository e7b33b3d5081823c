"""What layers attend to besides the row itself: a batch's `source_*` arrays as the memory "source" of a call.

Letters: M micro-batches, B batch, S memory, E its width, I images, N patches, C values of a patch.
"""
import jax

from effmodels.config import ConfigError
from effmodels.layers.context import Memory
from effmodels.multimodal.media import SOURCE

PATCHES = SOURCE + "_patches"
IMAGES = "images"  # what the embedding needs of "source": made once, kept while decoding
FIELDS = {"x": "x_BSD", "segment_ids": "segment_ids_BS", "index": "index_BS"}


def of_batch(batch, resolved, media=None):
    """{"source": Memory} of source_x [B, S, E], source_segment_ids and source_index [B, S] of a batch, {} without them; see `checked`.

    A model's `media` makes it of source_patches [B, I, N, C], source_segment_ids and source_index [B, I], of [M, B, ...] one micro-batch
    after the other. Raises ConfigError for a `source_*` that is none of these.
    """
    if media is not None and batch.get(PATCHES) is not None:
        return {SOURCE: _encoded(batch, media)}
    given = {name.removeprefix(SOURCE + "_"): a for name, a in batch.items() if name.startswith(SOURCE + "_") and a is not None}
    if not given:
        return {}
    unknown = sorted(given.keys() - FIELDS.keys())
    if unknown or "x" not in given:
        expected, got = (", ".join(f"{SOURCE}_{name}" for name in names) for names in (FIELDS, sorted(given)))
        raise ConfigError(f"batch: expected {expected}, got {got}.")
    return checked({SOURCE: Memory(**{FIELDS[name]: a for name, a in given.items()})}, resolved)


def checked(memory, resolved):
    """The memories of a call, {} for None; ConfigError for one that no layer attends to."""
    names = readers(resolved)
    for name in memory or {}:
        if name not in names:
            raise ConfigError(f"memory {name!r}: no layer attends to it; layers of this model read {', '.join(names) or 'none'}.")
    return memory or {}


def readers(resolved):
    """The names of the memories that layers of a model attend to, or that its embedding reads."""
    layers = {kind.mixer.config.memory for kind in resolved.layers if hasattr(kind.mixer.config, "memory")}
    return sorted(layers | ({SOURCE} if resolved.media is not None else set()))


def for_decoding(memory, resolved, media):
    """The memories of a decoding state: of images that only the embedding reads, what it needs of them."""
    memory = checked(memory, resolved)
    if media is None or not media.at_input or SOURCE not in memory:
        return memory
    return {**{name: m for name, m in memory.items() if name != SOURCE}, IMAGES: media.prepare(memory[SOURCE])}


def kept(memory):
    """The memories of a decoding state that the next call needs too; layers keep what they have read themselves."""
    return {name: m for name, m in memory.items() if name == IMAGES}


def _encoded(batch, media):
    arrays = tuple(batch.get(f"{SOURCE}_{name}") for name in ("patches", "index", "segment_ids"))
    if arrays[1] is None:
        raise ConfigError(f"batch: {PATCHES} is given and {SOURCE}_index, the first token that sees each image, is not.")
    return media(*arrays) if arrays[0].ndim == 4 else jax.lax.map(lambda one: media(*one), arrays)

"""The images of a model: encoder, resampler and fusion in a row. Letters: see `base`; N = F * P patches of an image."""
import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.core import FrozenDict

from effmodels.config import ConfigError, build
from effmodels.layers.context import Memory
from effmodels.multimodal.registry import get_encoder, get_fusion, get_resampler
from effmodels.parallel import axes

SOURCE = "source"  # the memory that images are


@dataclasses.dataclass(frozen=True)
class MediaConfig:
    """`model.media`: encoder and resampler are {"kind": registry name, **fields of its Config}; no resampler: every activation is kept."""

    encoder: FrozenDict
    resampler: FrozenDict = FrozenDict()
    fusion: str = "soft_tokens"
    images: int = 1  # of a row, at most
    frames: int = 1  # of an image


@dataclasses.dataclass(frozen=True)
class Resolved:
    """Checked parts of a model's media."""

    config: MediaConfig
    encoder: Any  # (class, Config)
    resampler: Any  # (class, Config) or None
    fusion: Any

    @property
    def tokens(self):
        """Entries of the memory per image."""
        return self.encoder[1].tokens * self.config.frames if self.resampler is None else self.resampler[1].tokens

    @property
    def width(self):
        """Width of the memory."""
        return (self.encoder if self.resampler is None else self.resampler)[1].width

    @property
    def placeholders(self):
        """Tokens of a row that stand for an image."""
        return self.fusion.placeholders(self.tokens)

    @property
    def patches(self):
        """(patches of an image, values of a patch)."""
        count, values = self.encoder[1].patch_shape
        return count * self.config.frames, values

    def arrays(self):
        """{name: (shape after the rows, dtype)} of what a batch has for images."""
        images = self.config.images
        return {
            "source_patches": ((images, *self.patches), jnp.float32), "source_index": ((images,), jnp.int32),
            "source_segment_ids": ((images,), jnp.int32),
        }  # fmt: skip

    def work(self, d_model):
        """The `base.Work` for the images of one row, all places taken."""
        c, (cls, encoder) = self.config, self.encoder
        parts = [(cls.work(encoder), c.images * c.frames)]
        if self.resampler is not None:
            cls, resampler = self.resampler
            parts.append((cls.work(resampler, c.frames, encoder.tokens, encoder.width), c.images))
        joined = self.fusion.work(self.width, d_model, c.images, self.tokens)
        return dataclasses.replace(
            joined, params=joined.params + sum(w.params for w, _ in parts), flops=joined.flops + sum(w.flops * n for w, n in parts)
        )  # fmt: skip


def resolve(mapping):
    """`Resolved` of `model.media`, or None of an empty one; raises ConfigError (nearest names) for what does not fit."""
    if not mapping:
        return None
    config = build(MediaConfig, mapping, "model.media")
    for field in ("images", "frames"):
        if getattr(config, field) < 1:
            raise ConfigError(f"model.media.{field}: expected a positive integer, got {getattr(config, field)}.")
    encoder = _part(config.encoder, get_encoder, "encoder")
    resampler = _part(config.resampler, get_resampler, "resampler") if config.resampler else None
    if resampler and resampler[1].max_frames < config.frames:
        raise ConfigError(f"model.media: frames={config.frames}, but resampler.max_frames={resampler[1].max_frames}; raise it.")
    try:
        fusion = get_fusion(config.fusion)
    except ConfigError as error:
        raise ConfigError(f"model.media.fusion: {error}") from None
    return Resolved(config, encoder, resampler, fusion)


def _part(mapping, get_class, field):
    fields = dict(mapping)
    if "kind" not in fields:
        raise ConfigError(f"model.media.{field}: 'kind' must be given, for example 'vit' or 'perceiver'.")
    try:
        cls = get_class(fields.pop("kind"))
    except ConfigError as error:
        raise ConfigError(f"model.media.{field}.kind: {error}") from None
    config = build(cls.Config, fields, f"model.media.{field}")
    cls.check(config)
    return cls, config


class Media(nnx.Module):
    """Encoder, resampler and fusion of a `Resolved`; a model calls `__call__` on its images and `fuse` on the embedded tokens."""

    def __init__(self, resolved, env, compute_dtype, remat, *, rngs):
        self.resolved, self.compute_dtype, self.remat = resolved, compute_dtype, remat
        cls, config = resolved.encoder
        self.encoder = cls(config, env, rngs=rngs)
        if resolved.resampler is not None:
            cls, resampler = resolved.resampler
            self.resampler = cls(resampler, env, config.width, rngs=rngs)
        self.fusion = resolved.fusion(resolved.width, env, rngs=rngs)

    def __call__(self, patches_BINC, index_BI, segment_ids_BI=None):
        """The Memory [B, I * M, E] of float patches [B, I, N, C], the index of the first token that sees each image, and its document.

        Document 0 is an empty place. Raises ValueError for patches of another shape.
        """
        r, (B, images) = self.resolved, patches_BINC.shape[:2]
        if patches_BINC.shape[2:] != r.patches:
            raise ValueError(f"media: expected images of {r.patches} (patches, values), got {patches_BINC.shape[2:]}.")
        count, values = r.encoder[1].patch_shape
        # Images are short rows of their own: whoever shares a row of text works on all of its images.
        with axes.whole_rows():
            x_BPC = axes.shard(patches_BINC.reshape(-1, count, values).astype(self.compute_dtype), "batch", None, None)
            x_BPE = self.encoder(x_BPC, self.remat)
            if r.resampler is not None:
                x_BPE = self.resampler(x_BPE.reshape(B * images, r.config.frames, *x_BPE.shape[1:]), self.remat)
            x_BSE = axes.shard(x_BPE.reshape(B, images * r.tokens, r.width), "batch", None, None)
        spread = lambda a: None if a is None else jnp.repeat(jnp.asarray(a, jnp.int32), r.tokens, axis=1)  # noqa: E731
        return Memory(x_BSE, spread(segment_ids_BI), spread(index_BI))

    @property
    def at_input(self):
        """Whether the fusion works on the embedded tokens."""
        return self.resolved.fusion.at_input

    def prepare(self, memory):
        """What `fuse` needs of a memory."""
        return self.fusion.prepare(memory, self.resolved.tokens)

    def fuse(self, x_BTD, images, ctx):
        """Embedded tokens joined with the images that `prepare` gave, or with none."""
        return self.fusion.fuse(x_BTD, images, ctx)

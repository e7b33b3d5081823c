"""From names to parts: a ModelConfig becomes one LayerKind per layer, every field checked, before data or devices are touched."""
import dataclasses
from collections.abc import Mapping
from typing import Any

from effmodels.channel.registry import get_channel
from effmodels.config import ConfigError, ModelConfig, build, nearest
from effmodels.mixers.base import Env
from effmodels.mixers.registry import get_mixer
from effmodels.models import mtp, sharing
from effmodels.multimodal import media


@dataclasses.dataclass(frozen=True)
class Part:
    """One named instance of a mixer or channel mixer: its class and its checked Config."""

    name: str
    cls: Any
    config: Any


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What one layer is made of; layers of equal kind can share a scanned stack."""

    mixer: Part
    channel: Part
    ties: tuple = ()  # ((part, sharing.Tie), ...): what it shares with other layers


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A checked model: its config, what layers may know of it, and the kind of every layer."""

    config: ModelConfig
    env: Env
    layers: tuple[LayerKind, ...]
    ahead: LayerKind | None = None  # of the modules that predict further tokens
    media: Any = None  # `multimodal.media.Resolved`, or None without images


def resolve(config):
    """The parts of every layer of a ModelConfig, dict or ConfigDict; raises ConfigError (nearest names) for anything that does not fit."""
    config = config if isinstance(config, ModelConfig) else ModelConfig.from_mapping(config)
    env = Env(
        d_model=config.d_model, num_layers=config.num_layers, norm_eps=config.norm_eps, norm_offset=config.norm_offset,
        param_dtype=config.param_dtype, implementation=config.implementation, mup_base_width=config.mup_base_width,
    )  # fmt: skip
    last, further = layer_names(config)[-1], mtp.check(config.mtp)
    ahead = further.mixer or last[0], further.channel or last[1]
    pairs = [*_pairs(config), ahead]
    mixers = _parts(config.mixers, config.pattern, [m for m, _ in pairs], get_mixer, env, "mixers", "pattern")
    channels = _parts(config.channels, config.channel, [c for _, c in pairs], get_channel, env, "channels", "channel")
    kinds = tuple(LayerKind(mixers[m], channels[c]) for m, c in layer_names(config))
    ahead = LayerKind(mixers[ahead[0]], channels[ahead[1]]) if further.depth else None
    _check_scales(config.residual_scales, {*mixers, *channels})
    return Resolved(config, env, sharing.tied(config, kinds), ahead, _media(config, kinds))


def _check_scales(scales, names):
    for name, pair in scales.items():
        if name not in names:
            raise ConfigError(f"model.residual_scales: no layer has a {name!r}.{nearest(name, names)}")
        if not (isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(a, (int, float)) for a in pair)):
            raise ConfigError(f"model.residual_scales.{name}: expected two numbers, of the stream and of the branch, got {pair!r}.")


def _media(config, kinds):
    """`multimodal.media.Resolved` of a model's images, or None; ConfigError where its layers do not fit them."""
    found = media.resolve(config.media)
    if found is None:
        return None
    if config.mup_base_width is not None:
        raise ConfigError("model.media: muP says nothing about an encoder of another width; leave model.mup_base_width=None.")
    readers = {k.mixer.name: k.mixer.config for k in kinds if getattr(k.mixer.config, "memory", None) == media.SOURCE}
    if bool(readers) == found.fusion.at_input:
        have = f"the layers {', '.join(readers)} attend to images" if readers else "no layer attends to images"
        raise ConfigError(
            f"model.media.fusion={found.config.fusion!r}, but {have}; cross_attention layers in model.pattern go with "
            "fusion='cross_attention', and with no other."
        )
    for name, fields in readers.items():
        width, room = fields.memory_dim or config.d_model, found.config.images * found.tokens
        if (width, fields.memory_len) != (found.width, room):
            raise ConfigError(
                f"model.mixers.{name}: memory_dim={width} and memory_len={fields.memory_len}, but the images of a row are {room} entries "
                f"of {found.width} numbers; set memory_dim={found.width}, memory_len={room}."
            )
    return found


def layer_names(config):
    """(mixer name, channel name) of every layer: the pattern at the absolute index, then prefix and suffix over it."""
    names = [(config.pattern[i % len(config.pattern)], config.channel[i % len(config.channel)]) for i in range(config.num_layers)]
    names[: len(config.prefix)] = list(config.prefix)
    if config.suffix:
        names[-len(config.suffix) :] = list(config.suffix)
    return names


def _pairs(config):
    pairs = (*config.prefix, *config.suffix)
    for pair in pairs:
        if not (isinstance(pair, tuple) and len(pair) == 2):
            raise ConfigError(f"model.prefix / model.suffix: expected pairs (mixer, channel), got {pair!r}.")
    return pairs


def _parts(definitions, pattern, extra_names, get_class, env, table, field):
    """Every name in use, as a Part; a name without a definition is a registry name with default fields."""
    parts = {}
    for name in (*pattern, *extra_names, *definitions):
        if name in parts:
            continue
        fields = definitions.get(name, {})
        if not isinstance(fields, Mapping):
            raise ConfigError(f"model.{table}.{name}: expected a mapping of fields, got {fields!r}.")
        fields = dict(fields)
        kind = fields.pop("kind", name)
        try:
            cls = get_class(kind)
        except ConfigError as error:
            where = f"model.{table}.{name}.kind" if name in definitions else f"model.{field}"
            known = f" Named here: {', '.join(definitions)}." if definitions else ""
            raise ConfigError(f"{where}: {error}{known}") from None
        part_config = build(cls.Config, fields, f"model.{table}.{name}")
        cls.check(part_config, env)
        parts[name] = Part(name, cls, part_config)
    unused = [n for n in definitions if n not in pattern and n not in extra_names]
    if unused:
        raise ConfigError(f"model.{table}: {unused[0]!r} is defined but no layer uses it.{nearest(unused[0], {*pattern, *extra_names})}")
    return parts

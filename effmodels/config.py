"""The one boundary between what a person writes and what the code uses: mappings become frozen dataclasses, or a sentence says why not."""
import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping

from flax.core import FrozenDict, freeze


class ConfigError(ValueError):
    """A config value that a person can mend; the message names the field, what was given and what was expected."""


def nearest(name, options):
    """' Did you mean X?' for a misspelt name, and the list of what exists; for the end of an error message."""
    options = sorted(map(str, options))
    close = difflib.get_close_matches(str(name), options, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"{hint} Available: {', '.join(options) or 'none'}."


def plain(value):
    """Lists to tuples and mappings to hashable FrozenDicts, recursively (ml_collections' ConfigDict included)."""
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return freeze({k: plain(v) for k, v in value.items()})
    if isinstance(value, (list, tuple)):
        return tuple(plain(v) for v in value)
    return value


def build(cls, mapping, where):
    """The frozen dataclass `cls` from a mapping, every field checked by name and type; `where` names the place in the config.

    Raises ConfigError for unknown fields (with the nearest name), missing ones and values of another type.
    """
    if isinstance(mapping, cls):
        return mapping
    if hasattr(mapping, "to_dict"):
        mapping = mapping.to_dict()
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{where}: expected a mapping of {cls.__qualname__} fields, got {mapping!r}.")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for name in mapping:
        if name not in fields:
            raise ConfigError(f"{where}: unknown field {name!r}.{nearest(name, fields)}")
    missing = [n for n, f in fields.items() if n not in mapping and f.default is f.default_factory is dataclasses.MISSING]
    if missing:
        raise ConfigError(f"{where}: {', '.join(missing)} must be given.")
    return cls(**{name: check(plain(value), hints[name], f"{where}.{name}") for name, value in mapping.items()})


def check(value, hint, where):
    """The value if it has the hinted type (an int serves as a float, an integral float as an int), else ConfigError."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for option in options:
        fits, converted = _fits(value, option)
        if fits:
            return converted
    expected = " or ".join("None" if o is type(None) else getattr(o, "__name__", str(o)) for o in options)
    raise ConfigError(f"{where}: expected {expected}, got {value!r} ({type(value).__name__}).")


def _fits(value, option):
    kind = typing.get_origin(option) or option
    if kind is typing.Any:
        return True, value
    if kind is type(None):
        return value is None, None
    if kind is bool:
        return isinstance(value, bool), value
    if kind is int:
        whole = isinstance(value, int) or isinstance(value, float) and value.is_integer()
        return (True, int(value)) if whole and not isinstance(value, bool) else (False, value)
    if kind is float:
        return (True, float(value)) if isinstance(value, (int, float)) and not isinstance(value, bool) else (False, value)
    if kind is tuple and isinstance(value, str):
        return True, (value,)
    return isinstance(value, Mapping if kind in (Mapping, FrozenDict) else kind), value


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """An architecture: a pattern of named mixers and channel mixers, and what surrounds them. Hashable; `models.resolve` checks it.

    Layer i (absolute) is pattern[i % len(pattern)] and channel[i % len(channel)]; `prefix` / `suffix` are (mixer, channel) pairs that
    override the first / last layers without shifting the phase. mixers[name] = {"kind": registry name (default: name), **Config fields}.
    """

    vocab_size: int
    d_model: int
    num_layers: int
    pattern: tuple = ("attention",)
    channel: tuple = ("mlp",)
    prefix: tuple = ()
    suffix: tuple = ()
    mixers: FrozenDict = FrozenDict()
    channels: FrozenDict = FrozenDict()
    sharing: FrozenDict = FrozenDict()  # layers that use the same weights: see models.sharing
    mtp: FrozenDict = FrozenDict()  # modules that predict further tokens: see models.mtp
    media: FrozenDict = FrozenDict()  # images beside the text: see multimodal.media
    norm: str = "rmsnorm"
    norm_eps: float = 1e-6
    norm_offset: float = 0.0  # added to the scales of norms, of queries and keys too; 1: scales are learned around zero
    norm_position: str = "pre"
    residual: str = "serial"
    residual_scales: FrozenDict = FrozenDict()  # name of a mixer or channel mixer -> (a, b): the stream is a x + b f; others: x + f
    tie_embeddings: bool = False
    embed_scale: float = 1.0  # multiplies the embedding on the way in; sqrt(d_model) gives a residual stream of size one
    learned_positions: int = 0  # rows of a learned table that is added to the embedding (GPT-2); no row can be longer. 0: none
    logits_soft_cap: float | None = None
    z_loss: float = 0.0
    dropout: float = 0.0
    mup_base_width: int | None = None  # d_model at which learning rates were tuned; None: standard parametrisation
    param_dtype: str = "float32"
    compute_dtype: str = "float32"
    scan_layers: bool = True  # equal runs of layers are stacked and scanned; False unrolls them (same numbers, longer compile)
    scan_neighbours: bool = False  # inside a period too: a long period is a smaller program, for a copy of its weights per step
    remat: str = "none"
    implementation: str | None = None  # kernels: None = the best supported here, or the name of one

    def __post_init__(self):
        # A direct ModelConfig(mixers={...}, pattern=[...]) is as hashable as one from a file.
        for field in ("pattern", "channel", "prefix", "suffix", "mixers", "channels", "sharing", "mtp", "media", "residual_scales"):
            value = plain(getattr(self, field))
            object.__setattr__(self, field, (value,) if isinstance(value, str) else value)
        named_remat(self.remat)
        for field, options in CHOICES.items():
            if getattr(self, field) not in options:
                raise ConfigError(f"model.{field}: unknown {getattr(self, field)!r}.{nearest(getattr(self, field), options)}")
        for field in ("vocab_size", "d_model", "num_layers"):
            if getattr(self, field) < 1:
                raise ConfigError(f"model.{field}: expected a positive integer, got {getattr(self, field)}.")
        for field in ("pattern", "channel"):
            if not getattr(self, field):
                raise ConfigError(f"model.{field}: expected at least one name, got {getattr(self, field)!r}.")
        if self.residual == "parallel" and (self.norm_position == "input" or self.residual_scales):
            raise ConfigError("model.residual='parallel': norm_position='input' and residual_scales are of a serial residual only.")
        if self.learned_positions < 0:
            raise ConfigError(f"model.learned_positions: expected a number of positions, or 0 for none, got {self.learned_positions}.")
        if self.logits_soft_cap is not None and self.logits_soft_cap <= 0:
            raise ConfigError(f"model.logits_soft_cap: expected a positive number or None, got {self.logits_soft_cap}.")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"model.dropout: expected 0 <= dropout < 1, got {self.dropout}.")
        if len(self.prefix) + len(self.suffix) > self.num_layers:
            raise ConfigError(
                f"model: prefix ({len(self.prefix)} layers) and suffix ({len(self.suffix)}) exceed num_layers={self.num_layers}."
            )

    @classmethod
    def from_mapping(cls, mapping):
        """The checked ModelConfig of a ConfigDict or dict; raises ConfigError naming the field."""
        return build(cls, mapping, "model")


DTYPES = ("float32", "bfloat16", "float16", "float64")
CHOICES = {
    "norm": ("rmsnorm", "layernorm"),
    "norm_position": ("pre", "post", "sandwich", "input"),
    "residual": ("serial", "parallel"),
    "param_dtype": DTYPES,
    "compute_dtype": DTYPES,
}
REMAT = ("none", "full", "dots", "dots_no_batch")
SAVE, OFFLOAD = "save:", "offload:"
# What remat="save:...+offload:..." may name: results of matrix products by the weight's output dim (queries and keys rotated), what the
# kernels return, and rows as they reached their experts.
SAVEABLE = ("heads", "kv_heads", "embed", "mlp", "dispatch", "expert_mlp", "kernel")


def named_remat(remat):
    """(names kept on the device, names kept in the host's memory) of a remat "save:kernel+offload:embed"; None for a plain one.

    Either part may stand alone. Raises ConfigError for what is neither such a list nor one of REMAT.
    """
    if remat in REMAT:
        return None
    found = {SAVE: (), OFFLOAD: ()}
    for part in remat.split("+"):
        kind = next((k for k in found if part.startswith(k) and not found[k]), None)
        if kind is None:
            raise ConfigError(f"model.remat: unknown {remat!r}.{nearest(remat, (*REMAT, SAVE + ','.join(SAVEABLE)))}")
        found[kind] = tuple(part.removeprefix(kind).split(","))
    for name in (names := (*found[SAVE], *found[OFFLOAD])):
        if name not in SAVEABLE:
            raise ConfigError(f"model.remat: {remat!r} keeps {name!r}, which is nothing that a layer names.{nearest(name, SAVEABLE)}")
        if names.count(name) > 1:
            raise ConfigError(f"model.remat: {remat!r} names {name!r} twice.")
    return found[SAVE], found[OFFLOAD]

"""The sections of a run's config as frozen dataclasses; every field is checked before data or devices are touched."""
import dataclasses

from flax.core import FrozenDict

from effmodels import data as data_package
from effmodels.config import ConfigError, ModelConfig, build, check, nearest, plain
from effmodels.models.resolve import resolve
from effmodels.parallel import axes, mesh
from effmodels.parallel.distributed import Distributed
from effmodels.parallel.options import Options


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How a step runs; see configs/common.py."""

    micro_batch_size: int | None = None
    accumulation: str = "auto"
    accumulate_dtype: str = "float32"
    remat: str = "none"
    batch_ramp: tuple = ()
    batch_ramp_unit: str = "steps"
    length_stages: tuple = ()
    compiler_options: FrozenDict = FrozenDict()


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the state is saved and how many are kept."""

    every_steps: int = 500
    keep: int = 2
    keep_best: int = 0
    mode: str = "auto"


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """When the validation windows are read, and the sample printed at the end."""

    every_steps: int = 500
    batches: int = 16
    at_end: bool = True
    sample_prompt: str = "def "
    sample_tokens: int = 200


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What is printed and written."""

    every_steps: int = 10
    tensorboard: str = "auto"
    profile_steps: tuple = ()


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A whole run. `data` and `optim` stay mappings: their own packages check them."""

    seed: int
    steps: int
    batch_size: int
    seq_len: int
    model: ModelConfig
    data: dict
    optim: dict
    mesh: dict
    rules: dict
    parallel: Options
    distributed: Distributed
    train: TrainConfig
    checkpoint: CheckpointConfig
    eval: EvalConfig
    log: LogConfig
    start_from: str = ""

    @classmethod
    def from_mapping(cls, mapping, platform="cpu"):
        """The checked RunConfig of a ConfigDict or dict; raises ConfigError naming the field.

        model.compute_dtype="auto" becomes bfloat16 on accelerators and float32 on a CPU.
        """
        given = mapping.to_dict() if hasattr(mapping, "to_dict") else dict(mapping)
        given.pop("expect", None)
        names = [f.name for f in dataclasses.fields(cls)]
        for name in given:
            if name not in names:
                raise ConfigError(f"config: unknown section {name!r}.{nearest(name, names)}")
        given["train"] = dict(given.get("train") or {})
        given["train"]["compiler_options"] = _options(given["train"].get("compiler_options", ""))
        sections = {"train": TrainConfig, "checkpoint": CheckpointConfig, "eval": EvalConfig, "log": LogConfig}
        built = {name: build(section, given.get(name, {}), f"config.{name}") for name, section in sections.items()}
        built |= {name: build(section, given.get(name, {}), f"config.{name}") for name, section in SPREAD.items()}
        model = dict(given.get("model") or {})
        if model.get("compute_dtype") == "auto":
            model["compute_dtype"] = "float32" if platform == "cpu" else "bfloat16"
        model["remat"] = built["train"].remat if built["train"].remat != "none" else model.get("remat", "none")
        numbers = {name: _positive(given.get(name), name) for name in ("steps", "batch_size", "seq_len")}
        run = cls(
            seed=check(given.get("seed", 0), int, "config.seed"), start_from=check(given.get("start_from", ""), str, "config.start_from"),
            **numbers, **built, model=ModelConfig.from_mapping(model),
            **{name: dict(plain(given.get(name, {}))) for name in ("data", "optim", "mesh", "rules")},  # lists of a JSON file to tuples
        )  # fmt: skip
        run.check()
        return run

    def check(self):
        """Raises ConfigError for what does not fit together."""
        resolve(self.model)
        data_package.check(self.data, images=bool(self.model.media))
        axes.make_rules(self.rules)
        train, choices = self.train, ("auto", "scan", "loop")
        if train.accumulation not in choices:
            raise ConfigError(f"config.train.accumulation: unknown {train.accumulation!r}.{nearest(train.accumulation, choices)}")
        if self.log.tensorboard not in TENSORBOARD:
            raise ConfigError(f"config.log.tensorboard: unknown {self.log.tensorboard!r}.{nearest(self.log.tensorboard, TENSORBOARD)}")
        if self.checkpoint.mode not in ("auto", "sync", "async"):
            raise ConfigError(f"config.checkpoint.mode: expected auto, sync or async, got {self.checkpoint.mode!r}.")
        micro = train.micro_batch_size
        if micro is not None and (micro < 1 or self.batch_size % micro):
            raise ConfigError(
                f"config: batch_size={self.batch_size} is not a multiple of train.micro_batch_size={micro}; "
                f"valid: {_divisors(self.batch_size)}."
            )

    def mesh_sizes(self, num_devices):
        """Axis sizes on this many devices; ConfigError when a micro-batch cannot be split over them."""
        sizes = mesh.sizes(self.mesh, num_devices)
        rules = axes.make_rules(self.rules)
        rows, over = axes.parts("batch", sizes, rules), " and ".join(", ".join(axes.as_tuple(dict(rules)["batch"])).rsplit(", ", 1))
        if axes.parts("kv_seq", sizes, rules) > 1:
            raise ConfigError(
                f"config.rules.kv_seq={dict(rules)['kv_seq']!r}: no form of attention joins keys that are split on their own; use "
                "rules.kv_seq=none, and rules.seq with parallel.attention=ring to split queries and keys."
            )
        for name, size in (("batch_size", self.batch_size), ("train.micro_batch_size", self.train.micro_batch_size)):
            if size is not None and size % rows:
                raise ConfigError(
                    f"config: {name}={size} cannot be split over the {rows} devices of the mesh's {over} axes; "
                    f"nearest: {' or '.join(map(str, sorted({max(rows, size // rows * rows), -(-size // rows) * rows})))}."
                )
        return sizes

    def identity(self):
        """What makes this the same run: a changed value here cannot resume an old workdir. A plain JSON dict."""
        keep = ("seed", "batch_size", "seq_len", "model", "data", "optim")
        model = {f.name: getattr(self.model, f.name) for f in dataclasses.fields(ModelConfig) if f.name not in _FREE_MODEL_FIELDS}
        values = {name: getattr(self, name) for name in keep} | {"model": model}
        values |= {"start_from": self.start_from} if self.start_from else {}
        values["data"] = {k: v for k, v in dict(self.data).items() if k != "cache_dir"}
        return jsonable(values)


SPREAD = {"parallel": Options, "distributed": Distributed}
TENSORBOARD = {"auto": "auto", "on": True, "off": False}
# How layers are run, not what they compute: free to change on resume.
_FREE_MODEL_FIELDS = ("scan_layers", "scan_neighbours", "remat", "implementation", "compute_dtype")


def jsonable(value):
    """Mappings, tuples and ConfigDicts as plain dicts and lists."""
    value = plain(value)
    if hasattr(value, "items"):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, tuple):
        return [jsonable(v) for v in value]
    return value


def _options(value):
    """XLA's options as a mapping: that of a saved run, or text such as "xla_a=true,xla_b=4"."""
    if not isinstance(value, str):
        return value
    pairs = [part.partition("=") for part in value.split(",") if part.strip()]
    for name, sign, setting in pairs:
        if not sign or not setting.strip():
            raise ConfigError(f"config.train.compiler_options: expected name=value,name=value, got {name!r}.")
    return {name.strip(): _typed(setting.strip()) for name, _, setting in pairs}


def _typed(text):
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    return int(text) if text.lstrip("-").isdigit() else text


def _positive(value, name):
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"config.{name}: expected a positive integer, got {value!r}.")
    return value


def _divisors(n):
    return [i for i in range(1, n + 1) if n % i == 0]

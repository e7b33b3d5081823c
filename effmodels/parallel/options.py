"""How a program is spread over a mesh, besides which axis splits which dim: one frozen record, in force like the rules are.

What is computed stays the same, only where and in which order changes; a test of every choice compares it with one device.
"""
import dataclasses

import jax

from effmodels.config import ConfigError, nearest

LAYOUTS = ("contiguous", "zigzag", "striped")
CHOICES = {
    "layout": ("auto", *LAYOUTS),
    "attention": ("ring", "all_gather", "ulysses"),
    "states": ("auto", "ring", "log"),
    "experts": ("auto", "padded", "ragged", "gather"),
    "gradient_sum": ("xla", "ring"),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """The `parallel` section of a run's config.

    layout: where a row's tokens lie on the `seq` axis; auto is resolved by `layouts.choose` before it gets here. attention: how
    queries meet the keys of other shards. states: how recurrent states pass over the `seq` axis. experts: how tokens travel over the
    `expert` axis.
    recv_bound: rows that one pair of expert shards has room for, as a multiple of the mean; None: the worst case.
    rounds: circular pipeline, how often a micro-batch goes round the stages. zero1: optimiser state split over `data`.
    gradient_sum: gradients of projections, "xla": by the compiler; "ring": while they are computed (`weight_ring`).
    gradient_rings: mesh axes by ring of chips, over which gradients of experts are summed by permutes (`scatter`); empty: by the compiler.
    """

    layout: str = "auto"
    attention: str = "ring"
    states: str = "auto"
    experts: str = "auto"
    recv_bound: float | None = None
    rounds: int = 1
    zero1: bool = False
    gradient_rings: str = ""
    gradient_sum: str = "xla"

    def __post_init__(self):
        for field, known in CHOICES.items():
            if getattr(self, field) not in known:
                raise ConfigError(f"parallel.{field}: unknown {getattr(self, field)!r}.{nearest(getattr(self, field), known)}")
        if self.recv_bound is not None and self.recv_bound <= 0:
            raise ConfigError(f"parallel.recv_bound: expected a positive number or None (the worst case), got {self.recv_bound}.")
        if self.rounds < 1:
            raise ConfigError(f"parallel.rounds: expected at least 1, got {self.rounds}.")


_OPTIONS = jax.make_user_context(default_value=None)


def use(options):
    """Context manager: inside, `current()` is these options; part of jit's cache key."""
    return _OPTIONS(options)


def current():
    """The options in force (defaults outside of any `use`); a layout left at "auto" is contiguous."""
    options = Options() if _OPTIONS.value is None else _OPTIONS.value
    return dataclasses.replace(options, layout="contiguous") if options.layout == "auto" else options

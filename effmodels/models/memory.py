"""What layers attend to besides the row itself: a batch's `source_*` arrays as the memory "source" of a call.

Letters: B batch, S memory, E its width.
"""
from effmodels.config import ConfigError
from effmodels.layers.context import Memory

SOURCE = "source"
FIELDS = {"x": "x_BSD", "segment_ids": "segment_ids_BS", "index": "index_BS"}


def of_batch(batch, resolved):
    """{"source": Memory} of source_x [B, S, E], source_segment_ids and source_index [B, S] of a batch, {} without them; see `checked`.

    Raises ConfigError for a `source_*` that is none of these.
    """
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
    """The names of the memories that layers of a model attend to."""
    return sorted({kind.mixer.config.memory for kind in resolved.layers if hasattr(kind.mixer.config, "memory")})

"""Names to classes, imported on first use: a new part is one file and one line."""
import importlib


def load(table, name, what):
    """The class behind `name` in a table of "package.module:Class" lines; ConfigError with the nearest name if there is none."""
    if name not in table:
        from effmodels.config import ConfigError, nearest  # it imports flax and jax, which `effmodels.data` does without

        hint = f" Write a tuple as ('{name.replace(',', chr(39) + ', ' + chr(39))}'), not as text with commas." if "," in str(name) else ""
        raise ConfigError(f"unknown {what} {name!r}.{nearest(name, table)}{hint}")
    target = table[name]
    if not isinstance(target, str):
        return target
    module, cls = target.split(":")
    return getattr(importlib.import_module(module), cls)

"""Refuse bad input before anything is traced: one sentence with what was given, what was expected and what to do."""
import jax.numpy as jnp


def rank(op, name, x, letters):
    """`x` must be an array with one axis per letter."""
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        raise TypeError(f"{op}: {name} must be an array [{', '.join(letters)}], got {type(x).__name__}.")
    if x.ndim != len(letters):
        raise ValueError(f"{op}: {name} must have {len(letters)} axes [{', '.join(letters)}], got shape {tuple(x.shape)}.")


def shape(op, name, x, expected, why):
    """`x` must have exactly this shape; `why` says where the numbers come from."""
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        raise TypeError(f"{op}: {name} must be an array of shape {tuple(expected)} ({why}), got {type(x).__name__}.")
    if tuple(x.shape) != tuple(expected):
        raise ValueError(f"{op}: {name} must have shape {tuple(expected)} ({why}), got {tuple(x.shape)}.")


def floating(op, name, x, like=None):
    """`x` must be floating, and of the same dtype as `like` = (name, array)."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{op}: {name} must be floating, got {x.dtype}; cast it first.")
    if like is not None and x.dtype != like[1].dtype:
        raise TypeError(f"{op}: {name} has dtype {x.dtype} but {like[0]} has {like[1].dtype}; cast one to the other.")


def integer(op, name, x):
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"{op}: {name} must be an integer array, got {x.dtype}; cast it first.")


def count(op, name, value, least):
    """A static Python integer >= least."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{op}: {name} must be a Python integer >= {least}, got {value!r}.")
    if value < least:
        raise ValueError(f"{op}: {name} must be >= {least}, got {value}.")


def number(op, name, value, positive=False):
    """A static Python number (it is compiled into the kernel), optionally above zero."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a Python number (it is static), got {type(value).__name__}; convert it with float(...).")
    if positive and not value > 0:
        raise ValueError(f"{op}: {name} must be above 0, got {value}; use None for none.")


def accumulator(*dtypes):
    """float64 for float64 inputs, else float32: the dtype of sums, statistics and states."""
    return jnp.float64 if any(d == jnp.float64 for d in dtypes) else jnp.float32

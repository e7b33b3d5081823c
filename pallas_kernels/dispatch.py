"""Which implementation of an op runs: a named one runs or raises with the reason; None picks the best supported one and says so once.

Nothing here falls back in silence: what None chose, and what it refused and why, is one INFO line per process, op and reason.
An implementation is a module `pallas_kernels.<op>.<suffix>`. A Pallas one also has `unsupported(*arguments)`: a sentence saying why it
cannot run these inputs, or None.
"""
import functools
import importlib
import logging

from pallas_kernels.target import target

# name: (module suffix, platform it is made for). Best first; "reference" is never picked: it is the slow twin that tests compare with.
_TABLE = {"pallas_tpu": ("tpu", "tpu"), "pallas_gpu": ("gpu", "gpu"), "xla": ("xla", None), "reference": ("reference", None)}
_PREFERENCE = ("pallas_tpu", "pallas_gpu", "xla")
IMPLEMENTATIONS = ("reference", "xla", "pallas_tpu", "pallas_gpu")
# GPU kernels whose results were compared with the reference on a GPU, in a run recorded under docs/benchmarks/. None picks no other.
SEEN_RIGHT_ON_A_GPU = frozenset()
_log = logging.getLogger("pallas_kernels")
_said = set()


def pick(op, function, implementation, interpret, arguments):
    """The function named `function` of the implementation of `op` that will run on `arguments`.

    Args:
      implementation: one of IMPLEMENTATIONS, or None for the best supported one.
      interpret: None (interpret a Pallas kernel where its hardware is absent), a bool, or jax's interpret parameters.
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{op}: implementation={implementation!r} is unknown; expected None or one of {', '.join(IMPLEMENTATIONS)}.")
    name = implementation or _best(op, arguments)
    if interpret is not None and not name.startswith("pallas"):
        raise ValueError(f"{op}[{name}]: interpret={interpret} given, but only a Pallas kernel can be interpreted; leave interpret=None.")
    if implementation is not None and (reason := _unsupported(op, name, arguments)):
        raise NotImplementedError(f"{op}[{name}]: {reason}. Use implementation='xla', or None for the best supported one.")
    run = getattr(_module(op, name), function)
    if not name.startswith("pallas"):
        return run
    return functools.partial(run, interpret=target().platform != _TABLE[name][1] if interpret is None else interpret)


def _best(op, arguments):
    refused = {}
    for name in _PREFERENCE:
        refused[name] = _not_here(op, name) or _unsupported(op, name, arguments)
        if refused[name] is None:
            break
    reasons = "; ".join(f"{other}: {why}" for other, why in refused.items() if why)
    if (op, name, reasons) not in _said:
        _said.add((op, name, reasons))
        _log.info("%s: implementation=None chose %s%s", op, name, f" (refused {reasons})" if reasons else "")
    return name


def _not_here(op, name):
    """Why None does not consider this implementation for the program being traced."""
    platform, wanted = target().platform, _TABLE[name][1]
    if wanted not in (None, platform):
        return f"the program is for a {platform.upper()}"
    if wanted == "gpu" and op not in SEEN_RIGHT_ON_A_GPU:
        return "no GPU run that shows it right is recorded in docs/benchmarks/"
    return None


def _unsupported(op, name, arguments):
    return _module(op, name).unsupported(*arguments) if name.startswith("pallas") else None


def _module(op, name):
    return importlib.import_module(f"pallas_kernels.{op}.{_TABLE[name][0]}")

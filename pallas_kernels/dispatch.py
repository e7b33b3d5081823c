"""Which implementation of an op runs: a named one runs or raises with the reason; None picks the best supported one and says so once.

Nothing here falls back in silence: what None chose, and what it refused and why, is one INFO line per process and op.
"""
import logging

IMPLEMENTATIONS = ("reference", "xla", "pallas_tpu", "pallas_gpu")
# Best first. "reference" is never picked: it is the slow twin that tests compare with.
_PREFERENCE = ("pallas_tpu", "pallas_gpu", "xla")
_log = logging.getLogger("pallas_kernels")
_said = set()


def choose(op, implementation, interpret=None, refused=None):
    """The name of the implementation of `op` that will run.

    Args:
      op: name of the op, for messages.
      implementation: one of IMPLEMENTATIONS, or None for the best supported one.
      interpret: as given by the caller; it has a meaning for Pallas kernels only.
      refused: {name: sentence saying why it cannot run these inputs}.
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{op}: implementation={implementation!r} is unknown; expected None or one of {', '.join(IMPLEMENTATIONS)}.")
    refused = {"pallas_tpu": "no Pallas TPU kernel is written yet", "pallas_gpu": "no Pallas GPU kernel is written yet", **(refused or {})}
    name = implementation or next(name for name in _PREFERENCE if name not in refused)
    if name in refused:
        raise NotImplementedError(f"{op}[{name}]: {refused[name]}. Use implementation='xla', or None for the best supported one.")
    if interpret is not None and not name.startswith("pallas"):
        raise ValueError(f"{op}[{name}]: interpret={interpret} given, but only a Pallas kernel can be interpreted; leave interpret=None.")
    if implementation is None and op not in _said:
        _said.add(op)
        reasons = "; ".join(f"{other}: {refused[other]}" for other in _PREFERENCE if other in refused)
        _log.info("%s: implementation=None chose %s%s", op, name, f" (refused {reasons})" if reasons else "")
    return name

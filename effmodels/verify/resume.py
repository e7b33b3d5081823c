"""Resumed equals straight, bit for bit: train's own step and checkpoint, on one device."""
import pathlib
import tempfile

import jax
import numpy as np

from effmodels.train import grouping
from effmodels.train.state import TrainState
from effmodels.verify.report import Outcome, row


def check(case):
    """`Outcome`: two steps = one step, save, restore, one step."""
    from effmodels.train.checkpoint import Checkpointer  # imports Orbax, 1 s

    outcome, setup = Outcome("resume"), case.one
    program = case.compiled("train step", lambda: case.jit(setup.functions.train_step, out_shardings=(setup.shardings, None)))
    params, buffers = case.params, case.buffers
    start = TrainState(np.int32(0), params, buffers, setup.optimizer.init(params))
    second = case.drawn_batch(case.seed + 1)
    first, _ = program(jax.device_put(start, setup.shardings), setup.put([case.batch]))
    straight, metrics = program(first, setup.put([second]))
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpointer(pathlib.Path(folder) / "checkpoints", mode="sync", log=lambda *_: None)
        checkpoints.save(1, first, manifest=setup.names, host={})
        restored, _, _ = checkpoints.restore(setup.restorable_state(), manifest=setup.names)
        checkpoints.close()
    unequal = _unequal(restored, first, setup.names)
    outcome.rows.append(row("resume", "arrays that are not as they were saved", len(unequal), 0))
    resumed, resumed_metrics = program(restored, setup.put([second]))
    after = _unequal(resumed, straight, setup.names)
    outcome.rows.append(row("resume", "arrays that differ after the next step", len(after), 0))
    outcome.rows.append(row("resume", "loss of the next step", abs(float(metrics["loss"]) - float(resumed_metrics["loss"])), 0))
    for names, what in ((unequal, "restored with other bits than saved"), (after, "other bits after the step that follows the restore")):
        if names:
            outcome.explanations.append(f"{what}: {', '.join(names[:6])}{' ...' if len(names) > 6 else ''}")
    return outcome


def _unequal(got, want, names):
    """Canonical parts whose bits differ."""
    a, b = (grouping.leaves(jax.device_get(s), names) for s in (got, want))
    bad = []
    for key, (leaf, x) in b.items():
        y = np.asarray(a[key][1])
        same = [np.asarray(x if i is None else x[i]).tobytes() == np.asarray(y if i is None else y[i]).tobytes() for _, i in leaf.parts()]
        bad += [part for (part, _), ok in zip(leaf.parts(), same) if not ok]
    return bad

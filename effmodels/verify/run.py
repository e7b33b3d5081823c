"""All checks of one config, with progress; where a token's routing hangs on rounding, all sides replay one choice."""
import dataclasses
import time

import jax

from effmodels.config import ConfigError, nearest
from effmodels.verify import forms, mesh_check, resume, single, ties
from effmodels.verify.case import Case
from effmodels.verify.report import LOADS, Outcome, Report

CHECKS = {
    "mesh": mesh_check.check,
    "update": mesh_check.update,
    "forms": forms.check,
    "packed": single.packed,
    "remat": single.remat,
    "accumulation": single.accumulation,
    "resume": resume.check,
    "bf16": single.bfloat16,
    "dropout": single.dropout,
}
EXACT_OR_BANDED = ("update", "resume", "bf16", "forms")  # not helped by replaying choices of the batch


def verify(config, *, devices=None, checks=None, seed=0, compute_dtype="float32", log=print):
    """`Report` of a run's config (ConfigDict or dict) on `devices` (default: all).

    checks: names of CHECKS, default all. compute_dtype: of both sides, "bfloat16" with the wider bounds of its rounding.
    Raises ConfigError for a config that does not run on these devices or in this machine's memory.
    """
    names = list(CHECKS) if not checks else list(checks)
    for name in names:
        if name not in CHECKS:
            raise ConfigError(f"--checks: unknown check {name!r}.{nearest(name, CHECKS)}")
    begun = time.perf_counter()
    devices = jax.devices() if devices is None else list(devices)
    case = Case(config, devices, seed, compute_dtype)
    used = ", ".join(f"{a}={n}" for a, n in case.sizes.items() if n > 1) or "one device"
    log(
        f"{len(devices)} x {devices[0].device_kind}, mesh {used}, layout {case.mesh.options.layout}; {case.compute_dtype}; "
        f"{case.one.cost.params:,} parameters; {case.micro_batches} micro-batches of {case.rows} packed rows of {case.user.seq_len}; "
        f"seed {seed} ({time.perf_counter() - begun:.1f} s)"
    )
    if case.refusal:
        log(case.refusal)
    outcomes = [run_check(case, name, log) for name in names]
    setting = {
        "devices": len(devices), "device_kind": devices[0].device_kind, "mesh": case.sizes,
        "parallel": dataclasses.asdict(case.mesh.options), "compute_dtype": case.compute_dtype,
        "rows": case.rows, "micro_batches": case.micro_batches, "seq_len": case.user.seq_len,
        "parameters": case.one.cost.params, "seed": seed,
        "tokens_replayed": case.replayed, "jax": jax.__version__, "seconds": time.perf_counter() - begun,
    }  # fmt: skip
    return Report(setting, outcomes)


def run_check(case, name, log):
    """`Outcome` of one check by name, near ties of expert scores replayed; logs its verdict and seconds."""
    begun = time.perf_counter()
    outcome = CHECKS[name](case)
    if not outcome.passed and case.has_experts and name not in EXACT_OR_BANDED:
        outcome = _replayed(case, name, outcome)
    outcome.seconds = time.perf_counter() - begun
    verdict = f"not done: {outcome.skipped}" if outcome.skipped else "passed" if outcome.passed else "FAILED"
    log(f"{name:<13}{verdict}  {outcome.seconds:.1f} s")
    return outcome


def _replayed(case, name, outcome):
    """The outcome when tokens whose choice of experts is a tie up to rounding replay the reference's; the first if that does not help."""
    loads = [r for r in outcome.rows if r.what == LOADS]
    if loads and all(r.passed for r in loads) or not ties.present(case):
        return outcome  # every token went to the same experts, or none of them by a tie
    with case.replaying() as tied_BT:
        again = CHECKS[name](case)
    if not again.passed:
        return outcome
    case.replayed += int(tied_BT.sum())
    note = f"{tied_BT.sum()} tokens with a tie of expert scores under {ties.GAP:g} replay the reference's experts"
    return Outcome(again.check, [_noted(r, note) for r in again.rows], again.leaves, again.explanations)


def _noted(r, note):
    return dataclasses.replace(r, note=f"{r.note}; {note}" if r.note else note)

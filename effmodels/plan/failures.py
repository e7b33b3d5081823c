"""Failures: how often to save, and what share of the time a run loses to saving, to work done twice and to restarts.

Failures are taken as independent and exponential. Letters of the formulas: M mean seconds between failures of the whole job, delta seconds
of a save that stops the step, R seconds of a restart, tau seconds of work between two saves.
"""
import dataclasses
import math

# 16,384 H100, 54 days, 419 unexpected interruptions (arXiv:2407.21783, section 3.3.4): 50,700 hours of one chip.
MTBF_CHIP_HOURS = 16_384 * 54 * 24 / 419
RESTART_SECONDS = 600.0  # assumption: new job, compilation from a cache, restore from storage
COPY_SECONDS = 1.0  # assumption: the state crosses to another host's memory behind the step and stops it this long
COPY_RESTART_SECONDS = 60.0  # assumption: "tens of seconds" where another host's memory has the state (Gemini 2.5 report)


@dataclasses.dataclass(frozen=True)
class Failures:
    """What failures cost a run. interval: seconds of work between saves; goodput: the share of the time that is new work.

    The copy_* fields are those with copies of the state in other hosts' memory. days, chip_hours: of the whole run, saves and failures
    included; 0 where the run's length is not known.
    """

    mtbf_chip_hours: float
    mtbf_seconds: float
    save_seconds: float
    interval: float
    goodput: float
    copy_interval: float
    copy_goodput: float
    interval_steps: int
    days: float
    copy_days: float
    chip_hours: float
    copy_chip_hours: float

    @property
    def source(self):
        """Where the rate of failures is from."""
        return "assumed: as H100s in arXiv:2407.21783" if self.mtbf_chip_hours == MTBF_CHIP_HOURS else "as given"


def failures(
    chips, save_seconds, *, step_seconds=0.0, steps=0, mtbf_chip_hours=MTBF_CHIP_HOURS, restart_seconds=RESTART_SECONDS,
    copy_seconds=COPY_SECONDS, copy_restart_seconds=COPY_RESTART_SECONDS,
):  # fmt: skip
    """`Failures` of a job on this many chips; save_seconds: how long a save to storage stops the step.

    step_seconds and steps: of the run without any failure; 0 where they are not known. Raises ValueError for what is not positive.
    """
    if chips < 1 or mtbf_chip_hours <= 0:
        raise ValueError(f"failures: expected at least one chip and a positive mtbf_chip_hours, got {chips} and {mtbf_chip_hours}.")
    mtbf = mtbf_chip_hours * 3600 / chips
    interval, copy_interval = best_interval(save_seconds, mtbf), best_interval(copy_seconds, mtbf)
    share = goodput(interval, save_seconds, mtbf, restart_seconds)
    copy_share = goodput(copy_interval, copy_seconds, mtbf, copy_restart_seconds)
    days, copy_days = (step_seconds * steps / 86_400 / s if s else math.inf for s in (share, copy_share))
    return Failures(
        mtbf_chip_hours, mtbf, save_seconds, interval, share, copy_interval, copy_share,
        interval_steps=max(1, round(interval / step_seconds)) if step_seconds else 0,
        days=days, copy_days=copy_days, chip_hours=days * 24 * chips, copy_chip_hours=copy_days * 24 * chips,
    )  # fmt: skip


def best_interval(save_seconds, mtbf):
    """tau = M (1 + W0(-exp(-1 - delta / M))), which minimises `slowdown`, by Newton's method on u = tau / M.

    The minimum is where (1 - u) exp(u) = exp(-delta / M). Raises ValueError for times that are not positive.
    """
    if save_seconds <= 0 or mtbf <= 0:
        raise ValueError(f"best_interval: expected positive seconds, got save_seconds={save_seconds} and mtbf={mtbf}.")
    ratio = save_seconds / mtbf
    u = min(math.sqrt(2 * ratio), 0.999)  # Young's interval, the limit of short saves
    for _ in range(50):
        step = ((1 - u) * math.exp(u + ratio) - 1) / (u * math.exp(u + ratio))
        u = min(u + step, (1 + u) / 2) if step > 0 else u + step
        if abs(step) < 1e-14 * u:
            break
    return mtbf * u


def young_interval(save_seconds, mtbf):
    """sqrt(2 delta M) (Young 1974), the limit of short saves."""
    return math.sqrt(2 * save_seconds * mtbf)


def daly_interval(save_seconds, mtbf):
    """Daly's series (2006); M where a save takes twice that long."""
    if save_seconds >= 2 * mtbf:
        return mtbf
    half = save_seconds / (2 * mtbf)
    return young_interval(save_seconds, mtbf) * (1 + math.sqrt(half) / 3 + half / 9) - save_seconds


def slowdown(interval, save_seconds, mtbf, restart_seconds=0.0):
    """Expected seconds per second of new work: M exp(R / M) (exp((tau + delta) / M) - 1) / tau (Daly 2006)."""
    try:
        return mtbf * math.exp(restart_seconds / mtbf) * math.expm1((interval + save_seconds) / mtbf) / interval
    except OverflowError:
        return math.inf


def goodput(interval, save_seconds, mtbf, restart_seconds=0.0):
    """The share of the time that is new work, 1 / `slowdown`."""
    return 1 / slowdown(interval, save_seconds, mtbf, restart_seconds)

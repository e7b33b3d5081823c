"""What a run needs besides chips: tokens, days and money; the time to write a checkpoint, and host memory for it; the input rate."""
import dataclasses

SAVE_BYTES_PER_SECOND = 1e9  # of one host: assumption; uncompressed arrays took 0.7 to 1.4 s per GB here (docs/log.md)
DEVICE_LINK_BYTES_PER_SECOND = 8e9  # of one host, device to host memory, all its chips: assumption


@dataclasses.dataclass(frozen=True)
class Budget:
    """A run's length and price. flops: of the model, all tokens; mfu: the share of the chips' peak that this length means."""

    tokens: float
    flops: float
    chips: int
    seconds: float
    mfu: float
    dollars: float

    @property
    def days(self):
        return self.seconds / 86_400

    @property
    def chip_hours(self):
        return self.chips * self.seconds / 3600


@dataclasses.dataclass(frozen=True)
class Saving:
    """One checkpoint. bytes: of all hosts; blocked_seconds: how long the step stands still; host_bytes: extra host memory, per host."""

    bytes: int
    seconds: float
    blocked_seconds: float
    host_bytes: int


def budget(tokens, flops_per_token, chips, peak_flops, *, mfu=None, seconds=None, dollars_per_chip_hour=0.0):
    """`Budget` of a run over so many tokens, from the MFU that it will reach or from its seconds.

    flops_per_token: of training, three forward passes (6 N without attention); peak_flops: of one chip. Raises ValueError unless exactly
    one of mfu and seconds is given.
    """
    if (mfu is None) == (seconds is None):
        raise ValueError(f"budget: give either mfu or seconds, got mfu={mfu} and seconds={seconds}.")
    flops, peak = tokens * flops_per_token, chips * peak_flops
    seconds = flops / (peak * mfu) if seconds is None else seconds
    mfu = flops / (peak * seconds) if mfu is None else mfu
    return Budget(tokens, flops, chips, seconds, mfu, chips * seconds / 3600 * dollars_per_chip_hour)


def of_plan(plan, peak_flops, dollars_per_chip_hour=0.0):
    """`Budget` of a Plan's whole run, steps x tokens, at the planned step time; None for a plan without times."""
    if not plan.seconds:
        return None
    tokens = plan.tokens * plan.steps
    return budget(
        tokens, plan.model_flops / plan.tokens, plan.chips, peak_flops, seconds=plan.seconds * plan.steps,
        dollars_per_chip_hour=dollars_per_chip_hour,
    )  # fmt: skip


def saving(checkpoint_bytes, hosts, *, asynchronous=True, rate=SAVE_BYTES_PER_SECOND):
    """`Saving` of a checkpoint that the hosts write in equal parts; rate: bytes/s of one host.

    An asynchronous one stops the step while the state is copied to host memory; a synchronous one until it is written, without a copy.
    """
    part = checkpoint_bytes / hosts
    written, copied = part / rate, part / DEVICE_LINK_BYTES_PER_SECOND
    if asynchronous:
        return Saving(checkpoint_bytes, copied + written, copied, int(part))
    return Saving(checkpoint_bytes, written, written, 0)


def input_rate(tokens_per_step, step_seconds, vocab_size):
    """Bytes/s that must come from the token files, all hosts together: two bytes per token, four for more than 65,536 of them."""
    return tokens_per_step * (2 if vocab_size <= 65_536 else 4) / step_seconds if step_seconds else 0.0

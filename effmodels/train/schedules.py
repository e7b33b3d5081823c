"""What changes over a run, as closed forms of the step: learning rate, batch size, sequence length.

Steps count from 0. Nothing here keeps state, so a resumed run continues exactly, also in the middle of a ramp.
"""
import bisect
import dataclasses
import math

import jax.numpy as jnp

from effmodels.config import ConfigError, nearest

SCHEDULES = ("cosine", "linear", "wsd", "constant")
DECAY_SHAPES = ("exponential", "linear", "sqrt")


def make_schedule(optim_config, steps):
    """step -> learning rate (float32 scalar; step may be an int or traced), from config.optim and the number of steps of the run.

    Warm-up: step i of the first `warmup_steps` has lr * (i + 1) / warmup_steps, so no step is wasted on a rate of zero.
    cosine, linear: from lr at step `warmup_steps` to lr * `final_lr_ratio` at step `steps`.
    wsd (warm-up, stable, decay; arXiv:2404.06395): lr until the last `decay_steps` (or `decay_ratio`, default 0.1, of all steps), then
      decay_shape "exponential": ratio^progress, which is 1/2^((s - S) / T) with half-life T; give `decay_half_life` to fix T in steps;
      decay_shape "linear" or "sqrt" (1 - sqrt(progress), arXiv:2405.18392): down to final_lr_ratio.
    constant: lr after the warm-up. Beyond `steps` the last value holds.
    """
    c = optim_config
    name, peak, warmup = c.get("schedule", "cosine"), float(c.get("lr", 3e-4)), int(c.get("warmup_steps", 0) or 0)
    steps = int(steps)
    if name not in SCHEDULES:
        raise ConfigError(f"optim.schedule={name!r} is unknown.{nearest(name, SCHEDULES)}")
    if steps < 1:
        raise ConfigError(f"steps={steps}: a run needs at least one step.")
    if not 0 <= warmup <= steps:
        raise ConfigError(f"optim.warmup_steps={warmup} must lie between 0 and steps={steps}.")
    after = {"cosine": _cosine, "linear": _linear, "wsd": _wsd, "constant": _constant}[name](c, warmup, steps)

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        factor = after(step)
        if warmup:
            factor = jnp.where(step < warmup, (step + 1) / warmup, factor)
        return jnp.asarray(peak * factor, jnp.float32)

    return schedule


def _constant(c, warmup, steps):
    del c, warmup, steps
    return jnp.ones_like


def _cosine(c, warmup, steps):
    final = _final_ratio(c, 0.1)
    return lambda step: final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * _progress(step, warmup, steps)))


def _linear(c, warmup, steps):
    final = _final_ratio(c, 0.0)
    return lambda step: 1 - (1 - final) * _progress(step, warmup, steps)


def _wsd(c, warmup, steps):
    shape, half_life = c.get("decay_shape", "exponential"), c.get("decay_half_life", None)
    if shape not in DECAY_SHAPES:
        raise ConfigError(f"optim.decay_shape={shape!r} is unknown.{nearest(shape, DECAY_SHAPES)}")
    decay = c.get("decay_steps", None)
    decay = int(decay) if decay else max(1, round(float(c.get("decay_ratio", 0.1)) * steps))
    if warmup + decay > steps:
        raise ConfigError(f"wsd: warmup_steps={warmup} + decay_steps={decay} is more than steps={steps}; shorten one of them.")
    final, start = _final_ratio(c, 0.1), steps - decay
    if shape == "exponential":
        if half_life is None and final <= 0:
            raise ConfigError("wsd: an exponential decay never reaches final_lr_ratio=0; give a positive ratio, decay_half_life, "
                             "or decay_shape='linear'.")
        rate = math.log(final) if half_life is None else -math.log(2) * decay / float(half_life)
        return lambda step: jnp.exp(rate * _progress(step, start, steps))
    if shape == "sqrt":
        return lambda step: 1 - (1 - final) * jnp.sqrt(_progress(step, start, steps))
    return lambda step: 1 - (1 - final) * _progress(step, start, steps)


def _progress(step, start, end):
    """0 up to `start`, 1 from `end` on."""
    return jnp.clip((step - start) / max(1, end - start), 0.0, 1.0)


def _final_ratio(c, default):
    ratio = float(c.get("final_lr_ratio", default))
    if not 0 <= ratio <= 1:
        raise ConfigError(f"optim.final_lr_ratio={ratio} must lie between 0 and 1.")
    return ratio


@dataclasses.dataclass(frozen=True)
class Stage:
    """What holds from `from_step` on."""

    from_step: int
    seq_len: int
    index: int


class LengthStages:
    """Sequence length by step: `stages` = ((from_step, seq_len), ...), the first from step 0; () is one stage of `seq_len`."""

    def __init__(self, seq_len, stages=()):
        stages = tuple((int(s), int(n)) for s, n in stages) or ((0, int(seq_len)),)
        _check_starts("train.length_stages", stages)
        if stages[-1][1] != seq_len:
            raise ConfigError(f"train.length_stages ends at length {stages[-1][1]}, but seq_len={seq_len}: the last stage is full length.")
        self.stages = tuple(Stage(s, n, i) for i, (s, n) in enumerate(stages))
        self._starts = [s.from_step for s in self.stages]

    def stage_at(self, step):
        """The Stage in force at `step`."""
        return self.stages[bisect.bisect_right(self._starts, int(step)) - 1]


@dataclasses.dataclass(frozen=True)
class Consumed:
    """What a run has read before a step. `stage_sequences` counts within the length stage in force at that step."""

    sequences: int
    tokens: int
    stage: int
    stage_sequences: int


@dataclasses.dataclass(frozen=True)
class _Piece:
    """A run of steps with one batch size and one length, and the totals before it."""

    start: int
    batch: int
    stage: Stage
    sequences: int
    tokens: int
    stage_sequences: int


class BatchRamp:
    """Batch size by step, as a number of micro-batches of one shape; exact totals in closed form.

    ramp: ((from, batch_size), ...), the first from 0, the last equal to `batch_size`; () is no ramp. `unit` says what `from` counts:
    "steps", or "tokens" (the entry takes force at the first step before which that many tokens have been read).
    """

    def __init__(self, batch_size, *, micro_batch_size=None, seq_len=1, ramp=(), length_stages=(), unit="steps"):
        self.micro = int(micro_batch_size or batch_size)
        entries = tuple((int(s), int(b)) for s, b in ramp) or ((0, int(batch_size)),)
        _check_starts("train.batch_ramp", entries)
        if unit not in ("steps", "tokens"):
            raise ConfigError(f"train.batch_ramp_unit={unit!r} must be 'steps' or 'tokens'.")
        if entries[-1][1] != batch_size:
            raise ConfigError(f"train.batch_ramp ends at batch {entries[-1][1]}, but batch_size={batch_size}: it must end at the full one.")
        for _, size in entries:
            self._check_multiple(size)
        self.lengths = length_stages if isinstance(length_stages, LengthStages) else LengthStages(seq_len, length_stages)
        self._pieces = self._make_pieces(entries, unit)
        self._starts = [p.start for p in self._pieces]

    def batch_size_at(self, step):
        """Sequences of the global batch of `step`."""
        return self._piece(step).batch

    def micro_batches_at(self, step):
        """Micro-batches that are accumulated at `step`."""
        return self._piece(step).batch // self.micro

    def seq_len_at(self, step):
        """Sequence length at `step`."""
        return self._piece(step).stage.seq_len

    def consumed(self, step):
        """Everything read before `step` (so `consumed(steps)` is the whole run)."""
        p = self._piece(step)
        sequences = (int(step) - p.start) * p.batch
        return Consumed(p.sequences + sequences, p.tokens + sequences * p.stage.seq_len, p.stage.index, p.stage_sequences + sequences)

    def changes(self, steps):
        """[(step, batch_size, seq_len)] at step 0 and wherever one of them changes before `steps`: what has to be compiled."""
        return [(p.start, p.batch, p.stage.seq_len) for p in self._pieces if p.start < steps]

    def _piece(self, step):
        if step < 0:
            raise ValueError(f"step={step}: steps count from 0.")
        return self._pieces[bisect.bisect_right(self._starts, int(step)) - 1]

    def _check_multiple(self, size):
        if size < 1 or size % self.micro:
            low, high = size // self.micro * self.micro, -(-size // self.micro) * self.micro
            near = " or ".join(str(n) for n in (low, high) if n > 0)
            raise ConfigError(f"batch size {size} is not a multiple of the micro batch of {self.micro} sequences; nearest: {near}.")

    def _make_pieces(self, entries, unit):
        """Walks from change to change; every piece knows the totals before it."""
        stages, pieces, e = self.lengths.stages, [], 0
        piece = _Piece(0, entries[0][1], stages[0], 0, 0, 0)
        while True:
            ends = [stages[piece.stage.index + 1].from_step] if piece.stage.index + 1 < len(stages) else []
            if e + 1 < len(entries):
                at = entries[e + 1][0]
                if unit == "tokens":
                    at = piece.start + max(0, -(-(at - piece.tokens) // (piece.batch * piece.stage.seq_len)))
                ends.append(at)
            if not pieces or pieces[-1].start < piece.start:
                pieces.append(piece)
            else:
                pieces[-1] = piece  # a piece of no steps: two entries take force at once
            if not ends:
                return tuple(pieces)
            end = min(ends)
            if e + 1 < len(entries) and at == end:
                e += 1
            stage = self.lengths.stage_at(end)
            n = (end - piece.start) * piece.batch
            in_stage = piece.stage_sequences + n if stage == piece.stage else 0
            piece = _Piece(end, entries[e][1], stage, piece.sequences + n, piece.tokens + n * piece.stage.seq_len, in_stage)


def _check_starts(name, entries):
    starts = [s for s, _ in entries]
    if starts[0] != 0:
        raise ConfigError(f"{name} must begin at 0, not at {starts[0]}.")
    if any(b <= a for a, b in zip(starts, starts[1:])):
        raise ConfigError(f"{name} must have rising starts, not {starts}.")
    if any(v < 1 for _, v in entries):
        raise ConfigError(f"{name} has a value below 1: {entries}.")

"""What a run tells: a console line a person can read, metrics.jsonl, TensorBoard if it is installed; rates count finished steps only."""
import json
import math
import time

import jax
from etils import epath

# Dense bfloat16 peak, FLOP/s per JAX device; part of a lower-cased device_kind -> peak. The first match counts.
PEAK_FLOPS = {
    "v6 lite": 918e12, "v6e": 918e12, "v5 lite": 197e12, "v5e": 197e12, "v5p": 459e12, "tpu v5": 459e12, "tpu v4": 275e12,
    "h100": 989e12, "h200": 989e12, "a100": 312e12,
}  # fmt: skip


def peak_flops(device_kind):
    """bfloat16 peak of one device in FLOP/s, or None where it is not known (CPU): FLOP/s are shown instead of MFU."""
    kind = device_kind.lower()
    return next((peak for part, peak in PEAK_FLOPS.items() if part in kind), None)


MOE_SHOWN = (("moe_max_violation", "MaxVio"), ("moe_drop_fraction", "dropped"))  # the worst layer's value on the console


class Throughput:
    """Rates over finished steps: the caller adds a step once its results are on the host; pause() .. resume() takes out saves.

    The clock starts at construction (or at start()), so the first rate includes the first step and nothing that ran before it. Each report
    covers the steps since the last one; the ETA uses the steps of the last reports together, the first one left out when there are others
    (it may contain a warm-up).
    """

    def __init__(self, clock=time.perf_counter):
        self._clock = clock
        self.start()

    def start(self):
        """Starts over, now."""
        self._mark, self._paused_at = self._clock(), None
        self._tokens = self._steps = 0
        self._history = []

    def add(self, *, tokens):
        """One finished step of this many tokens."""
        self._tokens += tokens
        self._steps += 1

    def pause(self):
        """Time from here to resume() does not count."""
        if self._paused_at is None:
            self._paused_at = self._clock()

    def resume(self):
        """The clock goes on."""
        if self._paused_at is not None:
            self._mark += self._clock() - self._paused_at
            self._paused_at = None

    def report(self, flops_per_token=None, peak=None, devices=1, steps_left=None, tokens_per_step=None):
        """{"tokens_per_s", "step_s", "flops_per_s" of all devices, "mfu" where the peak is known, "eta_s"} since the last report.

        {} if no step has finished since. tokens_per_step: of the steps that are left; they may be larger than those done.
        """
        now = self._paused_at if self._paused_at is not None else self._clock()
        seconds, steps, tokens = now - self._mark, self._steps, self._tokens
        if not steps or seconds <= 0:
            return {}
        self._mark, self._tokens, self._steps = now, 0, 0
        self._history = [*self._history, (tokens, seconds)][-6:]
        record = {"tokens_per_s": tokens / seconds, "step_s": seconds / steps}
        if flops_per_token:
            record["flops_per_s"] = flops_per_token * tokens / seconds
            if peak:
                record["mfu"] = record["flops_per_s"] / (peak * devices)
        if steps_left is not None:
            recent = self._history[1:] if 1 < len(self._history) < 6 else self._history
            rate = sum(t for t, _ in recent) / sum(s for _, s in recent)
            record["eta_s"] = steps_left * (tokens_per_step or tokens / steps) / rate
        return record


class Metrics:
    """Writes records of steps. In a multi-process run only process 0 writes.

    metrics.jsonl has one JSON object per record, flushed at once; numbers that are not finite are strings there. On resume, records after
    `resume_step` are dropped (those steps run again), and TensorBoard is told to do the same. tensorboard: "auto" (if installed, else a
    line says how to get it), True (an error if it is not installed) or False.
    """

    def __init__(self, workdir, tensorboard="auto", *, total_steps=None, resume_step=0, log=print):
        self._dir, self._total, self._log = epath.Path(workdir), total_steps, log
        self._active = jax.process_index() == 0
        self._file = self._events = None
        if not self._active:
            return
        self._dir.mkdir(parents=True, exist_ok=True)
        self._path = self._dir / "metrics.jsonl"
        self._records = _keep_until(self._path, resume_step)
        # A bucket has no append: there the whole (small) file is written again, now and then.
        self._remote = "://" in str(self._path)
        if not self._remote:
            self._file = open(self._path, "a", encoding="utf-8")
        self._flushed = time.monotonic()
        self._events = _event_writer(self._dir / "tensorboard", tensorboard, resume_step, log)

    def write(self, step, record, *, console=True):
        """Records numbers, strings and lists of numbers (one per layer) of `step`, the number of finished steps."""
        if not self._active:
            return
        plain = {k: _plain(v) for k, v in record.items()}
        line = json.dumps({"step": int(step), **{k: _json(v) for k, v in plain.items()}})
        if self._remote:
            self._records.append(line)
            if time.monotonic() - self._flushed > 30:
                self._flush_remote()
        else:
            self._file.write(line + "\n")
            self._file.flush()
        if self._events is not None:
            self._events.write(int(step), plain)
        if console:
            self._log(format_line(step, plain, self._total))

    def close(self):
        """Flushes and closes every file."""
        if not self._active:
            return
        if self._remote:
            self._flush_remote()
        elif self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()
        self._active = False

    def _flush_remote(self):
        self._path.write_text("".join(line + "\n" for line in self._records))
        self._flushed = time.monotonic()


def format_line(step, record, total=None):
    """One console line: what a person wants first, absent parts left out.

    >>> format_line(20, {"loss": 3.25, "lr": 1e-3, "grad_norm": 0.5, "tokens_per_s": 1234.5, "mfu": 0.41, "eta_s": 75}, 100)
    'step  20/100 | loss 3.2500 | lr 1.00e-03 | grad 0.50 | 1,234 tok/s | MFU 41.0% | ETA 1m15s'
    """
    width = len(str(total)) if total else 0
    parts = [f"step {step:>{width}}/{total}" if total else f"step {step}"]
    shapes = (("loss", "loss {:.4f}"), ("bits_per_byte", "{:.3f} bits/byte"), ("eval_loss", "eval {:.4f}"), ("lr", "lr {:.2e}"),
              ("grad_norm", "grad {:.2f}"), ("tokens_per_s", "{:,.0f} tok/s"))
    parts += [text.format(record[key]) for key, text in shapes if isinstance(record.get(key), (int, float))]
    if "mfu" in record:
        parts.append(f"MFU {record['mfu']:.1%}")
    elif "flops_per_s" in record:
        parts.append(f"{si(record['flops_per_s'])}FLOP/s")
    moe = [f"{label} {max(_list(record[key])):.2f}" for key, label in MOE_SHOWN if _list(record.get(key, []))]
    if moe:
        parts.append("MoE " + ", ".join(moe))
    if "eta_s" in record:
        parts.append(f"ETA {duration(record['eta_s'])}")
    return " | ".join(parts)


def si(value):
    """'12.3 G' for 1.23e10: three digits and the prefix, to be followed by a unit."""
    for prefix, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {prefix}"
    return f"{value:.3g} "


def duration(seconds):
    """'2h05m', '1m15s' or '8s'."""
    seconds = int(round(seconds))
    if seconds >= 86400:
        return f"{seconds // 86400}d{seconds % 86400 // 3600:02d}h"
    if seconds >= 3600:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 60}m{seconds % 60:02d}s" if seconds >= 60 else f"{seconds}s"


def read(workdir):
    """The records of a run's metrics.jsonl as dicts, in order; a torn last line (a killed process) is left out."""
    path = epath.Path(workdir) / "metrics.jsonl"
    return [record for _, record in _parse(path)] if path.exists() else []


def _keep_until(path, step):
    """Drops records after `step` from the file (atomically) and returns the lines that stay."""
    if not path.exists():
        return []
    kept = [line for line, record in _parse(path) if record["step"] <= step]
    text = "".join(line + "\n" for line in kept)
    if text != path.read_text():
        temporary = path.with_name(path.name + ".new")
        temporary.write_text(text)
        temporary.replace(path)
    return kept


def _parse(path):
    found = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # torn by a kill in mid-write
        if isinstance(record, dict) and "step" in record:
            found.append((line, record))
    return found


def _plain(value):
    """Arrays and array scalars to Python numbers and lists."""
    return value.tolist() if hasattr(value, "tolist") else value


def _json(value):
    """JSON has no NaN: numbers that are not finite become strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return [_json(v) for v in value] if isinstance(value, (list, tuple)) else value


def _list(value):
    return value if isinstance(value, (list, tuple)) else [value]


def _event_writer(directory, wanted, resume_step, log):
    """A TensorBoard writer, or None; raises ImportError with the command when one was demanded."""
    if wanted not in ("auto", True, False):
        raise ValueError(f"log.tensorboard={wanted!r} must be 'auto', True or False.")
    if not wanted:
        return None
    try:
        return _Events(directory, resume_step)
    except ImportError as error:
        hint = "TensorBoard files are not written: pip install tensorboard (metrics.jsonl has everything)"
        if wanted is True:
            raise ImportError(f"log.tensorboard=True, but tensorboard is not installed. {hint}.") from error
        log(hint)
        return None


class _Events:
    """Classic scalars through tensorboard's own file writer; no TensorFlow."""

    def __init__(self, directory, resume_step):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = event_pb2, summary_pb2
        self._writer = EventFileWriter(str(directory))
        if resume_step:
            # TensorBoard drops what other files say about steps from here on.
            session = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._writer.add_event(event_pb2.Event(wall_time=time.time(), step=int(resume_step) + 1, session_log=session))

    def write(self, step, record):
        values = []
        for key, value in record.items():
            numbers = {f"{key}/{i:02d}": v for i, v in enumerate(value)} if isinstance(value, (list, tuple)) else {key: value}
            values += [self._summary.Summary.Value(tag=k, simple_value=float(v)) for k, v in numbers.items()
                       if isinstance(v, (int, float)) and not isinstance(v, bool)]
        self._writer.add_event(self._event.Event(wall_time=time.time(), step=step, summary=self._summary.Summary(value=values)))
        self._writer.flush()

    def close(self):
        self._writer.close()

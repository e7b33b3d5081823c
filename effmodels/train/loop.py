"""The one training loop: steps, progress, evaluation, checkpoints, and a clean stop on SIGTERM or non-finite numbers."""
import json
import math
import platform
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
from etils import epath

from effmodels import data, decode
from effmodels.config import ConfigError
from effmodels.models import state as model_state
from effmodels.train import budget, sources
from effmodels.train.metrics import Metrics, Throughput
from effmodels.train.restore import RUN_FILE, TOKENIZER_FILE
from effmodels.train.run_config import TENSORBOARD, jsonable
from effmodels.train.setup import Setup
from effmodels.train.step import nonfinite_leaves

SAMPLE_BELOW_BYTES = 8e9  # larger models are sampled by experiments.generate, not on one device at the end of training


class NonFiniteError(RuntimeError):
    """A loss or gradient that is not a number: the run stops and keeps its last good checkpoint."""


def train(config, workdir, *, eval_only=False, devices=None, log=print):
    """Runs a config in a workdir, resuming what is there; returns {"step", "loss", "eval_loss", "bits_per_byte", ...}.

    devices: default all; a notebook or test may give fewer.

    Raises ConfigError before data or devices are touched, NonFiniteError when the numbers break down.
    """
    run = Run(config, epath.Path(workdir), log, devices)
    return run.evaluate_only() if eval_only else run.train()


class Run:
    """One run in one workdir."""

    def __init__(self, config, workdir, log, devices=None, start=True):
        self.started = time.perf_counter()
        self.workdir, self.stopping, self.profiling = workdir, False, False
        self.log = log if jax.process_index() == 0 else (lambda *_: None)
        self.setup = Setup(config, self.log, devices)
        self.config = self.setup.config
        self._claim_workdir(config)
        self._print_plan()
        if start:
            self.start()

    def start(self):
        """Compiles, prepares the data, opens the checkpoints; says what memory the run will take."""
        from effmodels.train.checkpoint import Checkpointer  # imports Orbax, 1 s, while nothing else waits for it

        self.setup.start()
        if jax.process_index() == 0:
            tokenizer = self.setup.data(self.config.seq_len).tokenizer
            (self.workdir / TOKENIZER_FILE).write_text(json.dumps(tokenizer.to_dict()))
        mode = self._save_mode()
        self.log(self.setup.memory_budget(self.setup.ramp.seq_len_at(0), mode == "async").text())
        c = self.config.checkpoint
        self.checkpoints = Checkpointer(self.workdir / "checkpoints", keep=c.keep, keep_best=c.keep_best, mode=mode, log=self.log)

    def train(self):
        """Steps until config.steps, a signal, or numbers that break down."""
        state, start = self._restore_or_init()
        # Several processes agree through jax's own watch for the signal, at a step that all of them reach.
        previous = signal.signal(signal.SIGTERM, self._on_signal) if _main_thread() and jax.process_count() == 1 else None
        try:
            with self.setup.context():
                state, result = self._steps(state, start)
                if self.config.eval.at_end and not self.stopping and not result:
                    result = self._evaluate(state, int(state.step))
            result = self._finish(state, result)  # outside the mesh: a sample of one row cannot be split
        finally:
            if previous is not None:
                signal.signal(signal.SIGTERM, previous)
            self.checkpoints.close()
        return result

    def evaluate_only(self):
        """Evaluates the newest checkpoint."""
        if self.checkpoints.latest() is None:
            raise ConfigError(f"--eval_only: there is no checkpoint in {self.workdir}; train first, or give the --workdir of a run.")
        state, step = self._restore_or_init()
        with self.setup.context():
            result = self._evaluate(state, step)
        self.checkpoints.close()
        return result

    def _steps(self, state, start):
        c = self.config
        records = Metrics(self.workdir, tensorboard=TENSORBOARD[c.log.tensorboard], total_steps=c.steps, resume_step=start, log=self.log)
        rate = Throughput()
        pending, result, saved = None, {}, start
        self._announce_step()
        for step in range(start, c.steps):
            self._profile(step)
            iterator = self._iterator(step)
            outcome = self._one_step(state, step, iterator)
            if outcome is None:  # a signal between micro-batches: the step is dropped and repeated on resume
                self.log(f"stopping inside step {step}: its micro-batches are repeated on resume")
                break
            state, metrics = outcome
            self._agree_on_stopping(step)
            self.position = iterator.state()
            # One step late: the device already works on the next step while the host reads this one's numbers.
            pending = self._read(pending, records, rate)
            pending = (step, metrics)
            last = step + 1 == c.steps or self.stopping
            due_eval = (step + 1) % c.eval.every_steps == 0 or (last and c.eval.at_end and not self.stopping)
            if due_eval or last or (step + 1) % c.checkpoint.every_steps == 0:
                pending = self._read(pending, records, rate)
                rate.pause()
                if due_eval:
                    result = self._evaluate(state, step + 1, records)
                self._save(state, step + 1, result)
                saved = step + 1
                rate.resume()
            if self.stopping:
                break
        self._read(pending, records, rate)
        self._profile(None)
        if self.stopping and saved != int(state.step):
            self._save(state, int(state.step), result)
        self.checkpoints.wait()
        records.close()
        return state, result

    def _one_step(self, state, step, iterator):
        """(state, metrics) of one step, or None when a signal came between micro-batches."""
        setup = self.setup
        programs, count = setup.programs(setup.ramp.seq_len_at(step)), setup.ramp.micro_batches_at(step)
        if programs.train_step is not None:
            batches = [next(iterator) for _ in range(count)]
            return programs.train_step(state, setup.put(batches))
        sums, begun = programs.zero_sums(), time.perf_counter()
        for micro in range(count):
            if self.stopping:
                return None
            batch = setup.put(next(iterator))
            sums = programs.micro_step(state.params, state.buffers, sums, batch, np.int32(step), np.int32(micro))
            self._micro_progress(step, micro, count, sums, begun)
        return programs.apply_step(state, sums, np.int32(count))

    def _agree_on_stopping(self, step):
        if jax.process_count() > 1 and not self.stopping:
            from jax.experimental import multihost_utils

            self.stopping = multihost_utils.reached_preemption_sync_point(step)
            if self.stopping:
                self.log(f"SIGTERM: all {jax.process_count()} processes save and stop after step {step}")

    def _micro_progress(self, step, micro, count, sums, begun):
        jax.block_until_ready(sums.weight_sum)
        seconds = time.perf_counter() - begun
        if seconds > 2.0:  # quick micro-batches need no line of their own
            loss = float(sums.ce_sum) / max(float(sums.weight_sum), 1e-9)
            tokens = (micro + 1) * self.setup.micro_batch * self.setup.ramp.seq_len_at(step)
            eta = budget.duration(seconds / (micro + 1) * (count - micro - 1))
            rate = f"{tokens / seconds:,.0f} tokens/s"
            self.log(f"  step {step} micro-batch {micro + 1}/{count}: loss {loss:.4f}, {rate}, step done in {eta}")

    def _read(self, pending, records, rate):
        """Waits for a step's numbers, checks and records them; returns None."""
        if pending is None:
            return None
        step, metrics = pending
        values = {k: np.asarray(v) for k, v in metrics.items() if k != "squares"}
        setup, c = self.setup, self.config
        sequences, seq_len = setup.ramp.batch_size_at(step), setup.ramp.seq_len_at(step)
        rate.add(tokens=sequences * seq_len)
        # A choice that found no room may be of a token without loss: the numbers alone would not always tell.
        if np.any(values.get("moe_overflow", 0) > 0) or not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            self._stop_non_finite(step, values, metrics["squares"])
        first = step == self.first_step
        if first:
            self.log(f"first step finished {time.perf_counter() - self.started:.1f} s after launch")
        if first or (step + 1) % c.log.every_steps == 0 or step + 1 == c.steps:
            record = {k: v.tolist() for k, v in values.items()}
            record |= {"tokens": setup.ramp.consumed(step + 1).tokens, "sequences": sequences, "seq_len": seq_len}
            record |= rate.report(setup.cost.train_flops_per_token, setup.peak, len(setup.devices), c.steps - step - 1, sequences * seq_len)
            records.write(step + 1, record)
        return None

    def _stop_non_finite(self, step, values, squares):
        names = nonfinite_leaves({p: np.asarray(v) for p, v in squares.items()}, self.setup.names)
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        saved, lost = self.checkpoints.latest(), int(np.sum(values.get("moe_overflow", 0)))
        cure = "Lower optim.lr, raise optim.warmup_steps or set optim.clip, then run the same command."
        if lost:
            bound = self.config.parallel.recv_bound
            cure = (
                f"{lost:,} choices of experts found no room in the exchange (parallel.recv_bound={bound}): raise it, or set it to None for "
                "the worst case."
            )
        raise NonFiniteError(
            f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}. Gradients that are not finite: {shown or 'none'}. "
            f"Nothing was saved after it; last good checkpoint: {'none' if saved is None else f'step {saved}'}. "
            f"{cure}"
        )

    def _evaluate(self, state, step, records=None):
        setup, c = self.setup, self.config
        seq_len = setup.lengths.stages[-1].seq_len
        prepared, program = setup.data(seq_len), setup.programs(seq_len).eval_step
        iterator = data.batches(prepared, batch_size=setup.micro_batch, seed=0, split="validation", repeat=False,
                                rows=setup.local_rows)
        ce, weight, size = 0.0, 0.0, 0.0
        for _, batch in zip(range(c.eval.batches), iterator):
            ce_sum, weight_sum = program(state.params, state.buffers, setup.put(batch))
            ce, weight = ce + float(ce_sum), weight + float(weight_sum)
            size += _sum_over_processes(batch["target_bytes"][setup.owned])
        result = {"step": step, "eval_loss": ce / max(weight, 1.0), "bits_per_byte": ce / math.log(2) / max(size, 1.0)}
        if not math.isfinite(result["eval_loss"]):
            raise NonFiniteError(f"step {step}: the evaluation loss is {result['eval_loss']}; nothing was saved after it.")
        bits = f"{result['bits_per_byte']:.3f} bits per byte"
        self.log(f"evaluation at step {step}: loss {result['eval_loss']:.4f}, {bits} ({weight:,.0f} tokens)")
        if records is not None:
            records.write(step, {k: v for k, v in result.items() if k != "step"}, console=False)
        return result

    def _iterator(self, step):
        """The batches of this step's length stage; a new stage starts at its first window."""
        stage = self.setup.lengths.stage_at(step)
        if self.iterator_stage != stage.index:
            prepared = self.setup.data(stage.seq_len)
            self.iterator = data.batches(prepared, batch_size=self.setup.micro_batch, seed=self.config.seed,
                                         rows=self.setup.local_rows)
            self.iterator_stage = stage.index
        return self.iterator

    def _restore_or_init(self):
        setup = self.setup
        self.iterator_stage, self.position = None, None
        if self.checkpoints.latest() is None:
            self.first_step = 0
            begun = time.perf_counter()
            source = self.config.start_from
            if source:
                from effmodels.train import start_from  # imports interop, which few runs need

                state = setup.state_of(*start_from.weights(source, setup))
            else:
                state = setup.init_state()
            jax.block_until_ready(state.step)
            what = f"parameters read from {source}" if source else f"parameters drawn (seed {self.config.seed})"
            self.log(f"new run: {what} in {time.perf_counter() - begun:.1f} s")
            return state, 0
        state, host, step = self.checkpoints.restore(setup.restorable_state(), manifest=setup.names)
        self.first_step = step
        if step < self.config.steps and host["stage"] == setup.lengths.stage_at(step).index:
            self._iterator(step).restore(host["data"])
        self.position = host["data"]
        self.log(f"resumed step {step} of {self.config.steps} from {self.workdir} ({host['tokens']:,} tokens seen)")
        return state, step

    def _save(self, state, step, result):
        host = {
            "data": self.position, "stage": self.setup.lengths.stage_at(step - 1).index, "tokens": self.setup.ramp.consumed(step).tokens,
            "config": self.config.identity(), "versions": versions(), "prng": "threefry2x32", "seed": self.config.seed,
        }  # fmt: skip
        begun = time.perf_counter()
        metrics = {"loss": result["eval_loss"]} if result.get("step") == step else None
        self.checkpoints.save(step, state, manifest=self.setup.names, host=host, metrics=metrics)
        self.log(f"checkpoint at step {step} ({time.perf_counter() - begun:.1f} s of waiting)")

    def _claim_workdir(self, config):
        """Writes run.json, or checks that the one there is of the same run."""
        path, identity = self.workdir / RUN_FILE, self.config.identity()
        refusal = None
        if jax.process_index() == 0 and path.exists():
            differences = _differences(json.loads(path.read_text())["identity"], identity)
            if differences:
                refusal = (
                    f"{self.workdir} holds a run with another config: {'; '.join(differences[:5])}. "
                    "Give another --workdir, or the config of that run."
                )
        if _of_process_0(refusal is not None):
            raise ConfigError(refusal or f"process 0 refuses {self.workdir}; its message says why.")
        if jax.process_index() == 0:
            self.workdir.mkdir(parents=True, exist_ok=True)
            record = {"identity": identity, "config": jsonable(config), "versions": versions(), "command": sys.argv}
            path.write_text(json.dumps(record, indent=1, default=str))

    def _print_plan(self):
        setup, c = self.setup, self.config
        used = {a: n for a, n in setup.sizes.items() if n > 1} or "one device"
        self.log(
            f"{len(setup.devices)} x {setup.devices[0].device_kind}, mesh {used}; jax {jax.__version__}\n"
            f"model: {setup.cost.params:,} parameters, {setup.cost.active_params:,} active, "
            f"{setup.cost.train_flops_per_token / 1e6:,.1f} MFLOP per token to train\n{setup.optimizer_text}\n"
            f"step: {c.batch_size} sequences of {c.seq_len} = {c.batch_size * c.seq_len:,} tokens in "
            f"{c.batch_size // setup.micro_batch} micro-batches ({setup.accumulation})"
        )
        for line in setup.spread():
            self.log(line)

    def _announce_step(self):
        c, seconds = self.config, self.setup.estimated_step_seconds()
        flops = budget.step_flops(c.model, c.seq_len, c.batch_size, c.train.remat)[0]
        self.log(
            f"a step is {flops / 1e12:.3g} TFLOP: about {budget.duration(seconds)} at an assumed {budget.ASSUMED_SHARE:.0%} of peak; "
            f"{c.steps} steps about {budget.duration(seconds * c.steps)}"
        )

    def _save_mode(self):
        """auto: asynchronous where host memory (on a CPU: memory at all) holds a second copy of the state."""
        mode = self.config.checkpoint.mode
        if mode != "auto":
            return mode
        copy = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(self.setup.abstract_state))
        return "async" if copy < 2e9 or self.setup.platform != "cpu" else "sync"

    def _profile(self, step):
        steps = self.config.log.profile_steps
        if steps and step == steps[0]:
            jax.profiler.start_trace(str(self.workdir / "profile"))
            self.profiling = True
        if self.profiling and (step is None or step > steps[1]):  # None: the run is over
            jax.profiler.stop_trace()
            self.profiling = False
            self.log(f"profile of steps {steps[0]} to {steps[1]} in {self.workdir / 'profile'}")

    def _finish(self, state, result):
        c, step = self.config, int(state.step)
        if self.stopping:
            self.log(f"stopped by a signal at step {step}; the same command resumes")
            return {**result, "step": step, "stopped": True}
        prepared = self.setup.data(self.setup.lengths.stages[-1].seq_len)
        if result:
            base = data.baselines(prepared)
            self.log(
                f"held-out text: {result['bits_per_byte']:.3f} bits per byte; unigram {base['unigram_bits_per_byte']:.3f}, "
                f"gzip -9 {base['gzip_bits_per_byte']:.3f}"
            )
            result |= base
        if c.eval.sample_tokens and jax.process_count() == 1 and self.setup.cost.param_bytes < SAMPLE_BELOW_BYTES:
            self.log(f"sample:\n{self._sample(state, prepared.tokenizer)}")
        self.log(
            f"done: step {step}. checkpoints {self.workdir / 'checkpoints'}, metrics {self.workdir / 'metrics.jsonl'}, "
            f"config {self.workdir / RUN_FILE}\n"
            f"generate: python -m experiments.generate --workdir={self.workdir} --prompt={c.eval.sample_prompt!r}"
        )
        return {**result, "step": step, "stopped": False}

    def _sample(self, state, tokenizer):
        c = self.config.eval
        params, buffers = jax.device_put((state.params, state.buffers), self.setup.devices[0])
        model = model_state.merge(model_state.split(self.setup.model)[0], params, buffers)
        prompt, memory = tokenizer.encode(c.sample_prompt), None
        if self.setup.sources:  # the first image that is held out
            prompt, memory = sources.first_image(model, self.setup.data(self.setup.lengths.stages[-1].seq_len), prompt)
        tokens = decode.generate(
            model, np.asarray(prompt, np.int32)[None], c.sample_tokens, temperature=0.7, top_k=40, key=jax.random.key(self.config.seed),
            eos_id=tokenizer.eos_id, memory=memory,
        )  # fmt: skip
        return tokenizer.decode(np.asarray(tokens)[0].tolist())

    def _on_signal(self, *_):
        self.stopping = True
        self.log("SIGTERM: saving and stopping at the end of this micro-batch")


def versions():
    """What a result depends on besides the config: Python, libraries, commit."""
    import flax
    import optax
    import orbax.checkpoint

    commit = ""
    if shutil.which("git"):
        here = epath.Path(__file__).parent
        found = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True)
        commit = found.stdout.strip()
    libraries = {m.__name__: m.__version__ for m in (jax, flax, optax, orbax.checkpoint)}
    return {"python": platform.python_version(), **libraries, "commit": commit}


def _differences(old, new, path=""):
    if isinstance(old, dict) and isinstance(new, dict):
        return [d for k in {**old, **new} for d in _differences(old.get(k), new.get(k), f"{path}.{k}" if path else k)]
    return [] if old == new else [f"{path} {old!r} there, {new!r} here"]


def _sum_over_processes(values):
    total = float(np.sum(values))
    if jax.process_count() == 1:
        return total
    from jax.experimental import multihost_utils

    return float(np.sum(multihost_utils.process_allgather(np.float64(total))))


def _of_process_0(flag):
    """What process 0 says, on every process."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(np.int32(flag)))


def _main_thread():
    import threading

    return threading.current_thread() is threading.main_thread()

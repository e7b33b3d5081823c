"""Everything a run is made of, before its first step: model, mesh, shardings, optimiser, data and compiled programs.

The order matters for the time to the first step: the compiler works in a thread while the data is prepared.
"""
import concurrent.futures
import contextlib
import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from effmodels import data
from effmodels.channel.moe import capacity
from effmodels.config import ConfigError
from effmodels.models import Decoder, cost
from effmodels.models import state as model_state
from effmodels.models.resolve import resolve
from effmodels.parallel import axes, distributed, layouts, pipeline
from effmodels.parallel import mesh as meshes
from effmodels.parallel.expert import room
from effmodels.train import budget, metrics, optim, placement, schedules, sources, step
from effmodels.train.run_config import RunConfig

DEVICE_KEYS = ("tokens", "targets", "weights", "segment_ids", "positions")
LOOP_ABOVE_SECONDS = 30.0
SEQUENTIAL_ABOVE = 2**26  # bytes


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled programs of one sequence length; either train_step or the other three."""

    train_step: Any = None
    micro_step: Any = None
    apply_step: Any = None
    zero_sums: Any = None
    eval_step: Any = None


class Setup:
    """A checked run: `start` compiles and prepares the data; nothing is allocated on a device before."""

    def __init__(self, config, log, devices=None):
        self.log, self.devices = log, list(jax.devices() if devices is None else devices)
        self.platform = self.devices[0].platform
        self.config = c = RunConfig.from_mapping(config, self.platform)
        distributed.check_joined()
        self.sizes = c.mesh_sizes(len(self.devices))
        self.rules = axes.make_rules(c.rules)
        self.mesh = meshes.make_mesh(self.sizes, self.devices)
        self.pieces = axes.shards("seq", mesh=self.mesh, rules=self.rules)  # of a row
        self.sources = sources.arrays(c.model)
        self.lengths = schedules.LengthStages(c.seq_len, c.train.length_stages)
        self.options = placement.resolve_options(c, [stage.seq_len for stage in self.lengths.stages], self.pieces)
        self.model = nnx.eval_shape(functools.partial(_build, c.model), jax.random.key(0, impl="threefry2x32"))
        _, self.abstract_params, self.abstract_buffers = model_state.split(self.model)
        self.infos, self.names = model_state.info(self.model), model_state.manifest(self.model)
        self.stages = axes.shards("stage", mesh=self.mesh, rules=self.rules)
        if self.stages > 1:
            pipeline.choose([(s.start, s.period, s.repeats) for s in self.model.segments], self.stages, self.options.rounds)
        self.cost = cost(c.model, c.seq_len)
        self.micro_batch = c.train.micro_batch_size or placement.auto_micro_batch(
            c, self.sizes, self.rules, self.platform, self.cost.params
        )
        self.local_rows, self.owned = self._rows_of_this_process()
        self.ramp = schedules.BatchRamp(
            c.batch_size, micro_batch_size=self.micro_batch, ramp=c.train.batch_ramp, length_stages=self.lengths,
            unit=c.train.batch_ramp_unit,
        )  # fmt: skip
        shapes = {p: a.shape for p, a in self.abstract_params.items()}
        param_infos = {p: self.infos[p] for p in shapes}
        width = None if c.model.mup_base_width is None else c.model.d_model / c.model.mup_base_width
        self.schedule = schedules.make_schedule(c.optim, c.steps)
        # XLA:CPU keeps every elementwise temporary of a large array; one layer at a time it keeps few.
        sequential = SEQUENTIAL_ABOVE if self.platform == "cpu" and self.stages == 1 else None
        self.optimizer = optim.make_optimizer(
            c.optim, param_infos, shapes, c.steps, mup_width_multiplier=width, sequential_above=sequential
        )  # fmt: skip
        self.optimizer_text = optim.describe(c.optim, param_infos, shapes, mup_width_multiplier=width)[0]
        self.abstract_state = jax.eval_shape(self._init, jax.random.key(0, impl="threefry2x32"))
        self.shardings = placement.state_shardings(self.abstract_state, self.infos, self.mesh, self.rules, self.options.zero1)
        self.peak = metrics.peak_flops(self.devices[0].device_kind)
        self.accumulation = self._choose_accumulation()
        self.functions = step.make_step(self.model, self.optimizer, self.schedule, c.seed, c.train.accumulate_dtype, sequential)
        self.compiler, self.compiling, self.prepared = concurrent.futures.ThreadPoolExecutor(1), {}, {}

    def start(self):
        """Compiles the first stage's programs while all data is prepared; those of later stages follow in the background.

        Raises ConfigError when the vocabulary does not fit.
        """
        data.import_libraries()
        for stage in self.lengths.stages:
            self._submit(stage.seq_len)
        for stage in self.lengths.stages:
            self.data(stage.seq_len)
        self.programs(self.lengths.stages[0].seq_len)

    def programs(self, seq_len):
        """The compiled `Programs` of a sequence length; waits for the compiler if it is not done."""
        self._submit(seq_len)
        return self.compiling[seq_len].result()

    def data(self, seq_len):
        """The prepared data of a sequence length; ConfigError when the vocabulary is larger than the model's."""
        if seq_len not in self.prepared:
            images = sources.image_spec(self.config.model)
            prepared = data.prepare(self.config.data, seq_len, images=images, log=self.log)
            needed = prepared.tokenizer.vocab_size + (images is not None)  # an image has an id of its own
            if needed > self.config.model.vocab_size:
                raise ConfigError(
                    f"model.vocab_size={self.config.model.vocab_size} is smaller than the tokenizer's {needed} "
                    f"({self.config.data.get('tokenizer', 'bytes')}); set model.vocab_size to at least that."
                )
            self.prepared[seq_len] = prepared
        return self.prepared[seq_len]

    def init_state(self):
        """A fresh TrainState, made on the devices where it lives."""
        key = jax.random.key(self.config.seed, impl="threefry2x32")
        with self.context():
            return jax.jit(self._init, out_shardings=self.shardings)(key)

    def state_of(self, params, buffers):
        """A TrainState of step 0 with these arrays by path, of any floating dtype; they are given up."""

        def fresh(params, buffers):
            params, buffers = (
                {p: a.astype(like[p].dtype) for p, a in arrays.items()}
                for arrays, like in ((params, self.abstract_params), (buffers, self.abstract_buffers))
            )
            return step.state_of(params, buffers, self.optimizer)

        with self.context():
            return jax.jit(fresh, out_shardings=self.shardings, donate_argnums=(0, 1))(params, buffers)

    def restorable_state(self):
        """The abstract TrainState with shardings that a checkpoint is restored into."""
        return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), self.abstract_state, self.shardings)

    def put(self, batches):
        """Micro-batches of this process as one global [M, B, T] array per key, or [B, T] from a single dict; images [M, B, ...]."""
        one = isinstance(batches, dict)
        local = {k: batches[k] if one else np.stack([b[k] for b in batches]) for k in (*DEVICE_KEYS, *self.sources)}
        local |= {k: layouts.to_layout(local[k], self.options.layout, self.pieces, axis=-1) for k in DEVICE_KEYS}
        rows = 0 if one else 1  # the dim of them

        def array(k, a):
            def piece(index):
                at = np.searchsorted(self.local_rows, np.arange(self.micro_batch)[index[rows]])
                return a[(*index[:rows], slice(at[0], at[-1] + 1), *index[rows + 1 :])]  # the rows of one device are neighbours

            shape = (*a.shape[:rows], self.micro_batch, *a.shape[rows + 1 :])
            return jax.make_array_from_callback(shape, self._batch_sharding(stacked=not one, text=k in DEVICE_KEYS), piece)

        return {k: array(k, a) for k, a in local.items()}

    def spread(self):
        """Sentences on how the work is spread, where there is something to say: the idle share of a pipeline, the balance of a ring."""
        c, lines = self.config, []
        if self.stages > 1:
            count, rounds = c.batch_size // self.micro_batch, self.options.rounds
            idle = pipeline.bubble_share(self.stages, count, rounds)
            lines.append(f"pipeline: {self.stages} stages x {rounds} rounds, {count} micro-batches, {idle:.1%} of the slots idle")
        if self.pieces > 1:
            windows = {m.config.window for m in self._mixers() if hasattr(m.config, "window")}
            shares = {w: layouts.balance(self.options.layout, c.seq_len, self.pieces, w) for w in sorted(windows, key=str)}
            where = {w: "with all keys" if w is None else f"in a window of {w}" for w in shares}
            each = [f"{share:.0%} of the devices at work {where[w]}" for w, share in shares.items()]
            lines.append("; ".join([f"sequence: {self.pieces} parts, {self.options.layout}, {self.options.attention}", *each]))
        width = c.model.d_model * jnp.dtype(c.model.compute_dtype).itemsize
        for part, parts, (way, worst, even) in self._exchanges():
            tokens = f"a token travels to {way.copies} of them at most, each pair has room for {way.copy_rows:,}; " if way.once else ""
            lines.append(
                f"{part.name}: {part.config.num_experts} experts on {parts} devices, {way.form}; {tokens}each pair has room for "
                f"{way.rows:,} choices (worst case {worst:,}, even loads {even:,}), {way.arriving * parts * width / 1e6:,.1f} MB of buffer "
                "per device and direction"
            )
        return lines

    def filled(self):
        """The shares of experts' rows, and of the buffers in which tokens travel, that are used where loads are even.

        Of the fullest kind of layer; 1: nothing travels. A token with choices on fewer shards than it may go to leaves more of them empty.
        """
        rooms = [(way, even, part.config.top_k) for part, _, (way, _, even) in self._exchanges()]
        rows = max((min(1.0, even / way.rows) for way, even, _ in rooms), default=1.0)
        sent = max((min(1.0, even * (way.copies if way.once else k) / k / way.arriving) for way, even, k in rooms), default=1.0)
        return rows, sent

    def _exchanges(self):
        """(part, devices, `room`) of each kind of MoE layer whose tokens travel to experts on other devices."""
        c, found = self.config, []
        for part in dict.fromkeys(kind.channel for kind in resolve(c.model).layers if kind.channel.cls.reports_load):
            e, parts = part.config, axes.shards("expert", mesh=self.mesh, rules=self.rules)
            with self.context():
                limit = e.capacity_factor and capacity(e, c.seq_len)
                rooms = room(self.micro_batch, c.seq_len, e.top_k, e.num_experts, limit, (e.groups, e.top_groups))
            if rooms:
                found.append((part, parts, rooms))
        return found

    def context(self):
        """The mesh and rules in force, per thread; nothing on a single device, where no op needs to be split."""
        return axes.use(self.mesh, self.rules, self.options) if self.mesh.size > 1 else contextlib.nullcontext()

    @property
    def step_programs(self):
        """Names of the programs (fields of `Programs`) that make a step."""
        return ("train_step",) if self.accumulation == "scan" else ("micro_step", "apply_step", "zero_sums")

    @property
    def compiler_options(self):
        """What every `.compile(compiler_options=...)` of this run is given."""
        return dict(self.config.train.compiler_options) or None

    def trace(self, name, seq_len):
        """A program (a field of `Programs`) for this sequence length, traced with its shardings and donation: `jax.stages.Traced`.

        What training compiles and what a plan compiles; to be called in `context()`. Nothing is allocated.
        """
        f, sh, state = self.functions, self.shardings, self.restorable_state()
        replicated = NamedSharding(self.mesh, PartitionSpec())  # what the host reads is whole on every process
        batch, number = self.abstract_batch(seq_len), jax.ShapeDtypeStruct((), jnp.int32)
        if name == "eval_step":
            return jax.jit(f.eval_step, out_shardings=replicated).trace(state.params, state.buffers, batch)
        if name == "train_step":
            batches = self.abstract_batch(seq_len, self.config.batch_size // self.micro_batch)
            return jax.jit(f.train_step, donate_argnums=0, out_shardings=(sh, replicated)).trace(state, batches)
        sums, places = self._abstract_sums(batch)
        if name == "micro_step":
            step = jax.jit(f.micro_step, donate_argnums=2, out_shardings=places)
            return step.trace(state.params, state.buffers, sums, batch, number, number)
        if name == "apply_step":
            return jax.jit(f.apply_step, donate_argnums=0, out_shardings=(sh, replicated)).trace(state, sums, number)
        return jax.jit(lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), sums), out_shardings=places).trace()

    def memory_budget(self, seq_len, copies_on_save):
        """`MemoryBudget` of the run at this length."""
        programs = self.programs(seq_len)
        return budget.memory_budget(
            self.abstract_state, self.shardings, self.config.train.accumulate_dtype,
            self.accumulation == "loop" or self.config.batch_size > self.micro_batch,
            programs.train_step or programs.micro_step, copies_on_save,
        )  # fmt: skip

    def estimated_step_seconds(self):
        """A first guess from FLOPs and an assumed share of peak; the run replaces it by measurements."""
        c = self.config
        executed = budget.step_flops(c.model, c.seq_len, c.batch_size, c.train.remat)[1]
        return executed / budget.flops_per_second(self.peak, len(self.devices))

    def _submit(self, seq_len):
        if seq_len not in self.compiling:
            self.compiling[seq_len] = self.compiler.submit(self._compile_and_tell, seq_len)

    def _compile_and_tell(self, seq_len):
        start = time.perf_counter()
        with self.context():  # the mesh in force belongs to a thread
            programs = self._compile(seq_len)
        what = "one step" if self.accumulation == "scan" else "micro_step and apply_step"
        megabytes = budget.temp_bytes(programs.train_step or programs.micro_step) / 1e6
        seconds = time.perf_counter() - start
        self.log(f"compiled {what} for sequences of {seq_len} in {seconds:.1f} s; temporaries {megabytes:,.0f} MB per device")
        return programs

    def _init(self, key):
        return step.init_state(functools.partial(_build, self.config.model), self.optimizer, key)

    def _choose_accumulation(self):
        c = self.config
        wanted = c.train.accumulation
        if self.stages > 1:
            if wanted == "loop" or c.train.batch_ramp:
                raise ConfigError(
                    f"config.train: over mesh.stage={self.stages} the micro-batches of a step go through the pipeline in one program; "
                    "accumulation='loop' and a batch_ramp, which run them one by one, need mesh.stage=1."
                )
            return "scan"
        if c.train.batch_ramp and wanted == "scan":
            raise ConfigError("config.train: a batch_ramp varies the number of micro-batches, 'scan' fixes it; use accumulation='loop'.")
        if wanted != "auto":
            return wanted
        if c.train.batch_ramp:
            return "loop"
        return "loop" if self.estimated_step_seconds() > LOOP_ABOVE_SECONDS else "scan"

    def _mixers(self):
        return [kind.mixer for kind in resolve(self.config.model).layers]

    def _batch_sharding(self, stacked, text=True):
        spec = axes.spec(("batch", "seq") if text else ("batch",), rules=self.rules, mesh=self.mesh, array="batch")
        return NamedSharding(self.mesh, PartitionSpec(None, *spec) if stacked else spec)

    def _rows_of_this_process(self):
        """(rows of a micro-batch that this process holds, which of them it counts): one held by several is counted by the first."""
        sharding, held = self._batch_sharding(stacked=False), {}
        for device, (row, _) in sharding.devices_indices_map((self.micro_batch, self.config.seq_len)).items():
            held.setdefault(device.process_index, set()).update(range(*row.indices(self.micro_batch)))
        first = {row: process for process in sorted(held, reverse=True) for row in held[process]}
        rows = np.array(sorted(held[jax.process_index()]))
        return rows, np.array([first[row] == jax.process_index() for row in rows.tolist()])

    def abstract_batch(self, seq_len, micro_batches=None):
        """ShapeDtypeStructs of one micro-batch [B, T], or of several [M, B, T], with their shardings."""
        rows = (self.micro_batch,) if micro_batches is None else (micro_batches, self.micro_batch)
        kinds = {k: ((seq_len,), jnp.float32 if k == "weights" else jnp.int32) for k in DEVICE_KEYS} | self.sources
        places = {k: self._batch_sharding(stacked=micro_batches is not None, text=k in DEVICE_KEYS) for k in kinds}
        return {k: jax.ShapeDtypeStruct((*rows, *shape), dtype, sharding=places[k]) for k, (shape, dtype) in kinds.items()}

    def _compile(self, seq_len):
        names = ("eval_step", *self.step_programs)
        return Programs(**{name: self.trace(name, seq_len).lower().compile(compiler_options=self.compiler_options) for name in names})

    def _abstract_sums(self, batch):
        """The accumulator of micro-batches: gradients placed as their parameters, the rest whole."""
        sums = jax.eval_shape(self.functions.zero_sums, self.abstract_state.params, self.abstract_state.buffers, batch)
        replicated = NamedSharding(self.mesh, PartitionSpec())
        places = jax.tree.map(lambda _: replicated, sums)._replace(grads=self.shardings.params)
        return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), sums, places), places


def _build(model_config, key):
    return Decoder(model_config, rngs=nnx.Rngs(key))

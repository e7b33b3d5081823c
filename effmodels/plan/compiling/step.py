"""Compiles the step of a config for a topology, in its own process: `python -m effmodels.plan.compiling.step request.json result.json`.

The very programs that training compiles (`train.setup.Setup.trace`), or the model's own prefill and step under the decoding rules; the
state is abstract, nothing is allocated. Lines "phase: name" on stdout tell how far it is.
"""
import gzip
import json
import math
import pathlib
import re
import sys
import time

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from effmodels.config import ConfigError
from effmodels.decode.weights import read_as
from effmodels.models import state as model_state
from effmodels.models.resolve import resolve
from effmodels.parallel import axes, layouts
from effmodels.plan import topology
from effmodels.plan.formulas import decoding, executed
from effmodels.train import budget
from effmodels.train.setup import Setup

WHAT = ("train", "prefill", "decode")


def main(request_file, result_file):
    request = json.loads(pathlib.Path(request_file).read_text())
    try:
        answer = _compile(request)
    except (ConfigError, ModuleNotFoundError) as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    pathlib.Path(result_file).write_text(json.dumps(answer))


def _compile(request):
    phase("describing the topology")
    place = topology.parse(request["topology"], request["slices"])
    phase("building the abstract model")
    setup = Setup(request["config"], log=lambda text: None, devices=place.devices())
    what = request["what"]
    if place.platform == "tpu":  # the persistent cache cannot read back what libtpu compiled
        jax.config.update("jax_enable_compilation_cache", False)
    names = [name for name in setup.step_programs if name != "zero_sums"] if what == "train" else [what]
    rules = setup.rules if what == "train" else axes.decode_rules(setup.rules)
    state = _train_state(setup) if what == "train" else _Decoding(setup, rules)
    trace = setup.trace if what == "train" else state.trace
    # One chip of a TPU also needs a mesh: it says what the program is compiled for.
    inside = setup.context() if what == "train" and setup.mesh.size > 1 or place.platform == "cpu" and setup.mesh.size == 1 else None
    with inside or axes.use(setup.mesh, rules, setup.options):
        programs = [_program(setup, trace, name, request) for name in names]
    return {
        "programs": programs,
        "mesh": dict(setup.mesh.shape),
        "micro_batch": setup.micro_batch,
        "micro_batches": setup.config.batch_size // setup.micro_batch,
        "stages": setup.stages,
        "rounds": setup.options.rounds,
        "balance": _balance(setup),
        "filled": setup.filled() if what == "train" else (1.0, 1.0),
        **_work(setup, what),
        "accumulates": what == "train" and (setup.accumulation == "loop" or setup.config.batch_size > setup.micro_batch),
        "notes": setup.spread() if what == "train" else state.notes,
        **(state if what == "train" else state.record()),
    }


def _work(setup, what):
    """Tokens and exact FLOPs of one step, all devices."""
    c, cost = setup.config, setup.cost
    tokens = c.batch_size * (1 if what == "decode" else c.seq_len)
    per_token = {"train": cost.train_flops_per_token, "prefill": cost.prefill_flops_per_token, "decode": cost.decode_flops_per_token}
    return {"tokens": tokens, "model_flops": tokens * per_token[what]}


def _balance(setup):
    """Of the devices that share a row, the share at work in a ring of attention: the worst over its windows; 1 without a ring."""
    if setup.pieces == 1:
        return 1.0
    mixers = [kind.mixer for kind in resolve(setup.config.model).layers]
    windows = {m.config.window for m in mixers if hasattr(m.config, "window")}
    return min((layouts.balance(setup.options.layout, setup.config.seq_len, setup.pieces, w) for w in windows), default=1.0)


def _program(setup, trace, name, request):
    """One compiled program: its memory, the file of its HLO text, FLOPs of its jaxpr, seconds; or the compiler's out-of-memory message."""
    clock = [time.perf_counter()]

    def lap():
        clock.append(time.perf_counter())
        return round(clock[-1] - clock[-2], 2)

    phase(f"tracing {name}")
    traced = trace(name, setup.config.seq_len)
    count, unknown = executed.flops(traced.jaxpr)
    record = {"name": name, "flops": count, "unknown_loops": unknown, "trace_seconds": lap()}
    record["calls"] = setup.config.batch_size // setup.micro_batch if name == "micro_step" else 1
    phase(f"lowering {name}")
    lowered = traced.lower()
    record["lower_seconds"] = lap()
    phase(f"compiling {name}")
    try:
        compiled = lowered.compile(compiler_options=setup.compiler_options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return record | {"compile_seconds": lap(), "out_of_memory": str(error)}
    record["compile_seconds"] = lap()
    path = pathlib.Path(request["folder"], f"{name}.hlo.gz")
    with gzip.open(path, "wt", compresslevel=3) as f:
        f.write(compiled.as_text())
    return record | {"hlo": path.name, "memory": _memory(compiled.memory_analysis())}


def _memory(analysis):
    names = ("argument", "output", "alias", "temp", "generated_code", "host_argument", "host_output", "host_temp")
    peak = int(getattr(analysis, "peak_memory_in_bytes", 0) or 0)
    return {name: int(getattr(analysis, f"{name}_size_in_bytes", 0) or 0) for name in names} | {"peak": peak}


def _train_state(setup):
    """What one device holds besides temporaries, in bytes, and its largest arrays."""
    state, places, c = setup.abstract_state, setup.shardings, setup.config
    batch = setup.abstract_batch(c.seq_len)
    micro_batches = c.batch_size // setup.micro_batch if setup.accumulation == "scan" else 1
    itemsize = jnp.dtype(c.train.accumulate_dtype).itemsize
    shapes = [[list(s.shard_shape(a.shape)), a.dtype.itemsize] for a, s in _leaves(state.params, places.params)]
    arrays = [("parameters", n, a, s) for n, (a, s) in _named(state.params, places.params).items()]
    arrays += [("optimizer", n, a, s) for n, (a, s) in _named(state.opt_state, places.opt_state).items()]
    return {
        "bytes": {
            "parameters": budget.tree_bytes(state.params, places.params),
            "optimizer": budget.tree_bytes(state.opt_state, places.opt_state),
            "buffers": budget.tree_bytes(state.buffers, places.buffers),
            "batch": micro_batches * sum(_local(a, a.sharding) for a in batch.values()),
        },
        "accumulator": sum(math.prod(shape) * itemsize for shape, _ in shapes),
        "parameter_shapes": sorted({tuple(shape) for shape, _ in shapes}),
        "arrays": _largest(arrays),
        "checkpoint_bytes": sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state)),
        "parameters_count": sum(a.size for a in state.params.values()),
    }


class _Decoding:
    """The abstract arrays and programs of prefill and decode: batch_size sequences, each with a state for seq_len tokens."""

    def __init__(self, setup, rules):
        c, self.setup, self.mesh, self.rules = setup.config, setup, setup.mesh, rules
        self.graphdef = model_state.split(setup.model)[0]
        narrow = read_as(c.model)
        params = {p: jax.ShapeDtypeStruct(a.shape, narrow.get(p, a.dtype)) for p, a in setup.abstract_params.items()}
        self.params, self.buffers = self._place(params), self._place(setup.abstract_buffers)
        state = decoding.state(c.model, c.batch_size, c.seq_len)
        self.notes = list(decoding.notes(state, setup.mesh.shape, rules))
        self.state = jax.tree_util.tree_map_with_path(self._state_array, state)
        self.rows = self._array((c.batch_size,), jnp.int32, ("batch",))

    def trace(self, name, seq_len):
        """`prefill` of whole rows, giving each row's next token, or one `decode` step; the state is donated."""
        places = jax.tree.map(lambda a: a.sharding, self.state)

        def prefill(params, buffers, tokens_BT, state):
            logits_BV, state = model_state.merge(self.graphdef, params, buffers).prefill(tokens_BT, state, last_only=True)
            return jnp.argmax(logits_BV, axis=-1), state

        def decode(params, buffers, tokens_B, state):
            logits_BV, state = model_state.merge(self.graphdef, params, buffers).step(tokens_B, state)
            return jnp.argmax(logits_BV, axis=-1), state

        rows = self._array((*self.rows.shape, seq_len), jnp.int32, ("batch", None)) if name == "prefill" else self.rows
        f = jax.jit(prefill if name == "prefill" else decode, donate_argnums=3, out_shardings=(self.rows.sharding, places))
        return f.trace(self.params, self.buffers, rows, self.state)

    def record(self):
        arrays = [("parameters", n, a, a.sharding) for n, a in self.params.items()]
        flat = jax.tree_util.tree_flatten_with_path(self.state)[0]
        arrays += [("decoding state", jax.tree_util.keystr(path), a, a.sharding) for path, a in flat]
        return {
            "bytes": {
                "parameters": sum(_local(a, a.sharding) for a in self.params.values()),
                "buffers": sum(_local(a, a.sharding) for a in self.buffers.values()),
                "activations": sum(_local(a, a.sharding) for _, a in flat),  # the decoding state
            },
            "accumulator": 0,
            "parameter_shapes": [],
            "arrays": _largest(arrays),
            "checkpoint_bytes": 0,
            "parameters_count": sum(a.size for a in self.params.values()),
        }

    def _place(self, arrays):
        infos = self.setup.infos

        def place(path, a):
            return axes.parameter_sharding(a.shape, infos[path], mesh=self.mesh, rules=self.rules, name=path)

        return {p: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place(p, a)) for p, a in arrays.items()}

    def _array(self, shape, dtype, dims):
        spec = axes.checked_spec(shape, dims, mesh=self.mesh, rules=self.rules, array="decoding batch")
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, spec))

    def _state_array(self, path, a):
        return self._array(a.shape, a.dtype, decoding.placed(path, a.shape, self.mesh.shape, self.rules).dims)


def phase(text):
    """Tells the parent what begins."""
    print(f"phase: {text}", flush=True)


def _named(tree, shardings):
    flat, places = jax.tree_util.tree_flatten_with_path(tree)[0], jax.tree.leaves(shardings)
    return {jax.tree_util.keystr(path): (a, s) for (path, a), s in zip(flat, places)}


def _leaves(tree, shardings):
    return zip(jax.tree.leaves(tree), jax.tree.leaves(shardings))


def _largest(arrays, number=20):
    """[category, name, bytes on one device, local shape, dtype] of the largest."""
    rows = [[kind, _readable(name), _local(a, s), list(s.shard_shape(a.shape)), str(a.dtype)] for kind, name, a, s in arrays]
    return sorted(rows, key=lambda row: -row[2])[:number]


def _readable(path):
    """A path of a pytree as words: ['groups']['adamw'][0].mu['embed'] is "groups adamw mu embed"."""
    return " ".join(a or b for a, b in re.findall(r"\['([^']+)'\]|\.(\w+)", path)) if "[" in path else path


def _local(array, sharding):
    return math.prod(sharding.shard_shape(array.shape)) * jnp.dtype(array.dtype).itemsize


if __name__ == "__main__":
    main(*sys.argv[1:])

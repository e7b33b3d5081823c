"""What is verified: a run's config in float32, one drawn batch, and its programs, each compiled once and shared by the checks.

The reference is one device, the whole batch at once, nothing recomputed. Letters: M micro-batches, B batch, T time, L layers, E experts.
"""
import contextlib
import copy
import dataclasses
import functools
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from effmodels.config import ConfigError
from effmodels.models import Decoder, cost
from effmodels.models import state as model_state
from effmodels.parallel import axes, layouts
from effmodels.parallel import mesh as meshes
from effmodels.train import step as train_step
from effmodels.train.run_config import RunConfig
from effmodels.train.setup import Setup
from effmodels.train.state import TrainState
from effmodels.verify import compare, draw, ties

STEP = 3  # of the optimiser, as far as random keys know: not 0, which hides a key that ignores it
# Compile time is nearly all of a verification on a CPU: the compiler's least effort halves it, its older code generator for fused loops
# (not in every version) halves it again; both change rounding only.
CPU_OPTIONS = ({"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}, {"xla_backend_optimization_level": 0})
MOST_OF_MEMORY = 0.8


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Relative errors between two runs that add in other orders. A leaf may differ by `slack` times what changing every parameter by up to
    `perturbation` does to it, where that is more than `gradient`, and by `most` at the most; auxiliary losses likewise (`most_loss`)."""

    loss: float
    gradient: float
    perturbation: float
    slack: float
    most: float
    most_loss: float


BOUNDS = {"float32": Bounds(1e-5, 1e-5, 2.0**-21, 20.0, 1e-2, 1e-4), "bfloat16": Bounds(1e-2, 0.05, 2.0**-8, 3.0, 0.5, 2e-2)}


@dataclasses.dataclass(frozen=True)
class Sums:
    """What one batch adds up to, on the host. grads: {canonical name: array} of the total (cross entropy and auxiliary losses); ce_BT: of
    every token, times its weight's derivative; scale: what the optimiser multiplies the gradients with. None where a program has it not."""

    grads: dict
    ce_sum: float
    weight_sum: float
    losses: dict
    load_LE: Any = None
    ce_BT: Any = None
    scale: float | None = None
    drop_L: Any = None

    def __add__(self, other):
        def add(a, b):
            return None if a is None or b is None else a + b

        return Sums(
            {n: g + other.grads[n] for n, g in self.grads.items()}, self.ce_sum + other.ce_sum, self.weight_sum + other.weight_sum,
            {n: x + other.losses[n] for n, x in self.losses.items()}, add(self.load_LE, other.load_LE), add(self.ce_BT, other.ce_BT),
        )  # fmt: skip


class Case:
    """A run's config prepared for verification on `devices`.

    Raises ConfigError for a config that cannot run on them, or is too large for this machine's memory.
    """

    def __init__(self, config, devices, seed=0, compute_dtype="float32"):
        self.devices, self.compute_dtype = list(devices), compute_dtype
        self.bounds = BOUNDS[compute_dtype]
        self.given = config.to_dict() if hasattr(config, "to_dict") else copy.deepcopy(dict(config))
        self.given.pop("expect", None)
        self.user = RunConfig.from_mapping(self.given, self.devices[0].platform)
        self.sizes = meshes.sizes(self.user.mesh, len(self.devices))
        self.refusal = self._refusal()  # the checks draw batches of their own
        self.rows, self.micro_batches = self._rows()
        self._check_memory()
        self.one = self.setup(self.devices[:1], mesh={})
        self.names = self.one.names
        self._programs, self._results, self._tied_BT = {}, {}, None
        self.draw(seed)

    def draw(self, seed):
        """Draws parameters and batch; the programs stay."""
        self.seed, self.replayed = seed, 0
        self.params = draw.arrays_by_path(self.one.abstract_params, self.one.infos, self.names, seed)
        self.buffers = draw.arrays_by_path(self.one.abstract_buffers, self.one.infos, self.names, seed)
        self.batch = self.drawn_batch(seed)
        self.forget()

    def drawn_batch(self, seed):
        """Rows of packed documents, with images where the model reads them."""
        batch = draw.packed_batch(self.rows, self.user.seq_len, self.user.model.vocab_size, seed)
        return draw.with_images(batch, self.one.sources, seed)

    @property
    def has_experts(self):
        """Whether tokens are routed, so that two equal scores can send a token elsewhere."""
        return any(kind.channel.cls.reports_load for kind in self.one.model.resolved.layers)

    @functools.cached_property
    def mesh(self):
        """The Setup on the config's mesh; the user's recomputation policy stays, since it is part of what is composed."""
        return self.setup(self.devices, mesh=self.user.mesh, remat=self.user.model.remat, micro_batches=self.micro_batches)

    def setup(self, devices, mesh, remat="none", micro_batches=1, **model_fields):
        """A `Setup` of the config in float32 with this batch; model_fields override the model's."""
        c = copy.deepcopy(self.given)
        c["mesh"] = dict(mesh)
        c["batch_size"] = micro_batches * self.rows
        plain = {"param_dtype": "float32", "compute_dtype": self.compute_dtype, "implementation": "xla", "remat": "none"}
        c["model"] = dict(c["model"]) | plain | model_fields
        c["train"] = {"micro_batch_size": self.rows, "accumulation": "scan", "accumulate_dtype": "float32", "remat": remat}
        c["optim"] = dict(c["optim"]) | {"warmup_steps": 0}  # a tiny first rate would hide the update in the rounding of the parameters
        return Setup(c, lambda *_: None, devices)

    def compiled(self, name, build):
        """`build()` of this name, made once."""
        if name not in self._programs:
            self._programs[name] = build()
        return self._programs[name]

    def jit(self, fn, **options):
        """jax.jit with the compiler's least effort on CPUs."""
        return jax.jit(fn, compiler_options=least_effort() if self.devices[0].platform == "cpu" else None, **options)

    def key(self, micro=0, step=STEP):
        """The random key that training gives to a micro-batch of a step; None for a model without dropout."""
        if not self.user.model.dropout:
            return None
        key = jax.random.key(self.user.seed, impl="threefry2x32")
        return jax.random.fold_in(jax.random.fold_in(key, step), micro)

    def reference(self, batch=None, micro=0, auxiliary=True, step=STEP, variant="reference", setup=None, mode="train", with_key=True,
                  params=None):
        """`Sums` of the batch on one device; another `variant` (with its setup) is another program of the same kind.

        auxiliary: whether the auxiliary losses are differentiated too.
        """
        setup = setup or self.one
        batch = self.batch if batch is None else batch
        program = self.compiled(f"{variant} {mode}", lambda: self.jit(_gradients(setup.model, mode)))
        key = self.key(micro, step) if with_key else None
        cached = variant == "reference" and params is None and batch is self.batch and (mode, micro, auxiliary, step, with_key)
        if cached and cached in self._results:
            return self._results[cached]
        drawn, buffers = self.placed(setup)
        params, batch = drawn if params is None else params, self.with_experts(batch, key, mode)
        grads, ce_BT, out = jax.device_get(program(params, buffers, batch, np.float32(auxiliary), key))
        found = Sums(
            draw.by_name(grads, setup.names), float(out.ce_sum), float(out.weight_sum), {n: float(x) for n, x in out.aux.losses.items()},
            out.aux.load_LE, ce_BT, drop_L=out.aux.metrics.get("moe_drop_fraction"),
        )  # fmt: skip
        if cached:
            self._results[cached] = found
        return found

    def allowed(self):
        """{canonical name: relative error} that rounding explains: a head norm over a sum near zero, say, magnifies it a thousand times.

        Measured on the reference, by two runs with every parameter changed in its last bits.
        """
        if "allowed" not in self._results:
            want, found, losses = self.reference(), {}, {}
            for params in self.perturbed():
                near = self.reference(params=params)
                for leaf in compare.compare(near.grads, want.grads, 1.0):
                    allowed = min(self.bounds.most, self.bounds.slack * leaf.error)
                    found[leaf.name] = max(found.get(leaf.name, 0.0), allowed)
                for name, value in want.losses.items():
                    allowed = min(self.bounds.most_loss, self.bounds.slack * compare.relative(near.losses[name], value))
                    losses[name] = max(losses.get(name, 0.0), allowed)
            self._results["allowed"], self._results["allowed_losses"] = found, losses
        return self._results["allowed"]

    def loss_bound(self, name):
        """The relative error that an auxiliary loss may have: as of gradients, the bound or what rounding explains."""
        self.allowed()
        return max(self.bounds.loss, self._results["allowed_losses"].get(name, 0.0))

    def perturbed(self, relative=None, count=2):
        """The parameters of the reference with every value changed by up to `relative` (default: a few last bits), `count` times."""
        for seed in range(count):
            rng = np.random.default_rng([self.seed, 3, seed])
            size = self.bounds.perturbation if relative is None else relative
            yield {p: (a * (1 + size * rng.uniform(-1, 1, a.shape))).astype(a.dtype) for p, a in self.params.items()}

    def compared(self, got, want):
        """`compare.compare` of two dicts of gradients of this batch, each within its bound or what rounding explains."""
        return compare.compare(got, want, self.bounds.gradient, self.allowed())

    def trained(self, setup, batches, variant):
        """`Sums` of train's own step over micro-batches: what the optimiser receives, recorded by one that does nothing else."""
        program = self.compiled(variant, lambda: self._recording_program(setup))
        params, buffers = self.placed(setup)
        batches = [self.with_experts(batch, self.key(micro)) for micro, batch in enumerate(batches)]
        state = TrainState(step=np.int32(STEP), params=params, buffers=buffers, opt_state=())
        with setup.context():
            state, metrics = jax.device_get(program(state, _put(setup, batches)))
        recorded, scale = state.opt_state, float(state.opt_state["scale"])
        losses = {n: float(metrics[n]) / scale for n in self.reference(auxiliary=True).losses}
        ce_sum = float(metrics["loss"]) / scale
        return Sums(
            draw.by_name(recorded["grads"], setup.names), ce_sum, float(metrics["target_tokens"]), losses, state.buffers["load_LE"],
            scale=scale, drop_L=metrics.get("moe_drop_fraction"),
        )  # fmt: skip

    def placed(self, setup):
        """(params, buffers) where the setup wants them."""
        if setup.mesh.size == 1 and setup.names == self.names:
            return self.params, self.buffers
        named = draw.by_name(self.params | self.buffers, self.names)
        params = draw.by_path(named, setup.names, setup.abstract_params)
        buffers = draw.by_path(named, setup.names, setup.abstract_buffers)
        return jax.device_put((params, buffers), (setup.shardings.params, setup.shardings.buffers))

    @contextlib.contextmanager
    def replaying(self):
        """Inside, tokens whose choice of experts is a tie up to rounding take the reference's on all sides; yields which, bool [B, T]."""
        self._tied_BT = np.zeros(self.batch["tokens"].shape, bool)
        self.forget()
        try:
            yield self._tied_BT
        finally:
            self._tied_BT = None
            self.forget()

    def with_experts(self, batch, key, mode="train"):
        if self._tied_BT is None or "experts" in batch:
            return batch
        experts_BTLk = ties.replay(self, batch, key, mode)
        self._tied_BT |= np.any(experts_BTLk >= 0, axis=(2, 3))
        return batch | {"experts": experts_BTLk}

    def forget(self):
        """Drops results, which belong to another batch; programs stay."""
        self._results.clear()

    def _recording_program(self, setup):
        model = nnx.eval_shape(lambda: _Recorded(setup.config.model, rngs=nnx.Rngs(0)))
        functions = train_step.make_step(model, _Recorder, setup.schedule, self.user.seed)
        recorded = {"grads": setup.shardings.params, "scale": None, "grad_norm": None}
        out = TrainState(step=None, params=None, buffers=None, opt_state=recorded)
        with setup.context():
            return self.jit(functions.train_step, out_shardings=(out, None))

    def _refusal(self):
        """What training will say to the config's own batch on this mesh ("": nothing); raised where the config fixes the mesh."""
        try:
            self.user.mesh_sizes(len(self.devices))
        except ConfigError as error:
            if -1 not in self.user.mesh.values() and "data" in self.user.mesh:
                raise
            return f"training on {len(self.devices)} devices will refuse: {error}"
        return ""

    def _rows(self):
        """(rows of a micro-batch, micro-batches): as few as the mesh can split."""
        split = axes.parts("batch", self.sizes, axes.make_rules(self.user.rules))
        stages = self.sizes["stage"]
        return split * -(-4 // split), stages + 1 if stages > 1 else 1  # a count that the stages do not divide

    def _check_memory(self):
        params = cost(self.user.model, self.user.seq_len).params * 4
        copies = math.prod(self.sizes[a] for a in ("data", "seq"))  # simulated devices share this machine's memory
        model, tokens = self.user.model, self.rows * self.user.seq_len
        activations = 4 * tokens * (32 * model.d_model * model.num_layers + model.vocab_size)
        need, free = params * (8 + 4 * copies) + 2 * activations, _free_memory()
        if free is not None and need > MOST_OF_MEMORY * free:
            raise ConfigError(
                f"verify: this config needs about {need / 1e9:,.0f} GB and {free / 1e9:,.0f} GB of memory are free here; verify its small "
                "form (--config=<file>:small, where the file has one), which runs the same code, or use a machine with more memory."
            )


@functools.cache
def least_effort():
    """The first of CPU_OPTIONS that this version's compiler knows."""
    for options in CPU_OPTIONS:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            jax.jit(lambda x: x, compiler_options=options).lower(0).compile()
            return options
    return None


def _put(setup, batches):
    """`Setup.put`, with the experts that tokens replay."""
    placed = setup.put(batches)
    if "experts" in batches[0]:
        experts = layouts.to_layout(np.stack([b["experts"] for b in batches]), setup.options.layout, setup.pieces, axis=2)
        spec = axes.spec((None, "batch", "seq"), rules=setup.rules, mesh=setup.mesh, array="experts")
        placed["experts"] = jax.device_put(experts, NamedSharding(setup.mesh, spec))
    return placed


class _Recorded(Decoder):
    """A Decoder whose buffers become the loads that training would update them by."""

    def update_buffers(self, buffers, load_LE):
        del buffers
        return {"load_LE": load_LE}


class _Recorder:
    """An optimiser that changes nothing and hands out what it was given."""

    @staticmethod
    def update(grads, state, params=None, *, grad_scale=None, **_):
        del state
        return jax.tree.map(jnp.zeros_like, params), {"grads": grads, "scale": grad_scale, "grad_norm": jnp.zeros(())}


def _gradients(model, mode):
    """(params, buffers, batch, auxiliary, key) -> (gradients of ce_sum + auxiliary * losses, cross entropy of every token, LossOut)."""
    graphdef = model_state.split(model)[0]

    def run(params, buffers, batch, auxiliary, key):
        def total(params, weights_BT):
            out = model_state.merge(graphdef, params, buffers).loss(batch | {"weights": weights_BT}, key=key, mode=mode)
            return out.ce_sum + auxiliary * sum(out.aux.losses.values()), out

        (grads, ce_BT), out = jax.grad(total, argnums=(0, 1), has_aux=True)(params, batch["weights"])
        return grads, ce_BT, out

    return run


def token_losses(model):
    """(params, buffers, batch) -> the cross entropy of every token [B, T]: the derivative of the sum by the token's weight."""
    graphdef = model_state.split(model)[0]

    def run(params, buffers, batch):
        return jax.grad(lambda w_BT: model_state.merge(graphdef, params, buffers).loss(batch | {"weights": w_BT}).ce_sum)(batch["weights"])

    return run


def _free_memory():
    try:
        with open("/proc/meminfo") as lines:
            found = {line.split(":")[0]: line.split()[1] for line in lines}
        return int(found["MemAvailable"]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None

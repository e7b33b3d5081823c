"""What the backward pass of a period of layers keeps and needs at once, read off its jaxpr: no compiler, no device, any mixer.

The period is traced on one row of one chip. Values that only elementwise operations read are taken as fused into them; what a matmul, a
kernel, a gather or a sort reads or writes is an array. The order of the jaxpr stands for the compiler's.
Letters: T tokens of one row on one chip, D model.
"""
import contextlib
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import Literal
from jax.sharding import AbstractMesh, AxisType

from effmodels.layers.context import Ctx, Memory
from effmodels.models.blocks import Block
from effmodels.multimodal.media import SOURCE
from effmodels.parallel import axes, ops, options, stack
from effmodels.plan.formulas import executed

# Primitives that a compiler fuses with their neighbours. Everything else reads and writes arrays.
FUSED = frozenset(
    "abs add add_any and asin atan broadcast_in_dim ceil clamp convert_element_type copy copy_p cos cumsum div eq erf erf_inv exp exp2 "
    "expand_dims expm1 floor ge gt integer_pow iota is_finite le log log1p logistic lt max min mul name ne neg not or pad pow "
    "real reduce_and reduce_max reduce_min reduce_or reduce_precision reduce_sum rem reshape rev round rsqrt select_n shift_left "
    "shift_right_logical sharding_constraint sign sin slice split sqrt square squeeze stop_gradient sub tanh transpose xor "
    "optimization_barrier pvary".split()
)


# Passes over memory, in the size of the result, of what is neither a matmul nor a kernel: a fusion reads about one and a half arrays for
# each that it writes; what moves rows reads as much as it writes and reaches 0.4 of the bandwidth (gathers of a MoE's program for TPU v4).
FUSION, MOVEMENT = 2.5, 5.0
MOVES = frozenset(("gather", "scatter", "scatter-add", "scatter_add", "sort", "top_k"))
# The same array under another name: of the sum that is the residual stream's gradient, matmuls read one, the next layer another.
RENAMES = frozenset(("expand_dims", "name", "optimization_barrier", "pvary", "reshape", "sharding_constraint", "squeeze"))
# Fused with what makes their operand, but their result is an array: who reads it later (a norm's scale, at the end) holds that alone.
SUMS = frozenset(("reduce_max", "reduce_min", "reduce_sum"))


@dataclasses.dataclass(frozen=True)
class Array:
    """An array of one row: alive from the `birth`-th to the `death`-th operation.

    weight: it has the shape of a parameter. passes: over memory that making it takes, FUSION or MOVEMENT; 0 for matmuls and kernels.
    ahead: made again for the gradients, and there before the first of them. host: waits in the host's memory (`offload:`).
    """

    shape: tuple
    itemsize: int
    weight: bool
    birth: int = 0
    death: int = 0
    passes: float = 0.0
    ahead: bool = False
    host: bool = False


@dataclasses.dataclass(frozen=True)
class Layer:
    """kept: what waits for the backward pass. working: what lives while the backward pass of this layer runs.

    flops: executed for one row, forward and backward with what is recomputed. products: those of the matmuls outside kernels, alike.
    """

    kept: tuple
    working: tuple
    flops: tuple
    products: tuple

    def kept_bytes(self, nbytes):
        """nbytes: function of an Array, its bytes on one chip."""
        return sum(nbytes(a) for a in self.kept if not a.host)

    def offloaded_bytes(self, nbytes):
        """What waits in the host's memory."""
        return sum(nbytes(a) for a in self.kept if a.host)

    def ahead_bytes(self, nbytes):
        """What is made again before the first gradient."""
        return sum(nbytes(a) for a in self.working if a.ahead)

    def working_bytes(self, nbytes):
        """The most that lives at once."""
        change = {}
        for a in self.working:
            n = nbytes(a)
            change[a.birth] = change.get(a.birth, 0) + n
            change[a.death + 1] = change.get(a.death + 1, 0) - n
        most = now = 0
        for _, delta in sorted(change.items()):
            now += delta
            most = max(most, now)
        return most


@dataclasses.dataclass(frozen=True)
class Period:
    """rows: (Layer, how many such layers in a row are a loop). kept, working, flops, products: as of a Layer, of all of them."""

    rows: tuple

    @property
    def layers(self):
        return tuple(layer for layer, number in self.rows for _ in range(number))

    @property
    def kept(self):
        return tuple(a for layer in self.layers for a in layer.kept)

    @property
    def working(self):
        return tuple(a for layer in self.layers for a in layer.working)

    @property
    def flops(self):
        return tuple(sum(layer.flops[i] for layer in self.layers) for i in (0, 1))

    @property
    def products(self):
        return tuple(sum(layer.products[i] for layer in self.layers) for i in (0, 1))

    @property
    def recomputed(self):
        """The share of the forward pass's matmuls that the backward pass runs again."""
        forward, backward = self.products
        return min(1.0, max(0.0, backward / forward - 2)) if forward else 0.0

    def kept_bytes(self, nbytes):
        """nbytes: function of an Array, its bytes on one chip."""
        return sum(number * layer.kept_bytes(nbytes) for layer, number in self.rows)

    def offloaded_bytes(self, nbytes):
        return sum(number * layer.offloaded_bytes(nbytes) for layer, number in self.rows)

    def working_bytes(self, nbytes, repeated):
        """The most that lives at once in the backward pass of the period, one layer after the other from the last on.

        What layers make again waits for no gradient, and compilers make it before the gradients of the layers behind; not across the end of
        a loop. repeated: the period is a loop itself; then a loop inside it works on a copy of what its layers kept.
        """
        found, before = [], 0
        for layer, number in self.rows:
            copied = number * layer.kept_bytes(nbytes) if repeated and number > 1 else 0
            found.append(layer.working_bytes(nbytes) + copied + before)
            before = before + layer.ahead_bytes(nbytes) if number == 1 else 0
        return max(found)


@contextlib.contextmanager
def single(chip):
    """A mesh of one device of this chip in force: layers are traced as on a mesh, kernels as on the chip."""
    device = jax.sharding.AbstractDevice(chip.kind, 1, chip.platform)
    count = len(axes.MESH_AXES)
    mesh = AbstractMesh((1,) * count, axes.MESH_AXES, axis_types=(AxisType.Auto,) * count, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh), axes.rules_in_force(axes.make_rules()), options.use(None):
        yield


def period(resolved, kinds, remat, time, chip):
    """The `Period` of these LayerKinds under a remat policy, for one row of `time` tokens on a `Chip`."""
    found = []
    for kind in kinds:
        alike = resolved.config.scan_neighbours and found and found[-1][0] == kind
        found[-1:] = [(kind, found[-1][1] + 1)] if alike else [*found[-1:], (kind, 1)]
    return Period(tuple((layer(resolved, kind, remat, time, chip), number) for kind, number in found))


@functools.lru_cache(256)
def layer(resolved, kind, remat, time, chip):
    """The `Layer` of a LayerKind, as `period`."""
    c = resolved.config
    graph, state = nnx.split(nnx.eval_shape(functools.partial(_block, kind, resolved)))
    x = jax.ShapeDtypeStruct((1, time, c.d_model), jnp.dtype(c.compute_dtype))
    index = jax.ShapeDtypeStruct((1, time), jnp.int32)
    weights = {a.shape for a in jax.tree.leaves(state) if len(a.shape) > 1}
    weights = frozenset(weights | {(*s[:-1], 2 * s[-1]) for s in weights})  # gates and inputs of experts lie side by side in a product
    found = {}

    def forward(state, x, ids):
        ctx = Ctx(segment_ids_BT=ids, positions_BT=ids, layer=jnp.int32(0), memory=_images(resolved))

        def one(state, x):
            x, aux = stack.checkpointed(lambda state, x: nnx.merge(graph, state)(x, ctx), remat, in_scan=True)(state, x)
            return x, sum(aux.losses.values(), jnp.zeros((), jnp.float32)) if aux is not None else jnp.zeros((), jnp.float32)

        out, backward = jax.vjp(one, state, x)
        inputs = {id(v) for v in jax.tree.leaves((state, ids))}
        kept = {id(v): v for v in jax.tree.leaves(backward) if id(v) not in inputs and hasattr(v, "shape")}.values()
        found["kept"] = [(v.shape, v.dtype.itemsize, v.aval.memory_space == jax.memory.Space.Host) for v in kept]
        return out, backward

    with single(chip):
        there, (out, backward) = jax.make_jaxpr(forward, return_shape=True)(state, x, index)
        back = jax.make_jaxpr(lambda backward, cotangents: backward(cotangents))(backward, out)
    kept = tuple(Array(shape, itemsize, shape in weights, host=host) for shape, itemsize, host in found["kept"])
    flops, products = (tuple(count(jaxpr.jaxpr) for jaxpr in (there, back)) for count in (lambda j: executed.flops(j)[0], _products))
    return Layer(kept, _working(back.jaxpr, weights, len(out)), flops, products)


@functools.lru_cache(64)
def head_flops(resolved, time, chip):
    """FLOPs that the loss of one row executes, forward and backward, from the hidden states on."""
    c, dtype = resolved.config, jnp.dtype(resolved.config.compute_dtype)
    x_BTD, labels_BT = jax.ShapeDtypeStruct((1, time, c.d_model), dtype), jax.ShapeDtypeStruct((1, time), jnp.int32)
    w = jax.ShapeDtypeStruct((c.vocab_size, c.d_model) if c.tie_embeddings else (c.d_model, c.vocab_size), dtype)
    layout, options_ = "VD" if c.tie_embeddings else "DV", {"logits_soft_cap": c.logits_soft_cap, "implementation": c.implementation}

    def loss(x_BTD, w, labels_BT):
        return jnp.sum(ops.linear_cross_entropy(x_BTD, w, labels_BT, w_layout=layout, **options_)[0])

    with single(chip):
        return executed.flops(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(x_BTD, w, labels_BT).jaxpr)[0]


def _block(kind, resolved):
    return Block(kind, resolved, rngs=nnx.Rngs(jax.random.key(0, impl="threefry2x32")))


def _images(resolved):
    """The images of one row that layers attend to."""
    media = resolved.media
    if media is None or media.fusion.at_input:
        return {}
    entries = media.config.images * media.tokens
    ids = jnp.ones((1, entries), jnp.int32)
    return {SOURCE: Memory(jnp.zeros((1, entries, media.width), resolved.config.compute_dtype), ids, ids)}


def _products(jaxpr):
    """FLOPs of the matmuls that no kernel and no loop holds."""
    steps = []
    _flatten(jaxpr, {}, steps)
    return sum(2.0 * math.prod(avals[0].shape) * depth for name, _, _, avals, depth in steps if name == "dot_general")


def _working(jaxpr, weights, cotangents=0):
    """The Arrays that live while the jaxpr runs; its inputs are somebody else's, gradients of weights leave at once.

    cotangents: how many of its last inputs are the gradients of the results.
    """
    steps, outputs, given = [], [], (*jaxpr.invars, *jaxpr.constvars)
    _flatten(jaxpr, {v: ("in", id(v)) for v in given}, steps, outputs)
    last = jaxpr.invars[len(jaxpr.invars) - cotangents :]
    return _alive(steps, outputs, weights, {("in", id(v)) for v in last})


def _alive(steps, outputs, weights, gradients):
    """`_working` of the (primitive, inputs, results, avals, depth) of a jaxpr; gradients: the names of its inputs that are some."""
    needed, kept_steps = set(outputs), []
    for name, inputs, results, avals, _ in reversed(steps):
        if needed & set(results):
            needed |= set(inputs)
            kept_steps.append((name, inputs, results, avals))
    kept_steps.reverse()
    heavy = {v for name, inputs, _, _ in kept_steps if name not in FUSED for v in inputs}
    for name, inputs, results, _ in reversed(kept_steps):
        if name in RENAMES and heavy & set(results):
            heavy |= set(inputs)
    sources, born, last, uses, rearranged, gradients, first = {}, {}, {}, {}, set(), set(gradients), len(kept_steps)
    for t, (name, inputs, results, avals) in enumerate(kept_steps):
        behind = frozenset().union(*(sources.get(v, ()) for v in inputs)) if inputs else frozenset()
        if gradients & set(inputs):
            gradients |= set(results)
            first = min(first, t)
        for result, aval in zip(results, avals):
            made = name not in FUSED or name in SUMS or (name not in RENAMES and result in heavy and len(aval.shape) > 1)
            sources[result] = frozenset([result]) if made else behind
            if made:
                born[result] = (t, aval, FUSION if name in FUSED else MOVEMENT if name in MOVES else 0.0)
            if aval.shape in weights:  # so is what it was before its dims changed places
                rearranged |= {result, *(behind if name in RENAMES or name == "transpose" else ())}
        for v in behind:  # an elementwise result takes the place of an array that nobody reads after it
            last[v] = t - (name in FUSED)
            uses.setdefault(v, []).append(t)
    for v in outputs:
        for source in sources.get(v, ()):
            if source in born and source not in rearranged:
                last[source] = len(kept_steps)
    found = []
    for v, (t, aval, passes) in born.items():
        if aval.size > 1 and jax.dtypes.issubdtype(aval.dtype, jnp.number):
            death = last.get(v, t)
            one = Array(tuple(aval.shape), jnp.dtype(aval.dtype).itemsize, v in rearranged, t, death, passes, t < first <= death)
            again = [use for use in uses.get(v, ()) if use >= first]
            if one.weight and one.ahead and again[0] > min(uses[v]):  # it is not held meanwhile, but gathered or cast again
                found.append(dataclasses.replace(one, death=max(use for use in uses[v] if use < first), ahead=False))
                one = dataclasses.replace(one, birth=again[0], passes=0.0)
            found.append(one)
    return tuple(found)


def _flatten(jaxpr, names, steps, outputs=None):
    """Appends (primitive, inputs, results, avals of the results, depth) of a jaxpr and of the jaxprs that it merely calls."""

    def name(v):
        return ("literal", 0) if isinstance(v, Literal) else names.setdefault(v, ("value", id(v), len(steps)))

    for eqn in jaxpr.eqns:
        inner = _called(eqn)
        inputs = [name(v) for v in eqn.invars]
        if inner is None:
            results = [name(v) for v in eqn.outvars]
            arrays = [v for v in inputs if v[0] != "literal"]
            steps.append((eqn.primitive.name, arrays, results, [v.aval for v in eqn.outvars], _depth(eqn)))
            continue
        count, found = len(inner.invars), []
        inside = dict(zip(inner.invars, inputs[len(inputs) - count :])) | {v: ("const", id(v)) for v in inner.constvars}
        _flatten(inner, inside, steps, found)
        names.update(zip(eqn.outvars, found))
    if outputs is not None:
        outputs += [name(v) for v in jaxpr.outvars]


def _depth(eqn):
    """Of a matmul: how many products an element of the result sums."""
    if eqn.primitive.name != "dot_general":
        return 0
    (contracted, _), _ = eqn.params["dimension_numbers"]
    return math.prod(eqn.invars[0].aval.shape[i] for i in contracted)


def _called(eqn):
    """The jaxpr of an equation that only wraps one, else None: loops and kernels are operations of their own."""
    if eqn.primitive.name in ("scan", "while", "cond", "pallas_call", "custom_partitioning"):
        return None
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if key in eqn.params:
            return getattr(eqn.params[key], "jaxpr", eqn.params[key])
    return None


def nbytes(array, run, rows=None):
    """Bytes of an `Array` on one chip of an `abstract.Run` with so many rows in a micro-batch (default: the run's).

    Weights lie there gathered over the axes that split rows. Everything else has one row; the dims of the residual stream (the model's)
    stay whole over the tensor axis, other dims are split where it divides them.
    """
    size = math.prod(array.shape) * array.itemsize
    tensor = run.size(run.over("act_heads", "act_mlp"))
    if array.weight:
        return size // tensor
    rows, time = run.rows if rows is None else rows, run.time
    tokens = [i for i, n in enumerate(array.shape) if n == time] or [i for i, n in enumerate(array.shape) if n % time == 0]
    features = [n for i, n in enumerate(array.shape) if n != 1 and i not in tokens[:1]]
    split = tensor > 1 and features != [run.config.model.d_model] and any(n % tensor == 0 for n in features)
    return size * rows // (tensor if split else 1)

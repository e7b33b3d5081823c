"""The weights that decoding reads, in the type that it reads them in: what every use converts to bfloat16 is converted once, beforehand.

Which these are is found in the traced programs, not by name: a parameter is followed through what only rearranges its values, and counts if
each of its ways ends in a conversion to one and the same narrower type. Any other use (a router's matmul, a decay's exponential, a norm in
float32) keeps it as it is stored, and so does having none. Letters: B batch, T time.
"""
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import Literal

from effmodels.models import Decoder
from effmodels.models import state as model_state

# Their results are values of the first operand, whatever the others are.
_REARRANGE = {
    "reshape", "transpose", "squeeze", "expand_dims", "broadcast_in_dim", "slice", "dynamic_slice", "gather", "rev", "split", "copy",
    "sharding_constraint",
}  # fmt: skip
_NO_MESH = jax.sharding.AbstractMesh((), ())  # one row cannot be split, and no choice of a mesh changes what is converted


def served(model):
    """The model with every parameter of `read_as` in that type: prefill, step and drafts compute the same, bit for bit.

    The given model keeps its own: who decodes more than once, or has little memory, serves this one and drops the other.
    """
    graphdef, params, buffers = model_state.split(model)
    narrow = jnp.dtype(model.config.compute_dtype).itemsize
    if all(a.dtype.itemsize <= narrow for a in params.values()):
        return model
    types = {path: t for path, t in read_as(model.config).items() if params[path].dtype.itemsize > t.itemsize}
    if not types:
        return model
    paths = sorted(types)
    narrowed = dict(zip(paths, _narrowed([params[path] for path in paths], tuple(types[path].name for path in paths))))
    return model_state.merge(graphdef, {**params, **narrowed}, buffers)


@functools.partial(jax.jit, static_argnums=1)
def _narrowed(arrays, types):
    return [a.astype(t) for a, t in zip(arrays, types)]


@functools.lru_cache(16)
def read_as(config):
    """{path: dtype} of the parameters of a ModelConfig that decoding reads in one narrower dtype only."""
    with jax.sharding.use_abstract_mesh(_NO_MESH):
        model = nnx.eval_shape(lambda key: Decoder(config, rngs=nnx.Rngs(key)), jax.random.key(0, impl="threefry2x32"))
        graphdef, params, buffers = model_state.split(model)
        tokens_BT = jax.ShapeDtypeStruct((1, 2), jnp.int32)
        return converted(lambda p, b, t: _decode(model_state.merge(graphdef, p, b), t), params, buffers, tokens_BT)


def converted(program, params, *args):
    """{path: dtype} of the arrays of a dict that program(params, *args) converts to one narrower dtype wherever it reads them."""
    jaxpr = jax.make_jaxpr(program)(params, *args).jaxpr
    paths = sorted(params)  # as a dict is flattened
    found = {path: set() for path in paths}
    for sources in _follow(jaxpr, [{path} for path in paths] + [set()] * (len(jaxpr.invars) - len(paths)), found):
        _note(found, sources, None)
    return {path: next(iter(types)) for path, types in found.items() if len(types) == 1 and None not in types}


def _decode(model, tokens_BT):
    """Every program of decoding: a prompt, a step, and the drafts of `model.mtp`."""
    (B, T), slots = tokens_BT.shape, 64
    hidden_BTD, state = model.prefill_hidden(tokens_BT, model.init_state(B, slots))
    logits = [model.logits(hidden_BTD), model.step(tokens_BT[:, 0], state)[0]]
    valid_BT, index_BT = jnp.ones((B, T), bool), jnp.broadcast_to(jnp.arange(T), (B, T))
    for module in model.mtp:
        old = module.layer.mixer.init_state(B, slots, model.config.compute_dtype)
        hidden_BTD, _ = module.prefill(hidden_BTD, model.embedded(tokens_BT), model.decode_ctx(index_BT, valid_BT), old, valid_BT)
        logits.append(model.logits(hidden_BTD))
    return logits


def _follow(jaxpr, given, found):
    """The paths whose values each output holds. given: those of each input; found {path: types it is read in} grows, None: as stored."""
    held = dict(zip(jaxpr.invars, given))

    def of(v):
        return set() if isinstance(v, Literal) else held.get(v, set())

    for equation in jaxpr.eqns:
        inputs = [of(v) for v in equation.invars]
        if any(inputs):
            held.update(zip(equation.outvars, _through(equation, inputs, found)))
    return [of(v) for v in jaxpr.outvars]


def _through(equation, inputs, found):
    """As `_follow`, of one equation some of whose inputs hold parameters."""
    name, params, outputs = equation.primitive.name, equation.params, len(equation.outvars)
    if name == "convert_element_type":
        (given,), old, new = inputs, equation.invars[0].aval.dtype, jnp.dtype(params["new_dtype"])
        if new == old:
            return [given]
        _note(found, given, new if jnp.issubdtype(new, jnp.floating) and new.itemsize < old.itemsize else None)
        return [set()]
    if name in _REARRANGE and not any(inputs[1:]):
        return [inputs[0]] * outputs
    inner = [value for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if (value := params.get(key)) is not None]
    inner = [getattr(value, "jaxpr", value) for value in inner]
    if len(inner) == 1 and len(inner[0].invars) == len(inputs) and len(inner[0].outvars) == outputs:
        results = _follow(inner[0], inputs, found)
        if name != "scan":
            return results
        # Constants, carries, slices in; carries, slices out. What is carried has to keep its type. A slice has one dim less than its stack.
        whole_in, whole_out = (
            [given.aval.ndim == own.aval.ndim for given, own in zip(*ends)]
            for ends in ((equation.invars, inner[0].invars), (equation.outvars, inner[0].outvars))
        )
        carries = sum(whole_out)
        _note(found, set().union(*inputs[sum(whole_in) - carries : sum(whole_in)], *results[:carries]), None)
        return [set()] * carries + results[carries:]
    _note(found, set().union(*inputs), None)
    return [set()] * outputs


def _note(found, paths, dtype):
    for path in paths:
        found[path].add(dtype)

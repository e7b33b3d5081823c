"""One optimiser step: gradients summed over micro-batches, one division by the number of target tokens, one update.

"scan": all micro-batches inside one program. "loop": two programs, `micro_step` and `apply_step`, so that a step of hours shows progress.
Both compute the same sums. Letters: M micro-batches, B batch, T time.
"""
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from effmodels.config import ConfigError
from effmodels.models import state as model_state
from effmodels.parallel import axes
from effmodels.train.state import TrainState


class Sums(NamedTuple):
    """What micro-batches add up to. grads: of total_sum, in the accumulate dtype."""

    grads: Any
    ce_sum: Any
    weight_sum: Any
    losses: Any
    load_LE: Any
    drop_L: Any
    overflow_L: Any = None


class StepFunctions(NamedTuple):
    """Pure functions of arrays, to be compiled by the caller."""

    train_step: Any  # (state, batch_MBT) -> (state, metrics)
    micro_step: Any  # (params, buffers, sums, batch_BT, step, micro) -> sums
    apply_step: Any  # (state, sums, micro_batches) -> (state, metrics)
    zero_sums: Any  # (params, buffers, batch_BT) -> sums; only shapes are read
    eval_step: Any  # (params, buffers, batch_BT) -> (ce_sum, weight_sum)


def make_step(model, optimizer, schedule, seed, accumulate_dtype="float32", sequential_above=None):
    """The `StepFunctions` of a (possibly abstract) model and an optax transformation; schedule only reports the learning rate.

    sequential_above: as of `make_optimizer`; arrays of more bytes are reduced layer by layer, which saves their size in temporaries.
    Random keys (dropout) are folded from seed, step and micro-batch, threefry, so that a resumed run draws the same masks.
    """
    graphdef = model_state.split(model)[0]
    infos = model_state.info(model)

    def sums_of(params, buffers, batch, key):
        def total(params):
            out = model_state.merge(graphdef, params, buffers).loss(batch, key=key if model.config.dropout else None)
            return out.total_sum, out

        grads, out = jax.grad(total, has_aux=True)(params)
        drops, overflow = out.aux.metrics.get("moe_drop_fraction"), out.aux.metrics.get("moe_overflow")
        return Sums(grads, out.ce_sum, out.weight_sum, out.aux.losses, out.aux.load_LE, drops, overflow)

    def zero_sums(params, buffers, batch):
        shapes = jax.eval_shape(sums_of, params, buffers, batch, jax.eval_shape(lambda: jax.random.key(0)))
        grads = {p: jnp.zeros(x.shape, accumulate_dtype) for p, x in params.items()}
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes._replace(grads={}))._replace(grads=grads)

    def key_of(step, micro):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step), micro)

    def micro_step(params, buffers, sums, batch, step, micro):
        new = sums_of(params, buffers, batch, key_of(step, micro))
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), sums, new)

    def apply_step(state, sums, micro_batches):
        scale = 1.0 / jnp.maximum(sums.weight_sum, 1e-9)
        updates, opt_state = optimizer.update(sums.grads, state.opt_state, state.params, grad_scale=scale)
        squares = {p: _squares(g, infos[p].dim_names[0] == "layers", sequential_above) for p, g in sums.grads.items()}
        params = optax.apply_updates(state.params, updates)
        buffers = model.update_buffers(state.buffers, sums.load_LE)
        metrics = _metrics(sums, scale, opt_state["grad_norm"], squares, schedule(state.step), micro_batches)
        return TrainState(step=state.step + 1, params=params, buffers=buffers, opt_state=opt_state), metrics

    def train_step(state, batch_MBT):
        count, first = jax.tree.leaves(batch_MBT)[0].shape[0], jax.tree.map(lambda a: a[0], batch_MBT)
        if axes.shards("stage") > 1:  # the pipeline's micro-batches are these, all in one call
            _check_sums(state.params, accumulate_dtype)
            keys_M = jax.vmap(lambda micro: key_of(state.step, micro))(jnp.arange(count))
            return apply_step(state, sums_of(state.params, state.buffers, batch_MBT, keys_M), count)
        if count == 1:
            return apply_step(state, sums_of(state.params, state.buffers, first, key_of(state.step, 0)), 1)

        def body(sums, x):
            micro, batch = x
            return micro_step(state.params, state.buffers, sums, batch, state.step, micro), None

        zeros = zero_sums(state.params, state.buffers, first)
        sums, _ = jax.lax.scan(body, zeros, (jnp.arange(count), batch_MBT))
        return apply_step(state, sums, count)

    def eval_step(params, buffers, batch):
        out = model_state.merge(graphdef, params, buffers).loss(batch, mode="eval")
        return out.ce_sum, out.weight_sum

    return StepFunctions(train_step, micro_step, apply_step, zero_sums, eval_step)


def init_state(build_model, optimizer, key):
    """A fresh TrainState: parameters of build_model(key), the optimiser's state, step 0."""
    return state_of(*model_state.split(build_model(key))[1:], optimizer)


def state_of(params, buffers, optimizer):
    """A TrainState of step 0 with these parameters."""
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, buffers=buffers, opt_state=optimizer.init(params))


def nonfinite_leaves(squares, names):
    """Canonical names whose gradient is not finite. squares: path -> sum of squares, a scalar or [R]; names: the model's manifest."""
    bad = []
    for name, (path, index) in names.items():
        if path in squares:
            value = squares[path] if index is None else squares[path][index]
            if not np.isfinite(value):
                bad.append(name)
    return bad


def _check_sums(params, accumulate_dtype):
    """A pipeline sums gradients in the dtype of the parameters; ConfigError where the sum is asked to be finer."""
    for path, p in params.items():
        if jnp.finfo(p.dtype).bits < jnp.finfo(accumulate_dtype).bits:
            raise ConfigError(
                f"pipeline: gradients of {path} would be summed over micro-batches in {p.dtype}, its own dtype, not in "
                f"train.accumulate_dtype={accumulate_dtype}. Set model.param_dtype={accumulate_dtype}, or train.accumulate_dtype={p.dtype}."
            )


def _squares(grad, per_layer, sequential_above):
    """The sum of squares of a leaf: one number, or one per layer of a stack."""

    def total(x):
        return jnp.sum(jnp.square(x.astype(jnp.float32)))

    if not per_layer:
        return total(grad)
    large = sequential_above is not None and grad.size * 4 > sequential_above
    return jax.lax.map(total, grad) if large else jax.vmap(total)(grad)


def _metrics(sums, scale, grad_norm, squares, lr, micro_batches):
    metrics = {
        "loss": sums.ce_sum * scale,
        "target_tokens": sums.weight_sum,
        "grad_norm": grad_norm,
        "lr": jnp.asarray(lr, jnp.float32),
        "squares": squares,
    }
    metrics |= {name: value * scale for name, value in sums.losses.items()}
    if sums.load_LE is not None:
        mean_L = jnp.mean(sums.load_LE, axis=-1)
        metrics["moe_max_violation"] = jnp.max(sums.load_LE, axis=-1) / jnp.maximum(mean_L, 1e-9) - 1.0
        # Shares of each layer's routed choices, [L, E].
        metrics["moe_load"] = sums.load_LE / jnp.maximum(jnp.sum(sums.load_LE, axis=-1, keepdims=True), 1.0)
        metrics["moe_drop_fraction"] = sums.drop_L / micro_batches
        metrics["moe_overflow"] = sums.overflow_L
    return metrics

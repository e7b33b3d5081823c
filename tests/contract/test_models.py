"""A model of every registered kind at once: sharded = one device, scanned = unrolled, dropout the same everywhere, config round trip.

float64, so that a wrong sum cannot hide in rounding. Letters: B batch, T time.
"""
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effmodels.channel.registry import CHANNELS
from effmodels.config import ModelConfig
from effmodels.models import Decoder, cost
from effmodels.models import state as model_state
from effmodels.parallel import axes, mesh
from tests.contract.cases import (
    CHANNEL_CASES,
    FLOPS_IMPLEMENTATION,
    MIXER_CASES,
    MIXERS,
    all_kinds_config,
    fill,
    jit,
    loss_and_grads,
    packed_batch,
)  # fmt: skip
from tests.numerics import assert_close, assert_trees_close

DROPOUT_SEED = 3
MESHES = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "tensor": {"data": 2, "tensor": 4},
    "mixed": {"data": 2, "fsdp": 2, "tensor": 2},
    "time": {"data": 2, "seq": 2, "expert": 2},
}


def built(config):
    """(graphdef, params, buffers) of the config's Decoder, in numpy."""
    return fill(lambda: Decoder(config, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def one_device():
    """(config, params, buffers, infos, batch, values and gradients without a mesh, of the kernels' slow twins)."""
    with jax.enable_x64(True):
        config = all_kinds_config(dropout=0.1, implementation="reference")
        graphdef, params, buffers = built(config)
        infos = model_state.info(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
        batch = packed_batch(8, 10, config.vocab_size)
        run = loss_and_grads(graphdef, DROPOUT_SEED)
        return config, params, buffers, infos, batch, jax.device_get(jit(run)(params, buffers, batch))


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow(always=n in ("tensor", "time"))) for n in MESHES])
def test_sharded_equals_one_device(one_device, name, x64):
    config, params, buffers, infos, batch, ((want, want_parts), want_grads) = one_device
    if name == "mixed":  # the kernels that run by default, in one of the meshes
        config = dataclasses.replace(config, implementation=None)
    graphdef = model_state.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))[0]
    devices = mesh.make_mesh(MESHES[name])
    with axes.use(devices):
        put = {p: jax.device_put(a, axes.parameter_sharding(a.shape, infos[p], mesh=devices, name=p)) for p, a in params.items()}
        rows = {n: jax.device_put(a, jax.sharding.NamedSharding(devices, axes.spec(("batch", "seq")))) for n, a in batch.items()}
        (got, parts), grads = jit(loss_and_grads(graphdef, DROPOUT_SEED))(put, buffers, rows)
    split = [p for p, a in put.items() if not a.sharding.is_fully_replicated]
    assert name in ("data", "time") or len(split) > len(put) // 3, "the mesh does not split the parameters"
    assert_close("total", got, want, rel=1e-12)
    assert_trees_close(parts, want_parts, rel=1e-10)
    assert_trees_close(grads, want_grads, rel=1e-10)


def unrolled(stacked, names_stacked, names_unrolled):
    """Arrays by path of a scanned model, as those of the unrolled one, through the canonical names."""
    return {
        path: np.asarray(stacked[names_stacked[name][0]])[() if names_stacked[name][1] is None else names_stacked[name][1]]
        for name, (path, _) in names_unrolled.items()
        if names_stacked[name][0] in stacked
    }


@pytest.fixture(scope="module")
def unrolled_run():
    """What the scanned forms must equal: (config, params of the scanned model, names, values, gradients by unrolled path)."""
    with jax.enable_x64(True):
        config = all_kinds_config(repeats=2, dropout=0.1, implementation="reference")
        flat = dataclasses.replace(config, scan_layers=False)
        names = [model_state.manifest(nnx.eval_shape(lambda c=c: Decoder(c, rngs=nnx.Rngs(0)))) for c in (config, flat)]
        _, params, buffers = built(config)
        graphdef = model_state.split(nnx.eval_shape(lambda: Decoder(flat, rngs=nnx.Rngs(0))))[0]
        batch = packed_batch(2, 7, config.vocab_size)
        inputs = unrolled(params, *names), unrolled(buffers, *names), batch
        return config, params, buffers, names, batch, jax.device_get(jit(loss_and_grads(graphdef, DROPOUT_SEED))(*inputs))


@pytest.mark.parametrize(
    "remat, implementation",
    [pytest.param("full", "reference", marks=pytest.mark.slow(always=True))]
    + [pytest.param(*case, marks=pytest.mark.slow) for case in (("none", "reference"), ("dots", "reference"), ("dots_no_batch", "xla"))],
)
def test_scanned_equals_unrolled(unrolled_run, remat, implementation, x64):
    config, params, buffers, names, batch, ((want, want_parts), want_grads) = unrolled_run
    assert all(np.ptp(params[path].sum(axis=tuple(range(1, params[path].ndim)))) > 0 for path in params if "mixer.w" in path)
    config = dataclasses.replace(config, remat=remat, implementation=implementation)
    graphdef = model_state.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))[0]
    (got, parts), grads = jit(loss_and_grads(graphdef, DROPOUT_SEED))(params, buffers, batch)
    assert_close("total", got, want, rel=1e-13)
    assert_trees_close(parts, want_parts, rel=1e-11)
    assert_trees_close(unrolled(grads, *names), want_grads, rel=1e-11)
    for path, gradient in grads.items():
        per_layer = np.abs(gradient).reshape(gradient.shape[0], -1) if path.startswith("segments") else np.abs(gradient).reshape(1, -1)
        assert np.all(np.isfinite(per_layer)) and np.all(per_layer.max(axis=1) > 0), f"{path}: a layer without a gradient"


def test_same_initial_values_scanned_and_unrolled():
    config = ModelConfig(vocab_size=20, d_model=16, num_layers=3, mixers={"attention": {"num_heads": 2}}, channels={"mlp": {"hidden": 24}})
    configs = [dataclasses.replace(config, scan_layers=scan) for scan in (True, False)]
    builds = [lambda c=c: Decoder(c, rngs=nnx.Rngs(7)) for c in configs]
    names = [model_state.manifest(nnx.eval_shape(build)) for build in builds]
    assert names[0].keys() == names[1].keys()
    scanned, want = jax.device_get(jit(lambda: [model_state.split(build())[1] for build in builds])())
    got = unrolled(scanned, *names)
    assert all(np.array_equal(got[p], want[p]) for p in want)
    layers = [want[p] for p in want if p.endswith("mixer.wq")]
    assert not any(a.shape == b.shape and np.array_equal(a, b) for i, a in enumerate(layers) for b in layers[:i]), "two layers start equal"


@pytest.mark.slow(always=True)
def test_dropout_depends_on_layer_site_and_key(x64):
    """With a key the loss changes, with another key it changes again; without one, dropout is off."""
    config = all_kinds_config(dropout=0.5, implementation="reference")
    graphdef, params, buffers = built(config)
    batch = packed_batch(2, 7, config.vocab_size)

    @jit
    def ce_sum(params, buffers, batch, key):
        return model_state.merge(graphdef, params, buffers).loss(batch, key=key).ce_sum

    off, first, same, second = (float(ce_sum(params, buffers, batch, key)) for key in (None, *map(jax.random.key, (0, 0, 1))))
    assert first == same and len({off, first, second}) == 3


def cases_of(kinds, table, pattern):
    return [pytest.param({table: {c.values[0]: c.values[1]}, pattern: (c.values[0],)}, id=c.id) for c in kinds]


@pytest.mark.parametrize("fields", cases_of(MIXER_CASES, "mixers", "pattern") + cases_of(CHANNEL_CASES, "channels", "channel"))
def test_config_round_trip_and_parameter_count(fields):
    mapping = {"vocab_size": 50, "d_model": 32, "num_layers": 3, **fields}
    config = ModelConfig.from_mapping(mapping)
    as_json = json.loads(json.dumps(dataclasses.asdict(config), default=dict))
    for again in (ModelConfig.from_mapping(dataclasses.asdict(config)), ModelConfig.from_mapping(as_json), ModelConfig(**mapping)):
        assert again == config and hash(again) == hash(config)
    for extra in ({}, {"tie_embeddings": True, "norm": "layernorm"}, {"norm_position": "sandwich", "residual": "parallel"}):
        varied = dataclasses.replace(config, **extra)
        model = nnx.eval_shape(lambda c=varied: Decoder(c, rngs=nnx.Rngs(0)))
        assert cost(varied, 16).params == model_state.num_params(model)
        assert cost(varied, 16).param_bytes == sum(a.size * a.dtype.itemsize for a in model_state.split(model)[1].values())


@pytest.mark.parametrize("max_len", [3, 40])
def test_state_bytes_are_those_of_the_state(max_len):
    for compute_dtype in ("float32", "bfloat16"):
        config = all_kinds_config(repeats=2, param_dtype="float32", compute_dtype=compute_dtype)
        state = jax.eval_shape(lambda c=config: Decoder(c, rngs=nnx.Rngs(0)).init_state(3, max_len))
        actual = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state))
        assert actual == 3 * cost(config, max_len).decode_state_bytes


FLOPS_CASES = [
    ("attention", {"num_heads": 4}, "mlp", {}),
    ("attention", {"num_heads": 4, "num_kv_heads": 2, "window": 8, "bias": True}, "mlp", {"activation": "gelu"}),
    ("retention", {"num_heads": 2}, "mlp", {"hidden": 100, "activation": "relu2"}),
    ("retention", {"num_heads": 2, "chunk": 16, "value_dim": 40, "gate": False}, "mlp", {"hidden": 100}),
    ("attention", {"num_heads": 2}, "moe", {"num_experts": 3, "top_k": 2, "hidden": 48, "shared_experts": 1}),
    ("attention", {"num_heads": 2}, "moe", {"num_experts": 6, "top_k": 2, "hidden": 16, "shared_experts": 1, "bias": True}),
]


FLOPS_CASES += [(kind, {}, "mlp", {}) for kind in MIXERS if kind not in {case[0] for case in FLOPS_CASES}]
FLOPS_CASES += [("attention", {}, kind, {}) for kind in CHANNELS if kind not in {case[2] for case in FLOPS_CASES}]


@pytest.mark.parametrize("mixer, mixer_fields, channel, channel_fields", FLOPS_CASES)
def test_flops_counted_are_flops_compiled(mixer, mixer_fields, channel, channel_fields):
    T = 64
    config = ModelConfig(
        vocab_size=256, d_model=128, num_layers=1, pattern=(mixer,), mixers={mixer: mixer_fields}, channel=(channel,),
        channels={channel: channel_fields}, scan_layers=False, implementation=FLOPS_IMPLEMENTATION.get(mixer, "reference"),
    )  # fmt: skip
    graphdef, params, buffers = model_state.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    tokens = jax.ShapeDtypeStruct((1, T), jnp.int32)
    forward = jax.jit(lambda p, b, tokens: model_state.merge(graphdef, p, b)(tokens)).lower(params, buffers, tokens)
    compiled = forward.compile().cost_analysis()["flops"]
    counted = cost(config, T).dense_prefill_flops_per_token * T
    # The count is of matmuls; norms, rotations, softmax and activations are at most 4 % of them at this size.
    assert 0.999 * counted <= compiled <= 1.04 * counted, compiled / counted
    if channel == "moe":
        return
    state = jax.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)).init_state(1, T))
    step = jax.jit(lambda p, b, token, state: model_state.merge(graphdef, p, b).step(token, state))
    compiled = step.lower(params, buffers, jax.ShapeDtypeStruct((1,), jnp.int32), state).compile().cost_analysis()["flops"]
    counted = cost(config, T - 1).decode_flops_per_token
    assert 0.999 * counted <= compiled <= 1.05 * counted, compiled / counted

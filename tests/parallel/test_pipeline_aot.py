"""Pipelines compiled for TPU v4: what each stage holds, and what travels. Letters: M micro-batches, B batch, T time."""
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from effmodels.config import ModelConfig
from effmodels.models import Decoder
from effmodels.models import state as model_state
from effmodels.parallel import axes, options
from effmodels.plan import topology

pytestmark = pytest.mark.aot


def compiled(config, devices, batch_shape, rounds=1):
    """The program of the loss and all gradients, and the bytes of its parameters: (compiled, {path: (bytes, bytes on one device)})."""
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    graphdef, params, buffers = model_state.split(model)
    infos, sizes = model_state.info(model), {}
    with axes.use(devices, None, options.Options(rounds=rounds)):
        for path, a in params.items():
            place = axes.parameter_sharding(a.shape, infos[path], mesh=devices, name=path)
            params[path] = jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place)
            sizes[path] = a.dtype.itemsize * np.array([a.size, np.prod(place.shard_shape(a.shape))])
        rows = NamedSharding(devices, PartitionSpec(None, *axes.spec(("batch", "seq"), mesh=devices)))
        tokens = jax.ShapeDtypeStruct(batch_shape, jnp.int32, sharding=rows)
        batch = {"tokens": tokens, "targets": tokens, "segment_ids": tokens}

        def loss(params, batch):
            return model_state.merge(graphdef, params, buffers).loss(batch).total_sum

        with topology._no_cache():
            return jax.jit(jax.grad(loss)).lower(params, batch).compile(), sizes


def neighbours(text):
    """The distances (target - source) of every collective permute, as sets of device numbers."""
    found = []
    for pairs in re.findall(r"collective-permute(?:-start)?\(.*source_target_pairs=\{(\{.*?\})\}", text):
        found.append({int(b) - int(a) for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs)})
    return found


def mesh_of(chips, **sizes):
    chips = np.array(chips[: np.prod(list(sizes.values()))]).reshape(*sizes.values())
    return Mesh(chips, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def test_fifteen_stages_of_eight_layers():
    """120 layers over 15 stages with 8-way tensor parallelism, as GPT-4 is reported to have been laid out, on 120 chips of a v4 slice."""
    topology.quiet_environment()
    chips = topologies.get_topology_desc(platform="tpu", topology_name="v4:4x4x8", chip_config_name="megacore").devices
    config = ModelConfig(
        vocab_size=1024, d_model=512, num_layers=120, mixers={"attention": {"num_heads": 8}}, channels={"mlp": {"hidden": 2048}},
        compute_dtype="bfloat16", remat="full",
    )  # fmt: skip
    program, sizes = compiled(config, mesh_of(chips, stage=15, tensor=8), (30, 1, 256))
    text, memory = program.as_text(), program.memory_analysis()
    layers = {path: n for path, n in sizes.items() if path.startswith("segments")}
    held = sum(local for _, local in layers.values())
    for path, (whole, local) in layers.items():
        assert local * 15 * (1 if "norm" in path else 8) == whole, path
    rest = sum(local for path, (_, local) in sizes.items() if path not in layers)
    assert held + rest <= memory.argument_size_in_bytes <= 1.03 * (held + rest), "a stage is given its own layers and nothing of the others"
    assert memory.temp_size_in_bytes < 8 * held, "the layers of other stages are gathered"
    distances = neighbours(text)
    assert len(distances) >= 6 and all(d in ({8, 8 - 120}, {-8, 120 - 8}) for d in distances), distances
    assert "all-gather" not in text and text.count("tpu_custom_call") >= 2


HYBRID = {
    "pattern": ("attention", "retention"), "channel": ("mlp", "moe"),
    "mixers": {"attention": {"num_heads": 4}, "retention": {"num_heads": 4}},
    "channels": {"moe": {"num_experts": 4, "top_k": 2, "hidden": 256}},
}  # fmt: skip


@pytest.mark.parametrize("rounds, remat", [(1, "none"), (2, "full")])
def test_kernels_in_a_stage(rounds, remat):
    """Attention, retention and experts, each with its kernel, inside the stages of a circular and of a plain pipeline."""
    config = ModelConfig(vocab_size=1000, d_model=256, num_layers=8, compute_dtype="bfloat16", remat=remat, **HYBRID)
    program, _ = compiled(config, topology.mesh("v4", stage=2, data=2, tensor=2), (4, 2, 200), rounds)
    assert program.as_text().count("tpu_custom_call") >= 8


@pytest.mark.parametrize("remat", ["none", "full"])
def test_memory_of_a_micro_batch(remat):
    """Short micro-batches and wide layers: a tick keeps activations, and with full rematerialisation only its input; never the weights."""
    B, T, D, F, per = 1, 64, 1024, 4096, 2
    config = ModelConfig(
        vocab_size=1000, d_model=D, num_layers=8, mixers={"attention": {"num_heads": 8}}, channels={"mlp": {"hidden": F}},
        compute_dtype="bfloat16", remat=remat,
    )  # fmt: skip
    few, many = (compiled(config, topology.mesh("v4", stage=2, tensor=2), (m, B, T), 2)[0].memory_analysis() for m in (2, 8))
    growth = (many.temp_size_in_bytes - few.temp_size_in_bytes) / (6 * 2)  # per tick
    weights = per * (4 * D * D + 3 * D * F) // 2 * 2  # of one call, over two chips, bfloat16
    state = B * T * D * 2
    # The input, and a share of the two queues and of their gradients.
    assert growth <= (3 * state if remat == "full" else 0.6 * weights), (growth, weights, state)

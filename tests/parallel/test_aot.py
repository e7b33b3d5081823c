"""Each op, and a whole model, compiled for TPU v4 chips inside a sharded, scanned, rematerialised program, with their kernels in it.

A Pallas kernel under an automatic mesh compiles nowhere, which interpretation on a CPU hides.
"""
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from effmodels.config import ModelConfig
from effmodels.models import Decoder
from effmodels.parallel import axes, ops
from effmodels.parallel.expert import expert_ffn
from effmodels.plan import topology

pytestmark = pytest.mark.aot
B, T, N, H, D, V, E = 4, 200, 4, 64, 256, 1000, 4
LAYERS = 3


def attention(x_BTD, w):
    q_BTNH = x_BTD.reshape(B, T, N, H) * w[0, 0]
    return ops.attention(q_BTNH, q_BTNH[:, :, :2], q_BTNH[:, :, 2:], segment_ids=jnp.ones((B, T), jnp.int32)).reshape(B, T, D)


def retention(x_BTD, w):
    q_BTNH, log_decay_N = x_BTD.reshape(B, T, N, H) * w[0, 0], jnp.log(jnp.linspace(0.9, 0.99, N))
    return ops.retention(q_BTNH, q_BTNH, q_BTNH, log_decay_N, segment_ids=jnp.ones((B, T), jnp.int32)).reshape(B, T, D)


def experts(x_BTD, w):
    ids_BTk = jnp.stack([jnp.arange(T) % E, (jnp.arange(T) + 1) % E], -1)[None] * jnp.ones((B, 1, 1), jnp.int32)
    weights_BTk = jnp.full(ids_BTk.shape, 0.5, x_BTD.dtype)
    w_EDF = jnp.broadcast_to(w, (E, *w.shape))
    return expert_ffn(x_BTD, ids_BTk, weights_BTk, (w_EDF,), w_EDF.swapaxes(1, 2), lambda a: jax.nn.gelu(a))


def cross_entropy(x_BTD, w):
    loss_BT, _ = ops.linear_cross_entropy(x_BTD, jnp.tile(w, (1, 4))[:, :V], jnp.ones((B, T), jnp.int32), w_layout="DV")
    return x_BTD * loss_BT[..., None].astype(x_BTD.dtype)


OPS = {"attention": attention, "retention": retention, "grouped_matmul": experts, "linear_cross_entropy": cross_entropy}


@pytest.fixture(scope="module")
def mesh():
    return topology.mesh("v4", data=2, fsdp=2, tensor=2)


def compiled(f, mesh, *shapes, dims):
    with axes.use(mesh):
        places = [NamedSharding(mesh, axes.spec(d, mesh=mesh)) for d in dims]
        return jax.jit(f).lower(*(jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p) for s, p in zip(shapes, places))).compile().as_text()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("op", OPS)
def test_op_in_a_sharded_scanned_rematerialised_program(op, dtype, mesh):
    def loss(x_BTD, w_LDD):
        layer = jax.checkpoint(lambda x, w: (x + OPS[op](x, w), None))
        return jax.lax.scan(layer, x_BTD, w_LDD)[0].astype(jnp.float32).sum()

    shapes = jax.ShapeDtypeStruct((B, T, D), dtype), jax.ShapeDtypeStruct((LAYERS, D, D), dtype)
    text = compiled(jax.grad(loss, (0, 1)), mesh, *shapes, dims=(("batch", "seq", None), (None, None, None)))
    assert text.count("tpu_custom_call") >= 2, "the kernels of the forward and the backward pass are not in the program"


@pytest.mark.parametrize("generation", ["v4", "v6e"])
def test_a_model_trains_with_the_kernels(generation):
    """One period of attention and retention with a mixture of experts: loss and every gradient, compiled for eight chips."""
    mesh = topology.mesh(generation, data=2, fsdp=2, tensor=2)
    config = ModelConfig(
        vocab_size=1000, d_model=256, num_layers=4, pattern=("attention", "retention"), channel=("mlp", "moe"),
        mixers={"attention": {"num_heads": 4, "num_kv_heads": 2, "window": 64}, "retention": {"num_heads": 4}},
        channels={"moe": {"num_experts": 4, "top_k": 2}}, remat="full", compute_dtype="bfloat16",
    )  # fmt: skip
    with axes.use(mesh):
        model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
        graph, state = nnx.split(model)
        shape = jax.ShapeDtypeStruct((4, 200), jnp.int32, sharding=NamedSharding(mesh, axes.spec(("batch", "seq"), mesh=mesh)))
        batch = {"tokens_BT": shape, "targets_BT": shape, "segment_ids_BT": shape}

        def loss(params, batch):
            weights = {"weights_BT": jnp.ones(batch["tokens_BT"].shape, jnp.float32)}
            return nnx.merge(graph, params).loss({**batch, **weights}).ce_sum

        text = jax.jit(jax.grad(loss, allow_int=True)).lower(state, batch).compile().as_text()
    assert text.count("tpu_custom_call") >= 8

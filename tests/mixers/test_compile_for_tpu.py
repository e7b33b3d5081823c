"""The new mixers in scanned, rematerialised layers whose rows are split, compiled for eight TPU v4 chips with their kernels in it."""
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from effmodels.config import ModelConfig
from effmodels.models import Decoder
from effmodels.parallel import axes
from effmodels.plan import topology

pytestmark = pytest.mark.aot
MIXERS = {  # fields, kernels at the least
    "lightning": ({"num_heads": 4, "norm_groups": 2}, 2),
    "local_global": ({"num_heads": 4, "num_kv_heads": 2, "window": 64, "globals": "top", "top_block": 32, "gate": True}, 4),
    "topk_sparse": ({"num_heads": 4, "num_kv_heads": 2, "top_k": 32}, 0),  # gathers in plain XLA
}


@pytest.mark.parametrize("kind", MIXERS)
def test_a_model_trains(kind):
    mesh = topology.mesh("v4", data=2, seq=2, tensor=2)
    fields, kernels = MIXERS[kind]
    config = ModelConfig(
        vocab_size=1024, d_model=256, num_layers=2, pattern=(kind,), mixers={kind: fields}, remat="full", compute_dtype="bfloat16"
    )
    with axes.use(mesh):
        graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
        shape = jax.ShapeDtypeStruct((4, 512), jnp.int32, sharding=NamedSharding(mesh, axes.spec(("batch", "seq"), mesh=mesh)))

        def loss(params, batch):
            return nnx.merge(graph, params).loss(batch).ce_sum

        batch = {"tokens_BT": shape, "targets_BT": shape, "segment_ids_BT": shape}
        text = jax.jit(jax.grad(loss, allow_int=True)).lower(state, batch).compile().as_text()
    assert text.count("tpu_custom_call") >= kernels

"""What travels over each mesh axis in the program for TPU v4 chips: as many bytes as the formulas say and no more."""
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from effmodels.config import ModelConfig
from effmodels.models import Decoder
from effmodels.models import state as model_state
from effmodels.parallel import axes
from effmodels.plan import topology
from effmodels.plan.compiled.collectives import collectives, sent_by_axes

pytestmark = pytest.mark.aot
B, T, D, L = 8, 512, 2048, 4  # wide enough that XLA does not join the reductions of small matrices


def gradients(mesh, rules=None, **fields):
    """(collectives of loss and gradients of a decoder on this mesh, number of parameters)."""
    config = ModelConfig(
        vocab_size=1024, d_model=D, num_layers=L, mixers={"attention": {"num_heads": 16}}, compute_dtype="bfloat16", remat="full",
        tie_embeddings=True, **fields,
    )  # fmt: skip
    with axes.use(mesh, rules):
        model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
        graph, params, _ = model_state.split(model)
        infos = model_state.info(model)
        places = {p: axes.parameter_sharding(a.shape, infos[p], mesh=mesh, rules=axes.current_rules()) for p, a in params.items()}
        params = {p: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=places[p]) for p, a in params.items()}
        tokens = jax.ShapeDtypeStruct((B, T), jnp.int32, sharding=NamedSharding(mesh, axes.spec(("batch", "seq"), mesh=mesh)))

        def loss(params, tokens):
            return model_state.merge(graph, params, {}).loss({"tokens": tokens, "targets": tokens}).ce_sum

        compiled = jax.jit(jax.grad(loss), out_shardings=places).lower(params, tokens).compile()
    return collectives(compiled, mesh), sum(a.size for a in params.values())


def test_fsdp_sends_three_times_the_parameters_and_never_gathers_a_stack():
    """ZeRO-3 with full remat (arXiv:1910.02054): bfloat16 weights gathered forward and again backward, gradients scattered once."""
    found, parameters = gradients(topology.mesh("v4", fsdp=4))
    sent = sent_by_axes(found)
    assert set(axes for axes, _ in sent) == {("fsdp",)}
    gathered, scattered = sent[("fsdp",), "all-gather"], sent[("fsdp",), "reduce-scatter"]
    assert gathered == pytest.approx(2 * 2 * 3 / 4 * parameters, rel=0.01)
    assert gathered + scattered == pytest.approx(3 * 2 * 3 / 4 * parameters, rel=0.02)
    assert sent.get((("fsdp",), "all-reduce"), 0) < 1e-3 * scattered, "gradients of matrices are scattered, not summed on every device"
    largest = max(c.size for c in found if c.kind == "all-gather")
    assert largest <= 2 * D * 8 * D // 3 * 1.05, "one matrix of one layer at a time"


@pytest.mark.slow
def test_data_parallel_gradients_are_summed_once():
    """Ring all-reduce: 2 (n - 1) / n of what is summed; layers in bfloat16 while they are scanned, the embedding in float32."""
    found, parameters = gradients(topology.mesh("v4", data=4))
    sent = sum(c.sent for c in found)
    assert {c.axes for c in found} == {("data",)} and not [c for c in found if c.kind == "all-gather"]
    assert 2 * 3 / 4 * 2 * parameters * 0.99 <= sent <= 2 * 3 / 4 * 4 * parameters


@pytest.mark.slow
@pytest.mark.parametrize(
    "rules, reduced", [(None, "all-reduce"), ({"res_seq": "seq,tensor"}, "reduce-scatter")], ids=["tensor", "and sequence-parallel norms"]
)
def test_tensor_parallel_sends_activations_only(rules, reduced):
    """Two sums of [B, T, D] per layer and direction (arXiv:1909.08053); with the residual stream split (arXiv:2205.05198) gathered and
    scattered instead, and never a weight."""
    found, _ = gradients(topology.mesh("v4", tensor=4), rules)
    activations = 2 * B * T * D
    layers = [c for c in found if c.times == L]
    assert layers and all(c.size <= 2 * activations for c in layers)
    assert any(c.kind == reduced for c in layers)
    each = sum(c.sent for c in layers) / L / activations
    # A sum is a gather and a scatter, 3/4 of the array each. Two sums forward, recomputed and backward; the backward pass may gather the
    # two inputs once more.
    assert each <= (3 * 2 * 2 + 2) * 3 / 4

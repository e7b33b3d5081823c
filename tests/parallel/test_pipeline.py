"""A model over pipeline stages equals the same model on one device that adds up its micro-batches: loss, every gradient, dropout, loads.

float64, so that a wrong sum cannot hide in rounding. Letters: M micro-batches, B batch, T time, p stages.
"""
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from configs import quickstart
from effmodels.config import ConfigError, ModelConfig
from effmodels.models import Decoder
from effmodels.models import state as model_state
from effmodels.parallel import axes, mesh, options, pipeline
from effmodels.train import metrics, optim
from effmodels.train.loop import train
from effmodels.train.restore import load_run
from effmodels.train.setup import Setup
from effmodels.train.state import TrainState
from effmodels.train.step import make_step
from tests.contract.cases import draw, fill, jit, packed_batch
from tests.numerics import assert_close, assert_trees_close

B, T, VOCAB = 2, 5, 30
SHAPES = [(p, r, m) for p in (2, 4) for r in (1, 2) for m in (1, p, 2 * p + 1)]


@pytest.mark.parametrize("stages", range(1, 6))
@pytest.mark.parametrize("rounds", range(1, 5))
def test_schedule(stages, rounds):
    """Every micro-batch passes every block in order, one tick or more apart; the idle slots are the bubble share."""
    for micro_batches in range(1, 14):
        plan = pipeline.schedule(stages, micro_batches, rounds)
        seen = {m: [] for m in range(micro_batches)}
        for t, s in zip(*np.nonzero(plan.micro_ts != pipeline.BUBBLE)):
            seen[plan.micro_ts[t, s]].append((plan.round_ts[t, s] * stages + s, t))
        for visits in seen.values():
            assert [block for block, _ in visits] == list(range(stages * rounds))
        idle = np.mean(plan.micro_ts == pipeline.BUBBLE)
        assert idle == pytest.approx(pipeline.bubble_share(stages, micro_batches, rounds), abs=1e-12)
        if micro_batches >= stages or rounds == 1:
            assert idle == pytest.approx((stages - 1) / (micro_batches * rounds + stages - 1), abs=1e-12)
        assert plan.delay_t.max() < stages, "stage 0 keeps fewer micro-batches than there are stages"
        entering = sorted(plan.entering_Ks.T.ravel().tolist())
        assert entering[:1] + sorted(set(entering)) == [0, *range(micro_batches)]
        assert sorted(plan.leaving_Ks[plan.leaving_Ks >= 0].tolist()) == list(range(micro_batches))


def config_of(layers, **fields):
    defaults = {
        "vocab_size": VOCAB, "d_model": 8, "num_layers": layers, "mixers": {"attention": {"num_heads": 2}},
        "channels": {"mlp": {"hidden": 12}}, "param_dtype": "float64", "compute_dtype": "float64", "implementation": "reference",
    }  # fmt: skip
    return ModelConfig(**{**defaults, **fields})


def micro_batches(count, time=T):
    return {n: a.reshape(count, B, time) for n, a in packed_batch(count * B, time, VOCAB).items()}


def keys_of(count):
    return jax.vmap(lambda m: jax.random.fold_in(jax.random.key(3, impl="threefry2x32"), m))(jnp.arange(count))


def sums(graphdef):
    """(params, buffers, batch, key) -> ((total, everything that is reported), gradients)."""

    def total(params, buffers, batch, key):
        out = model_state.merge(graphdef, params, buffers).loss(batch, key=key)
        return out.total_sum, out

    return jit(jax.value_and_grad(total, has_aux=True))


def unpipelined(graphdef, params, buffers, batch, keys):
    one, results = sums(graphdef), []
    for m in range(batch["tokens"].shape[0]):
        results.append(jax.device_get(one(params, buffers, {n: a[m] for n, a in batch.items()}, None if keys is None else keys[m])))
    return jax.tree.map(lambda *a: sum(a), *results)


def pipelined(config, sizes, rounds, params, buffers, batch, keys, rules=None):
    graphdef = model_state.split(abstract(config))[0]
    infos, devices = model_state.info(abstract(config)), mesh.make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])
    with axes.use(devices, rules, options.Options(rounds=rounds)):
        put = {p: jax.device_put(a, axes.parameter_sharding(a.shape, infos[p], mesh=devices, name=p)) for p, a in params.items()}
        rows = NamedSharding(devices, PartitionSpec(None, *axes.spec(("batch", "seq"))))
        return sums(graphdef)(put, buffers, {n: jax.device_put(a, rows) for n, a in batch.items()}, keys)


def abstract(config):
    return nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))


def assert_same(got, want):
    """Everything to 1e-11; what is computed in float32 (loads' statistics) to its rounding."""
    assert_trees_close(_of(got, jnp.float64), _of(want, jnp.float64), rel=1e-11)
    assert_trees_close(_of(got, jnp.float32), _of(want, jnp.float32), rel=1e-6)


def _of(tree, dtype):
    flat = jax.tree_util.tree_flatten_with_path(jax.device_get(tree))[0]
    return {jax.tree_util.keystr(path): a for path, a in flat if a.dtype == dtype}


@pytest.fixture(scope="module")
def twin():
    """(config, params, buffers, {M: values and gradients without a mesh}) of eight layers with dropout."""
    with jax.enable_x64(True):
        config = config_of(8, dropout=0.1)
        graphdef, params, buffers = fill(lambda: Decoder(config, rngs=nnx.Rngs(0)))
        most = max(m for *_, m in SHAPES)
        batch, keys, one, want = micro_batches(most), keys_of(most), sums(graphdef), {}
        results = [jax.device_get(one(params, buffers, {n: a[m] for n, a in batch.items()}, keys[m])) for m in range(most)]
        for m in range(1, most + 1):
            want[m] = jax.tree.map(lambda *a: sum(a), *results[:m])
        return config, params, buffers, batch, keys, want


FAST = [(4, 1, 4)]


@pytest.mark.parametrize("stages, rounds, count", [pytest.param(*s, marks=[] if s in FAST else pytest.mark.slow) for s in SHAPES])
def test_stages_equal_accumulation(twin, stages, rounds, count, x64):
    config, params, buffers, batch, keys, want = twin
    remat = "full" if rounds == 2 else "none"
    batch = {n: a[:count] for n, a in batch.items()}
    got = pipelined(dataclasses.replace(config, remat=remat), {"stage": stages}, rounds, params, buffers, batch, keys[:count])
    assert_same(got, want[count])
    assert not got[1]["segments.0.blocks.0.mixer.wq"].sharding.is_fully_replicated, "gradients stay with their stage"


HYBRID = {
    "pattern": ("retention", "attention"), "channel": ("mlp", "moe"),
    "mixers": {"attention": {"num_heads": 2, "window": 2}, "retention": {"num_heads": 2}},
    "channels": {"mlp": {"hidden": 12}, "moe": {"num_experts": 4, "top_k": 2, "hidden": 8, "z_coef": 1e-2, "bias_update_rate": 1e-3}},
    "z_loss": 1e-3,
}  # fmt: skip
UNEVEN = HYBRID | {"prefix": (("attention", "moe"),) * 2, "suffix": (("retention", "mlp"),)}
EXPERTS = {"channel": ("moe",), "channels": {"moe": {"num_experts": 4, "top_k": 2, "hidden": 8, "activation": "gelu"}}}
COMPOSED = {
    "hybrid, data, tensor": ({"stage": 2, "data": 2, "tensor": 2}, 1, 3, config_of(4, dropout=0.1, **HYBRID)),
    "prefix, suffix, fsdp, tensor": ({"stage": 2, "fsdp": 2, "tensor": 2}, 1, 3, config_of(7, dropout=0.1, remat="full", **UNEVEN)),
    "rounds, fsdp, tensor": ({"stage": 2, "fsdp": 2, "tensor": 2}, 2, 3, config_of(8, remat="dots", **HYBRID)),
    "seq": ({"stage": 2, "seq": 2}, 1, 2, config_of(4, **HYBRID)),
    "expert": ({"stage": 2, "expert": 2}, 1, 2, config_of(4, **HYBRID)),
    "kernels": ({"stage": 2, "data": 2}, 1, 2, config_of(4, **HYBRID | {"implementation": None})),
    "seq, tensor, expert: as gpt4_moe_1p8t": ({"stage": 2, "expert": 2, "tensor": 2}, 2, 3, config_of(4, remat="full", **EXPERTS)),
}
# Its residual stream is split between the matmuls of a tensor axis, its dense weights over the experts' axis (docs/plans).
RULES = {"seq, tensor, expert: as gpt4_moe_1p8t": {"res_seq": "seq,tensor", "embed": "fsdp,expert", "priority": "expert"}}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPOSED)
def test_composed(name, x64):
    sizes, rounds, count, config = COMPOSED[name]
    batch, keys = micro_batches(count, 8 if "seq" in name else T), keys_of(count) if config.dropout else None
    graphdef, params, buffers = fill(lambda: Decoder(dataclasses.replace(config, implementation="reference"), rngs=nnx.Rngs(0)))
    want = unpipelined(graphdef, params, buffers, batch, keys)
    assert_same(pipelined(config, sizes, rounds, params, buffers, batch, keys, RULES.get(name)), want)


def test_a_step_equals_the_accumulated_step(x64):
    """The optimiser's step of a pipelined run: sums, dropout keys, norms and parameters are those of the scan over micro-batches."""
    config = config_of(4, dropout=0.1, remat="full")
    model = abstract(config)
    _, params, buffers = fill(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    infos, shapes = model_state.info(model), {p: a.shape for p, a in params.items()}
    optimizer = optim.make_optimizer({"name": "sgd", "lr": 0.1, "schedule": "constant", "clip": 0.5}, infos, shapes, 10)
    train_step = jit(make_step(model, optimizer, lambda step: 0.1, seed=5, accumulate_dtype="float64").train_step)
    state = TrainState(jnp.int32(3), params, buffers, optimizer.init(params))
    want = jax.device_get(train_step(state, micro_batches(3)))
    with axes.use(mesh.make_mesh({"stage": 2}, jax.devices()[:2])):
        got = train_step(state, micro_batches(3))
    assert np.ptp(params["embed"] - want[0].params["embed"]) > 0
    assert_same(got, want)


def test_evaluation_and_logits(x64):
    """Rows of one batch are micro-batches of an evaluation; logits come out in order."""
    config = config_of(4)
    graphdef, params, buffers = fill(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    batch = packed_batch(8, T, VOCAB)

    @jit
    def values(params, batch):
        model = model_state.merge(graphdef, params, buffers)
        out = model.loss(batch, mode="eval")
        return out.ce_sum, out.weight_sum, model(batch["tokens"], batch["segment_ids"])

    want = values(params, batch)
    with axes.use(mesh.make_mesh({"stage": 2, "data": 2}, jax.devices()[:4])):
        got = values(params, batch)
    assert_trees_close(jax.device_get(got), jax.device_get(want), rel=1e-12)


def test_decoding_folds_the_stages_into_the_batch(x64):
    config = config_of(4)
    graphdef, params, buffers = fill(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    tokens = packed_batch(4, T, VOCAB)["tokens"]

    @jit
    def decode(params, tokens):
        model = model_state.merge(graphdef, params, buffers)
        logits_BTV, state = model.prefill(tokens, model.init_state(4, T + 1))
        return logits_BTV, model.step(tokens[:, 0], state)[0]

    want, devices = decode(params, tokens), mesh.make_mesh({"stage": 2, "data": 2}, jax.devices()[:4])
    with axes.use(devices, axes.decode_rules()):
        assert axes.spec(("batch", "act_embed"))[0] == ("data", "fsdp", "expert", "stage") and axes.shards("stage") == 1
        infos = model_state.info(abstract(config))
        put = {p: jax.device_put(a, axes.parameter_sharding(a.shape, infos[p], mesh=devices)) for p, a in params.items()}
        got = decode(put, tokens)
    assert_trees_close(jax.device_get(got), jax.device_get(want), rel=1e-12)


@pytest.mark.parametrize("stages, rounds", [(2, 3), (4, 2), (6, 4), (8, 1)])
def test_interleaving_moves_every_block_to_its_stage(stages, rounds):
    a = draw(stages * rounds * 2, 3, dtype=np.float32)
    with axes.use(mesh.make_mesh({"stage": stages}, jax.devices()[:stages])):

        def f(a):
            out = pipeline.by_stage(a, ("layers", "norm"), stages, rounds)
            return jnp.sum(out * jnp.arange(out.size, dtype=jnp.float32).reshape(out.shape)), out

        (_, out), grad = jax.jit(jax.value_and_grad(f, has_aux=True))(a)
    want = a.reshape(rounds, stages, 2, 3).swapaxes(0, 1)
    assert np.array_equal(out, want)
    ranks = np.arange(a.size, dtype=np.float32).reshape(want.shape).swapaxes(0, 1).reshape(a.shape)
    assert np.array_equal(grad, ranks)


def test_indivisible_layers_are_refused():
    config = config_of(6, param_dtype="float32", compute_dtype="float32")
    with axes.use(mesh.make_mesh({"stage": 4, "data": 2}), None, options.Options(rounds=2)):
        with pytest.raises(ConfigError, match=r"layers 0 to 5: a period of 1, 6 times.*stage=4 x parallel.rounds=2.*repeat 8 times"):
            jax.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)).loss(micro_batches(2)))
    assert pipeline.choose([(0, 1, 2), (2, 2, 6), (14, 1, 1)], 3, 2) == 1
    with pytest.raises(ConfigError, match="no period of layers repeats"):
        pipeline.choose([(0, 1, 1), (1, 1, 1)], 2, 1)
    with pytest.raises(ConfigError, match=r"repeat 12 or 16 times \(24 or 32 layers\)"):
        pipeline.choose([(0, 2, 14)], 4, 1)


@pytest.fixture
def run_config(tmp_path):
    """Four steps of two micro-batches of the quickstart's small form, four layers."""
    (tmp_path / "source").mkdir()
    for i in range(40):
        (tmp_path / "source" / f"f{i}.py").write_text("\n".join(f"def f{j}(x):\n    return x * {j} + {i}" for j in range(40)))
    c = quickstart.get_config("test")
    c.data.paths, c.data.holdout, c.data.cache_dir = (str(tmp_path / "source"),), 0.2, str(tmp_path / "cache")
    c.model.channel, c.steps, c.optim.schedule, c.train.micro_batch_size = ("mlp", "moe"), 4, "constant", 2
    c.eval.every_steps, c.eval.sample_tokens, c.log.tensorboard = 2, 0, "off"
    return c


@pytest.mark.slow
def test_a_run_goes_on_in_stages_and_back(run_config, tmp_path):
    """Two steps on one device, two over stages: the losses are those of four on one device, and the result loads without stages."""
    train(run_config, tmp_path / "one", devices=jax.devices()[:1], log=lambda *_: None)
    run_config.steps = 2
    train(run_config, tmp_path / "both", devices=jax.devices()[:1], log=lambda *_: None)
    run_config.steps = 4
    run_config.mesh.stage = 2
    train(run_config, tmp_path / "both", devices=jax.devices()[:4], log=lambda *_: None)
    one, both = (metrics.read(tmp_path / name) for name in ("one", "both"))
    assert [r["step"] for r in one] == [r["step"] for r in both]
    for a, b in zip(one, both):
        for name in {"loss", "grad_norm", "eval_loss"} & set(a):
            assert_close(f"{name} at {a['step']}", b[name], a[name], rel=1e-4)
    params = [model_state.split(load_run(tmp_path / name, log=lambda *_: None)[0])[1] for name in ("one", "both")]
    for path in params[0]:
        assert_close(path, params[1][path], params[0][path], rel=1e-3)


def test_forms_that_a_pipeline_does_not_have_are_refused(run_config):
    run_config.mesh.stage, run_config.train.accumulation = 2, "loop"
    with pytest.raises(ConfigError, match=r"mesh.stage=2.*accumulation='loop'"):
        Setup(run_config, print, jax.devices()[:2])
    run_config.train.accumulation, run_config.model.param_dtype = "scan", "bfloat16"
    setup = Setup(run_config, print, jax.devices()[:2])
    with setup.context(), pytest.raises(ConfigError, match="summed over micro-batches in bfloat16"):
        jax.eval_shape(setup.functions.train_step, setup.abstract_state, setup.abstract_batch(16, 2))

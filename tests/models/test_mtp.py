"""Modules that predict further tokens against a twin written out document by document; names, cost, meshes and mistakes."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effmodels.config import ConfigError, ModelConfig
from effmodels.layers.context import Ctx
from effmodels.models import Decoder, cost
from effmodels.models import state as model_state
from effmodels.parallel import axes, layouts, mesh, options
from effmodels.verify import verify
from tests.contract.cases import fill, jit, packed_batch
from tests.numerics import assert_close, assert_trees_close
from tests.verify.cases import tiny

V, D, DEPTH = 13, 8, 2
CONFIG = ModelConfig(
    vocab_size=V, d_model=D, num_layers=3, pattern=("retention", "attention"), channel=("mlp",), suffix=(("attention", "moe"),),
    mixers={"attention": {"num_heads": 2}, "retention": {"num_heads": 2}}, embed_scale=1.5,
    channels={"mlp": {"hidden": 12}, "moe": {"num_experts": 3, "hidden": 4, "bias_update_rate": 1e-3, "router": "sigmoid"}},
    mtp={"depth": DEPTH, "weight": 0.3}, param_dtype="float64", compute_dtype="float64", implementation="reference",
)  # fmt: skip
FORMS = {"sequential": {}, "parallel": {"form": "parallel", "mixer": "retention", "channel": "mlp"}}


def config_of(form, **fields):
    return dataclasses.replace(CONFIG, mtp={"depth": DEPTH, "weight": 0.3, **FORMS[form]}, **fields)


def slow_losses(model, batch):
    """[depth] sums of weighted cross entropy: every document alone, without padding, every prediction on its own."""
    sums = [0.0] * DEPTH
    for b, segment in enumerate(batch["segment_ids"]):
        for document in range(1, segment.max() + 1):
            at = np.flatnonzero(segment == document)
            tokens, targets, weights = (batch[n][b, at] for n in ("tokens", "targets", "weights"))
            hidden, _ = model.hidden(tokens[None], positions_BT=np.arange(len(at))[None])
            for k, module in enumerate(model.mtp, start=1):
                if len(at) <= k:
                    break
                n = len(at) - k
                x = before = hidden[:, :n]
                if module.sequential:
                    embedded = model.embed[...][tokens[k:]][None] * model.config.embed_scale
                    x = jnp.concatenate([module.norm_embed(embedded), module.norm_hidden(before)], -1) @ module.w_join[...]
                y, _ = module.layer(x, Ctx(positions_BT=np.arange(n)[None]).at_layer(model.config.num_layers + k - 1))
                after = module.norm_out(y)
                hidden = after if module.sequential else hidden
                log_p = jax.nn.log_softmax(after[0] @ model.head[...])
                sums[k - 1] -= jnp.sum(weights[k:] * log_p[np.arange(n), targets[k:]])
    return sums


@pytest.mark.slow(always=True)
@pytest.mark.parametrize("form", ["sequential", "parallel"])
def test_losses_and_gradients_equal_documents_alone(form, x64):
    config = config_of(form)
    graphdef, params, buffers = fill(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    batch = packed_batch(1, 9, V)
    segment = batch["segment_ids"] = np.array([[1] * 5 + [2, 2, 3, 0]], np.int32)  # one long enough, two too short for all modules
    batch["weights"] = np.array([[1, 0.5, 0, 1, 0, 2, 0, 0, 0]], np.float32) * (segment > 0)

    def fast(params):
        out = model_state.merge(graphdef, params, buffers).loss(batch)
        return sum(out.aux.losses[f"mtp_{k}"] for k in (1, 2)), out

    def slow(params):
        sums = slow_losses(model_state.merge(graphdef, params, buffers), batch)
        return 0.3 / DEPTH * sum(sums), sums

    (got, out), gradients = jit(jax.value_and_grad(fast, has_aux=True))(params)
    (want, sums), want_gradients = jit(jax.value_and_grad(slow, has_aux=True))(params)
    assert_close("loss", got, want, rel=1e-12)
    for k in (1, 2):
        assert_close(f"module {k}", out.aux.losses[f"mtp_{k}"], 0.15 * sums[k - 1], rel=1e-12)
    assert_trees_close(gradients, want_gradients, rel=1e-9, floor=1e-9)
    assert all(np.any(np.asarray(g) != 0) for p, g in gradients.items() if p.startswith("mtp.")), "a parameter without a gradient"


def test_padding_at_document_ends_is_routed_nowhere(x64):
    """Expert loads of module k: the tokens with another one k later in their document, times the choices of each."""
    graphdef, params, buffers = fill(lambda: Decoder(CONFIG, rngs=nnx.Rngs(0)))
    batch = packed_batch(3, 9, V, seed=2)
    out = jit(lambda params: model_state.merge(graphdef, params, buffers).loss(batch))(params)
    segment, top_k = batch["segment_ids"], CONFIG.channels["moe"].get("top_k", 2)
    counted = [np.sum(segment > 0)] + [np.sum((segment[:, k:] == segment[:, :-k]) & (segment[:, k:] > 0)) for k in (1, 2)]
    np.testing.assert_array_equal(np.asarray(out.aux.load_LE).sum(-1), top_k * np.array(counted))
    model = model_state.merge(graphdef, params, buffers)
    moved = model.update_buffers(buffers, out.aux.load_LE)
    assert all(np.any(np.asarray(moved[f"mtp.{j}.layer.channel.bias"]) != 0) for j in range(DEPTH))


@pytest.mark.parametrize("form", FORMS)
def test_names_and_counts(form):
    config = config_of(form, param_dtype="float32", compute_dtype="float32")
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    plain = dataclasses.replace(config, mtp={})
    names = model_state.manifest(model)
    assert names["mtp.1.layer.mixer.wq"] == ("mtp.1.layer.mixer.wq", None) and ("mtp.0.w_join" in names) == (form == "sequential")
    counted, without = cost(config, 16), cost(plain, 16)
    assert counted.params == model_state.num_params(model) and counted.active_params > without.active_params
    assert counted.decode_flops_per_token == without.decode_flops_per_token
    assert counted.train_flops_per_token - without.train_flops_per_token > 3 * DEPTH * 2 * V * D
    drawn, before = jit(lambda: [model_state.split(Decoder(c, rngs=nnx.Rngs(3)))[1] for c in (config, plain)])()
    assert all(np.array_equal(drawn[path], a) for path, a in before.items()), "the modules change the draws of the model"


SPLIT = {"fsdp": 2, "tensor": 2}, {"data": 2, "seq": 2}


@pytest.mark.slow
@pytest.mark.parametrize("sizes, layout", [(SPLIT[0], "contiguous"), (SPLIT[1], "zigzag")], ids=str)
def test_sharded_equals_one_device(sizes, layout, x64):
    config = config_of("sequential", dropout=0.1, pattern=("attention",), mixers={"attention": {"num_heads": 2}}, vocab_size=14)
    graphdef, params, buffers = fill(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    infos = model_state.info(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    batch = packed_batch(4, 12, V, seed=2)

    def total(params, batch):
        out = model_state.merge(graphdef, params, buffers).loss(batch, key=jax.random.key(3, impl="threefry2x32"))
        return out.total_sum, out.aux.losses

    run = jax.value_and_grad(total, has_aux=True)
    want = jit(run)(params, batch)
    devices = mesh.make_mesh(sizes, jax.devices()[:4])
    with axes.use(devices, None, options.Options(layout=layout)):
        put = {p: jax.device_put(a, axes.parameter_sharding(a.shape, infos[p], mesh=devices, name=p)) for p, a in params.items()}
        rows = {n: layouts.to_layout(a, layout, sizes.get("seq", 1)) for n, a in batch.items()}
        got = jit(run)(put, rows)
    assert_trees_close(got, want, rel=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"stage": 2, "tensor": 2}, {"fsdp": 2, "seq": 2}, {"data": 4, "expert": 2}], ids=str)
def test_on_a_mesh_as_trained(sizes):
    config = tiny(sizes, num_layers=4, dropout=0.1, mtp={"depth": 2, "weight": 0.3})
    report = verify(config, log=print)
    assert report.passed, report.table()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"dept": 1}, "Did you mean 'depth'"),
        ({"depth": -1}, "model.mtp: expected depth >= 0 and weight >= 0, got depth=-1"),
        ({"depth": 1, "form": "serial"}, "model.mtp.form: unknown 'serial'"),
        ({"depth": 1, "mixer": "atention"}, "Did you mean 'attention'"),
    ],
)
def test_mistakes(fields, message):
    with pytest.raises(ConfigError, match=message):
        Decoder(dataclasses.replace(CONFIG, mtp=fields), rngs=nnx.Rngs(0))

"""The decoder: one loss, tied embeddings, initial variance, packing, mixed precision, and decoding with a state.

Letters: B batch, T time, V vocab, L MoE layers, E experts.
"""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effmodels.config import ConfigError, ModelConfig
from effmodels.models import Decoder
from effmodels.models import state as model_state
from effmodels.parallel import axes, mesh
from effmodels.parallel.options import Options
from tests.contract.cases import fill, jit, loss_and_grads, packed_batch
from tests.numerics import assert_close, assert_trees_close, relative_rms

HYBRID = ModelConfig(
    vocab_size=23, d_model=12, num_layers=2, pattern=("retention", "local"), channel=("mlp", "moe"),
    mixers={"retention": {"num_heads": 2, "chunk": 4}, "local": {"kind": "attention", "num_heads": 3, "num_kv_heads": 1, "window": 3}},
    channels={"mlp": {"hidden": 16}, "moe": {"num_experts": 3, "hidden": 8}},
    param_dtype="float64", compute_dtype="float64", implementation="reference",
)  # fmt: skip
TINY = ModelConfig(
    vocab_size=23, d_model=8, num_layers=1, mixers={"attention": {"num_heads": 2}}, channels={"mlp": {"hidden": 8}},
    param_dtype="float64", compute_dtype="float64",
)  # fmt: skip


def built(config, seed=1):
    return fill(lambda: Decoder(config, rngs=nnx.Rngs(0)), seed)


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


@pytest.mark.parametrize(
    "fields",
    [{}, {"tie_embeddings": True, "logits_soft_cap": 1.5}, {"logits_soft_cap": 3.0, "z_loss": 0.01, "mup_base_width": 4}],
    ids=["plain", "tied-capped", "z-mup"],
)
def test_loss_is_the_cross_entropy_of_the_logits(fields, x64):
    config = dataclasses.replace(TINY, **fields)
    graphdef, params, buffers = built(config)
    batch = packed_batch(3, 7, config.vocab_size)

    @jit
    def run(params, batch):
        model = model_state.merge(graphdef, params, buffers)
        hidden, _ = model.hidden(batch["tokens"], segment_ids_BT=batch["segment_ids"], positions_BT=batch["positions"])
        return model.loss(batch), model(batch["tokens"], batch["segment_ids"], batch["positions"]), hidden

    out, logits, hidden = run(params, batch)
    z = np.asarray(hidden) @ (params["embed"].T if config.tie_embeddings else params["head"])
    z = z * ((4 / 8) ** 0.5 if config.mup_base_width else 1.0)  # muP: a head drawn with std width^-1/2 acts like width^-1
    z = z if config.logits_soft_cap is None else config.logits_soft_cap * np.tanh(z / config.logits_soft_cap)
    assert_close("logits", logits, z, rel=1e-12)
    ce = -np.take_along_axis(log_softmax(z), batch["targets"][..., None], axis=-1)[..., 0]
    assert_close("ce_sum", out.ce_sum, (ce * batch["weights"]).sum(), rel=1e-12)
    assert out.weight_sum == batch["weights"].sum() and out.loss == out.ce_sum / out.weight_sum
    lse = np.log(np.exp(z).sum(-1))
    want_z = 0.01 * (batch["weights"] * lse**2).sum() if config.z_loss else 0.0
    assert_close("total", out.total_sum, (ce * batch["weights"]).sum() + want_z, rel=1e-12)


def test_tied_gradient_is_the_sum_of_both_uses(x64):
    tied, batch = dataclasses.replace(TINY, tie_embeddings=True), packed_batch(2, 7, 23)
    (graphdef, params, _), (untied, _, _) = built(tied), built(TINY)
    assert "head" not in params
    _, grads = jit(loss_and_grads(graphdef))(params, {}, batch)
    _, both = jit(loss_and_grads(untied))({**params, "head": params["embed"].T.copy()}, {}, batch)
    assert_close("embed", grads["embed"], np.asarray(both["embed"]) + np.asarray(both["head"]).T, rel=1e-12)
    assert np.any(np.asarray(both["embed"]) != 0) and np.any(np.asarray(both["head"]) != 0)


def test_embed_scale_multiplies_the_embedding_on_the_way_in(x64):
    (graphdef, params, _), (scaled, _, _) = built(TINY), built(dataclasses.replace(TINY, embed_scale=8**0.5))
    tokens = np.arange(6, dtype=np.int32)[None]
    got, want = jit(lambda p, q: (model_state.merge(scaled, p, {})(tokens), model_state.merge(graphdef, q, {})(tokens)))(
        params, {**params, "embed": params["embed"] * 8**0.5}
    )
    assert_close("logits", got, want, rel=1e-12)


def test_initial_standard_deviation_is_one_over_root_fan_in():
    """Within 2 % for every matrix, experts, router, heads and tables included; scanned and unrolled layers alike."""
    config = ModelConfig(
        vocab_size=160, d_model=256, num_layers=3, pattern=("attention", "retention", "retention"), channel=("moe", "mlp", "mlp"),
        mixers={"attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 32}, "retention": {"num_heads": 2, "head_dim": 64}},
        channels={"moe": {"num_experts": 64, "hidden": 16, "shared_experts": 4}, "mlp": {"hidden": 96}},
    )  # fmt: skip
    fan_in = {
        "embed": 256, "head": 256, "mixer.wq": 256, "mixer.wk": 256, "mixer.wv": 256, "mixer.wg": 256, "channel.router": 256,
        "channel.w_in": 256, "channel.w_up": 256, "channel.shared.w_in": 256, "channel.shared.w_up": 256, "channel.shared.w_out": 64,
    }  # fmt: skip
    out = {"attention": 4 * 32, "retention": 2 * 128, "moe": 16, "mlp": 96}  # of wo and w_out
    params = jax.device_get(jit(lambda: model_state.split(Decoder(config, rngs=nnx.Rngs(0)))[1])())
    kinds = {0: ("attention", "moe"), 1: ("retention", "mlp")}  # of the two segments
    checked = 0
    for path, a in params.items():
        name = path.split("blocks.0.")[-1]
        if path.endswith("scale"):
            assert np.all(a == 1.0), path
            continue
        mixer, channel = kinds[int(path.split(".")[1])] if path.startswith("segments") else (None, None)
        n = fan_in[name] if name in fan_in else out[mixer] if name == "mixer.wo" else out[channel]
        assert a.size > 12_000, f"{path}: too few entries to measure 2 % of a standard deviation"
        assert abs(a.std() * n**0.5 - 1) < 0.02 and abs(a.mean()) * n**0.5 < 0.04, f"{path}: {a.std() * n**0.5} times 1 / sqrt({n})"
        checked += 1
    assert checked == len([p for p in params if not p.endswith("scale")])


def test_packed_rows_equal_documents_alone_through_a_whole_model(x64):
    """Logits of a packed row are those of its documents in rows of their own, positions starting anew."""
    graphdef, params, buffers = built(HYBRID)
    documents = [np.arange(5) % 23, np.array([7]), np.arange(6) * 3 % 23]
    row, segments = np.concatenate([*documents, [0, 0]]), np.repeat([1, 2, 3, 0], [5, 1, 6, 2])
    alone, alone_segments = np.zeros((3, 14), np.int32), np.zeros((3, 14), np.int32)
    for i, d in enumerate(documents):
        alone[i, : len(d)], alone_segments[i, : len(d)] = d, 1

    @jit
    def run(params, row, segments, alone, alone_segments):
        model = model_state.merge(graphdef, params, buffers)
        return model(row, segments), model(alone, alone_segments)

    packed, separate = run(params, row[None].astype(np.int32), segments[None].astype(np.int32), alone, alone_segments)
    for i, d in enumerate(documents):
        assert_close(f"document {i}", np.asarray(packed)[0][segments == i + 1], np.asarray(separate)[i, : len(d)], rel=1e-12)


def test_sums_add_up_over_micro_batches(x64):
    """ce_sum, weight_sum, auxiliary losses, loads and gradients of a batch are those of its rows, added."""
    graphdef, params, buffers = built(HYBRID)
    batch, run = packed_batch(2, 9, 23), jit(loss_and_grads(graphdef))
    (_, (ce, weight, losses, load, _)), grads = run(params, buffers, batch)
    rows = [run(params, buffers, {name: a[[b, b]] for name, a in batch.items()}) for b in range(2)]  # each row twice: one shape
    halves = jax.tree.map(lambda a, b: (a + b) / 2, *[((c, w, lo, ld), g) for (_, (c, w, lo, ld, _)), g in rows])
    assert_trees_close(((ce, weight, losses, load), grads), halves, rel=1e-12)


@pytest.mark.slow
def test_bfloat16_compute_is_finite_and_near_float32():
    graphdefs = {}
    for dtype in ("float32", "bfloat16"):
        config = dataclasses.replace(HYBRID, param_dtype="float32", compute_dtype=dtype, implementation=None, dropout=0.1)
        graphdefs[dtype], params, buffers = built(config)
    batch = packed_batch(2, 9, 23)

    @jit
    def run(params, batch):
        logits = {}
        for dtype, graphdef in graphdefs.items():
            model = model_state.merge(graphdef, params, buffers)
            logits[dtype] = model(batch["tokens"], batch["segment_ids"], batch["positions"]), model.loss(batch, mode="eval").ce_sum
        return logits, loss_and_grads(graphdefs["bfloat16"], key_seed=0)(params, buffers, batch)

    logits, ((total, _), grads) = run(params, batch)
    assert np.isfinite(total) and all(np.all(np.isfinite(g)) and g.dtype == jnp.float32 for g in grads.values())
    assert all(z.dtype == jnp.float32 and ce.dtype == jnp.float32 for z, ce in logits.values())
    assert relative_rms(logits["bfloat16"][0], logits["float32"][0]) < 3e-2
    for dtype, (z, got) in logits.items():
        ce = -np.take_along_axis(log_softmax(np.asarray(z, np.float64)), batch["targets"][..., None], axis=-1)[..., 0]
        # The head sums and keeps float32 in both dtypes: its logits are those of the loss, not their bfloat16 roundings.
        assert_close(f"{dtype} loss", got, (ce * batch["weights"]).sum(), rel=1e-5)


def test_prefill_and_steps_equal_the_whole_row(x64):
    """Ragged left padding, chunks, inactive rows and last_only; a second prefill goes on where the first stopped."""
    graphdef, params, buffers = built(HYBRID)
    tokens = np.random.default_rng(0).integers(0, 23, (3, 12)).astype(np.int32)
    valid = np.ones((3, 5), bool)
    valid[1, :2] = valid[2, :4] = False
    active = np.array([True, True, False])

    @jit
    def run(params, tokens):
        model = model_state.merge(graphdef, params, buffers)
        first, state = model.prefill(tokens[:, :5], model.init_state(3, 12), valid)
        second, state = model.prefill(tokens[:, 5:8], state)
        last, state = model.prefill(tokens[:, 8:10], state, jnp.array([[True, True], [True, False], [True, True]]), last_only=True)
        fourth, state = model.step(tokens[:, 10], state, active)
        fifth, state = model.step(tokens[:, 11], state)
        return first, second, last, fourth, fifth, state.length_B

    first, second, last, fourth, fifth, lengths = run(params, tokens)
    assert lengths.tolist() == [12, 9, 7]
    ends = (10, 9, 10)  # of what the second and third chunk hold of each row
    kept = [np.r_[tokens[b, :5][valid[b]], tokens[b, 5 : ends[b]], tokens[b, 10:11][[active[b]]], tokens[b, 11:]] for b in range(3)]
    rows = np.stack([np.pad(row, (0, 12 - len(row))) for row in kept])
    want = np.asarray(jit(lambda p, t: model_state.merge(graphdef, p, buffers)(t))(params, rows))
    for b in range(3):
        n = valid[b].sum()
        assert_close("prefill", np.asarray(first)[b][valid[b]], want[b, :n], rel=1e-11)
        assert_close("second prefill", np.asarray(second)[b], want[b, n : n + 3], rel=1e-11)
        n += ends[b] - 5
        assert_close("last_only", np.asarray(last)[b], want[b, n - 1], rel=1e-11)
        if active[b]:
            assert_close("step of active rows", np.asarray(fourth)[b], want[b, n], rel=1e-11)
        assert_close("step after", np.asarray(fifth)[b], want[b, len(kept[b]) - 1], rel=1e-11)


def test_a_full_state_is_an_error_before_the_step():
    graphdef, params, buffers = built(dataclasses.replace(TINY, param_dtype="float32", compute_dtype="float32"))
    model = model_state.merge(graphdef, params, buffers)
    tokens = np.zeros((2, 3), np.int32)
    state = dataclasses.replace(model.init_state(2, 4), length_B=np.array([2, 4], np.int32))
    shorter = dataclasses.replace(state, length_B=np.array([2, 0], np.int32))
    for call in (lambda: model.step(tokens[:, 0], state), lambda: model.prefill(tokens, shorter)):
        with pytest.raises(ValueError, match=r"holds max_len=4 tokens and this call would make a row 5 long; make it with a larger"):
            call()
    with pytest.raises(NotImplementedError, match="leave memory=None"):
        model.init_state(1, 4, memory={"image": None})


MOE_ORDER = ModelConfig(
    vocab_size=11, d_model=8, num_layers=8, pattern=("attention",), channel=("mlp", "small"), prefix=(("attention", "large"),),
    suffix=(("attention", "small"), ("attention", "large")), mixers={"attention": {"num_heads": 2}},
    channels={
        "mlp": {"hidden": 8}, "small": {"kind": "moe", "num_experts": 3, "top_k": 1, "hidden": 4, "bias_update_rate": 0.5},
        "large": {"kind": "moe", "num_experts": 5, "top_k": 2, "hidden": 4, "bias_update_rate": 0.25},
    },
    implementation="reference",
)  # fmt: skip
MOE_LAYERS = {0: 5, 1: 3, 3: 3, 5: 3, 6: 3, 7: 5}  # absolute layer: experts


def test_moe_metrics_and_bias_updates_follow_absolute_layers():
    """Loads, metrics and updates are in the order of the layers, whatever runs they were scanned in."""
    scanned, flat = MOE_ORDER, dataclasses.replace(MOE_ORDER, scan_layers=False)
    graphdef, params, buffers = built(scanned)
    abstract = [nnx.eval_shape(lambda c=c: Decoder(c, rngs=nnx.Rngs(0))) for c in (scanned, flat)]
    names, flat_names = map(model_state.manifest, abstract)
    assert [s.repeats for s in abstract[0].segments] != [1] * 8, "nothing is scanned"
    everything, batch = {**params, **buffers}, packed_batch(2, 9, 11)
    unrolled = {flat_names[n][0]: everything[p] if i is None else everything[p][i] for n, (p, i) in names.items()}
    flat_buffers = {p: a for p, a in unrolled.items() if p.endswith("bias")}
    flat_params = {p: a for p, a in unrolled.items() if p not in flat_buffers}

    @jit
    def run(params, buffers, flat_params, flat_buffers, batch):
        models = (graphdef, params, buffers), (model_state.split(abstract[1])[0], flat_params, flat_buffers)
        return [model_state.merge(*model).loss(batch).aux for model in models]

    aux, want = run(params, buffers, flat_params, flat_buffers, batch)
    tokens = (batch["segment_ids"] > 0).sum()
    top_k = {3: 1, 5: 2}
    assert aux.load_LE.shape == (6, 5) and {m.shape for m in aux.metrics.values()} == {(6,)}
    assert np.asarray(aux.load_LE).sum(axis=1).tolist() == [top_k[E] * tokens for E in MOE_LAYERS.values()]
    assert np.all(np.asarray(aux.load_LE)[[1, 2, 3, 4], 3:] == 0)
    assert len({tuple(row) for row in np.asarray(aux.load_LE)}) == 6, "all layers route alike: the order would not show"
    assert_trees_close(aux, want, rel=1e-5)
    updated = abstract[0].update_buffers(buffers, aux.load_LE)
    assert updated.keys() == buffers.keys() and abstract[0].update_buffers(buffers, None) == buffers
    for row, (layer, E) in enumerate(MOE_LAYERS.items()):
        path, index = names[f"layers.{layer}.channel.bias"]
        load = np.asarray(aux.load_LE)[row, :E]
        got = np.asarray(updated[path]) if index is None else np.asarray(updated[path])[index]
        assert np.array_equal(got, (0.5 if E == 3 else 0.25) * np.sign(load.mean() - load)), f"layer {layer}"


@pytest.mark.slow
def test_states_that_never_fill_go_on():
    """A recurrent state and a whole ring take more than max_len tokens, and still equal the full pass; a ring cut short fills."""
    fields = {"vocab_size": 17, "d_model": 16, "num_layers": 2, "pattern": ("retention", "local"), "compute_dtype": "float32"}
    local = {"kind": "attention", "num_heads": 2, "window": 3}
    model = Decoder(fields | {"mixers": {"retention": {"num_heads": 2}, "local": local}}, rngs=nnx.Rngs(0))
    tokens = jnp.arange(12)[None] % 17
    _, state = model.prefill(tokens[:, :8], model.init_state(1, 8))
    logits, _ = model.prefill(tokens[:, 8:], state)
    assert_close("logits", logits, model(tokens)[:, 8:], rel=1e-5)
    with pytest.raises(ValueError, match="holds max_len=3"):
        model.prefill(tokens, model.init_state(1, 3))


@pytest.mark.slow
def test_decoding_over_a_split_sequence_is_refused_and_its_own_rules_are_right():
    """Whole rows are split over seq; a few new tokens are not, and the layout of the rows is not theirs."""
    fields = {"vocab_size": 17, "d_model": 16, "num_layers": 2, "pattern": ("retention", "attention"), "compute_dtype": "float32"}
    model = Decoder(fields | {"mixers": {n: {"num_heads": 2} for n in ("retention", "attention")}}, rngs=nnx.Rngs(0))
    tokens = jnp.arange(16).reshape(2, 8) % 17

    def prefill(tokens):
        return model.prefill(tokens, model.init_state(2, 8))[0]

    want = prefill(tokens)
    devices, zigzag = mesh.make_mesh({"data": 2, "seq": 4}), Options(layout="zigzag")
    with axes.use(devices, None, zigzag), pytest.raises(ConfigError, match="decoding: rows of a few tokens cannot be split"):
        prefill(tokens)
    with axes.use(devices, axes.decode_rules(), zigzag):
        assert_close("logits", jax.jit(prefill)(tokens), want, rel=1e-5)
    with axes.use(devices, None, zigzag):
        assert_close("logits of whole rows", jax.jit(model)(tokens), want, rel=1e-5)
        with pytest.raises(ValueError, match="the layout in force is 'zigzag'"):
            model.hidden(tokens, layout="contiguous")

"""Paths and canonical names of a model's arrays: pinned, and the same however layers were grouped."""
import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from effmodels.config import ModelConfig
from effmodels.layers.param import Buffer, ParamInfo
from effmodels.models import Decoder
from effmodels.models import state as model_state
from tests.contract.cases import fill

CONFIG = ModelConfig(
    vocab_size=9, d_model=8, num_layers=6, pattern=("retention", "attention"), channel=("mlp", "moe"), prefix=(("attention", "mlp"),),
    mixers={"attention": {"num_heads": 2, "qk_norm": True, "bias": True, "sinks": True}, "retention": {"num_heads": 2}},
    channels={"moe": {"num_experts": 2, "hidden": 4, "bias_update_rate": 1e-3, "shared_experts": 1}},
)  # fmt: skip
ATTENTION = {*(f"mixer.{n}" for n in ("wq", "wk", "wv", "wo", "bq", "bk", "bv", "sinks", "q_norm.scale", "k_norm.scale"))}
RETENTION = {*(f"mixer.{n}" for n in ("wq", "wk", "wv", "wg", "wo"))}
MLP = {*(f"channel.{n}" for n in ("w_in", "w_up", "w_out"))}
MOE = MLP | {"channel.router", "channel.bias", *(f"channel.shared.{n}" for n in ("w_in", "w_up", "w_out"))}
NORMS = {"norm_mixer.scale", "norm_channel.scale"}


def abstract(config):
    return nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))


def test_canonical_names_are_these():
    """Names on disk: a change here breaks every saved checkpoint."""
    layers = [ATTENTION | MLP] + [ATTENTION | MOE if i % 2 else RETENTION | MLP for i in range(1, 6)]
    want = {"embed", "head", "final_norm.scale"} | {f"layers.{i}.{name}" for i, names in enumerate(layers) for name in names | NORMS}
    assert set(model_state.manifest(abstract(CONFIG))) == want
    tied = dataclasses.replace(CONFIG, tie_embeddings=True, norm_position="sandwich", norm="layernorm")
    extra = {f"layers.{i}.{n}_out.{p}" for i in range(6) for n in ("norm_mixer", "norm_channel") for p in ("scale", "bias")}
    extra |= {f"layers.{i}.{n}.bias" for i in range(6) for n in ("norm_mixer", "norm_channel")} | {"final_norm.bias"}
    assert set(model_state.manifest(abstract(tied))) == want - {"head"} | extra


def test_names_do_not_depend_on_the_grouping():
    scanned, flat = abstract(CONFIG), abstract(dataclasses.replace(CONFIG, scan_layers=False))
    names, flat_names = model_state.manifest(scanned), model_state.manifest(flat)
    assert names.keys() == flat_names.keys()
    assert [(s.start, s.period, s.repeats) for s in scanned.segments] == [(0, 1, 1), (1, 2, 2), (5, 1, 1)]
    assert names["layers.3.mixer.wq"] == ("segments.1.blocks.0.mixer.wq", 1)
    assert names["layers.0.mixer.wq"] == ("segments.0.blocks.0.mixer.wq", None)
    arrays, infos = {**model_state.split(scanned)[1], **model_state.split(scanned)[2]}, model_state.info(scanned)
    flat_arrays, flat_infos = {**model_state.split(flat)[1], **model_state.split(flat)[2]}, model_state.info(flat)
    for name, (path, index) in names.items():
        flat_path = flat_names[name][0]
        shape = arrays[path].shape if index is None else arrays[path].shape[1:]
        assert shape == flat_arrays[flat_path].shape, name
        assert infos[path] == (flat_infos[flat_path] if index is None else flat_infos[flat_path].stacked()), name
    assert {path for path, _ in names.values()} == set(arrays) == set(infos)


def test_split_and_merge_are_inverse_and_keep_what_arrays_mean():
    config = dataclasses.replace(CONFIG, num_layers=2, prefix=())
    graphdef, params, buffers = fill(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    model = abstract(config)
    assert set(buffers) == {p for p in model_state.info(model) if p.endswith("channel.bias")} and buffers
    again = model_state.merge(graphdef, params, buffers)
    assert model_state.info(again) == model_state.info(model)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(model_state.split(again)[1:]), jax.tree.leaves((params, buffers))))
    assert isinstance(again.segments[1].blocks[0].channel.bias, Buffer)
    assert model_state.num_params(model) == sum(a.size for a in params.values())
    assert hash(graphdef) == hash(model_state.split(again)[0]) and graphdef == model_state.split(again)[0], "else every call traces again"


def test_matrices_are_told_from_vectors_by_names():
    assert ParamInfo(("embed", "heads", "head_dim"), ("embed",)).is_matrix
    assert ParamInfo(("layers", "expert", "embed", "mlp"), ("embed",), ("layers", "expert")).is_matrix
    assert not ParamInfo(("heads", "head_dim")).is_matrix and not ParamInfo(("layers", "norm"), (), ("layers",)).is_matrix


@pytest.mark.parametrize("layout", [{"scan_layers": True}, {"scan_layers": False}])
def test_one_trace_for_equal_models(layout):
    """Two models of one config have equal graphdefs: a compiled function serves both."""
    config = dataclasses.replace(CONFIG, **layout)
    assert model_state.split(abstract(config))[0] == model_state.split(abstract(dataclasses.replace(config)))[0]

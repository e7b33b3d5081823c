"""What is wrong with a folder is said in one sentence that names it, before anything is loaded."""
import json
import warnings

import numpy as np
import pytest

from effmodels.interop import InteropError, load_pretrained, place, registry, save, save_pretrained
from tests.interop import folders


def refused(path, *parts, **options):
    with pytest.raises(InteropError) as error:
        load_pretrained(path, **options)
    for part in parts:
        assert part in str(error.value), str(error.value)


@pytest.fixture(scope="module")
def ref():
    ref = folders.reference("llama")
    return folders.tensors(ref), ref["config"]


def changed(ref, tmp_path, drop=(), add=(), **config):
    arrays = {n: a for n, a in ref[0].items() if n not in drop} | dict(add)
    return folders.write(tmp_path, arrays, ref[1] | config)


@pytest.mark.parametrize("field", [{"model_type": "lama"}, {"model_type": "bert"}])
def test_unknown_model_type(ref, tmp_path, field):
    nearest = ["Did you mean 'llama'?"] if field["model_type"] == "lama" else []
    refused(changed(ref, tmp_path, **field), field["model_type"], "gpt_neox", "mixtral", *nearest)


def test_missing_extra_and_misshapen_tensors_are_named(ref, tmp_path):
    gone, odd = "model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.k_proj.weight"
    refused(changed(ref, tmp_path / "a", drop=[gone]), "missing " + gone)
    extra = "model.layers.0.extra.weight"
    refused(changed(ref, tmp_path / "b", add={extra: np.zeros(3, np.float32)}), "not known: " + extra)
    refused(changed(ref, tmp_path / "c", add={odd: np.zeros((8, 24), np.float32)}), odd, "[8, 24]", "[20, 24]")
    refused(changed(ref, tmp_path / "d", add={gone: np.zeros((40, 24), np.int8)}), gone, "int8")


@pytest.mark.parametrize(
    "config, parts",
    [
        ({"num_hidden_layers": 2}, ("not known: model.layers.2.",)),
        ({"num_hidden_layers": 4}, ("missing model.layers.3.",)),
        ({"hidden_size": 28}, ("model.embed_tokens.weight is [61, 24] and config.json asks for [61, 28]",)),
        ({"num_key_value_heads": 4}, ("k_proj.weight is [20, 24] and config.json asks for [40, 24]",)),
        ({"num_key_value_heads": 3}, ("num_kv_heads=3",)),
        ({"tie_word_embeddings": False}, ("missing lm_head.weight",)),
        ({"attention_bias": True}, ("missing model.layers.0.self_attn.q_proj.bias",)),
        ({"hidden_act": "tanh"}, ("hidden_act='tanh'", "'silu'")),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, ("'longrope'", "llama3")),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0, "odd": 3}}, ("odd=3",)),
        ({"quantization_config": {"bits": 4}}, ("quantization_config",)),
        ({"vocab_size": None}, ("vocab_size",)),
    ],
)
def test_a_config_that_contradicts_its_tensors(tmp_path, ref, config, parts):
    from effmodels.config import ConfigError

    path = changed(ref, tmp_path, **config)
    with pytest.raises(ConfigError) as error:
        load_pretrained(path)
    for part in parts:
        assert part in str(error.value), str(error.value)


def test_fields_that_nobody_asked_for_are_told(ref, tmp_path):
    with pytest.warns(UserWarning, match="residual_multiplier=0.22"):
        load_pretrained(changed(ref, tmp_path, residual_multiplier=0.22))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_pretrained(changed(ref, tmp_path / "b", use_cache=False, some_flag=False))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl"])
def test_pickles_are_refused(ref, tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(ref[1]))
    (tmp_path / name).write_bytes(b"\x80\x04")
    refused(tmp_path, name, "unsafe")


def test_truncated_and_corrupt_files(ref, tmp_path):
    path = changed(ref, tmp_path)
    file = path / "model.safetensors"
    whole = file.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    for cut in (0, 5, 100, 8 + size, len(whole) - 1):
        file.write_bytes(whole[:cut])
        refused(path, "model.safetensors", "truncated")
    file.write_bytes(whole + b"\0")
    refused(path, "corrupt")
    file.write_bytes(whole[:8] + b"x" + whole[9:])
    refused(path, "no JSON")
    header = json.loads(whole[8 : 8 + size])
    name = next(n for n in header if n != "__metadata__")
    for change, text in (({"dtype": "F99"}, "F99"), ({"shape": [1, 2]}, name), ({"data_offsets": [8, 4]}, name), ({"shape": [-1]}, name)):
        bad = json.dumps(header | {name: header[name] | change}).encode()
        file.write_bytes(len(bad).to_bytes(8, "little") + bad + whole[8 + size :])
        refused(path, text)


def test_what_is_not_there(ref, tmp_path):
    refused(tmp_path / "nowhere", "nowhere")
    refused(tmp_path, "config.json")
    (tmp_path / "config.json").write_text(json.dumps(ref[1]))
    refused(tmp_path, "model.safetensors")
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, "no JSON")


def test_shards_that_do_not_fit_their_index(ref, tmp_path):
    model, _ = load_pretrained(changed(ref, tmp_path / "a"))
    save_pretrained(model, tmp_path / "b", max_shard_bytes=8000)
    path, index = tmp_path / "b", json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    load_pretrained(path)
    name = "model.norm.weight"
    other = next(f for f in index["weight_map"].values() if f != index["weight_map"][name])
    for where, text in (({name: other}, name), ({"lost": other}, "lost")):
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index["weight_map"] | where}))
        refused(path, text)
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / other).unlink()
    refused(path, other)


def test_too_little_memory_or_disk_is_said_first(ref, tmp_path, monkeypatch):
    path = changed(ref, tmp_path / "a")
    model, _ = load_pretrained(path)
    monkeypatch.setattr(place, "free_host_bytes", lambda: 1000)
    monkeypatch.setattr(place, "fill", None)
    refused(path, "GB of memory", "nothing was loaded")
    monkeypatch.setattr(save.shutil, "disk_usage", lambda p: type("Usage", (), {"free": 10})())
    with pytest.raises(InteropError, match="disk is free; nothing was written"):
        save_pretrained(model, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_head_beside_tied_embeddings_must_be_equal(ref, tmp_path):
    table = ref[0]["model.embed_tokens.weight"]
    path = changed(ref, tmp_path / "a", add={"lm_head.weight": table})
    model, _ = load_pretrained(path)
    save_pretrained(model, tmp_path / "b")
    assert folders.contents(tmp_path / "b") == folders.contents(path)
    refused(changed(ref, tmp_path / "c", add={"lm_head.weight": table + 1}), "lm_head.weight", "differ")


def test_every_family_is_one_line_of_the_registry():
    for model_type in registry.FAMILIES:
        assert registry.get_family(model_type).model_type == model_type


def test_a_model_that_no_family_holds(tmp_path):
    from flax import nnx

    from effmodels.models import Decoder

    config = {"vocab_size": 11, "d_model": 16, "num_layers": 2, "mixers": {"attention": {"num_heads": 2, "soft_cap": 5.0}}}
    model = Decoder(config, rngs=nnx.Rngs(0))
    with pytest.raises(InteropError, match="soft_cap"):
        save_pretrained(model, tmp_path, model_type="llama")
    with pytest.raises(InteropError, match="no family"):
        save_pretrained(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "case, config, parts",
    [
        ("mamba2", {"expand": 3}, ("expand=3", "num_heads=6 times head_dim=8")),
        ("mamba2", {"hidden_act": "gelu"}, ("hidden_act='gelu'",)),
        ("mamba2", {"use_bias": True}, ("missing backbone.layers.0.mixer.in_proj.bias",)),
        ("qwen3_next", {"layer_types": ["full_attention"] * 3}, ("layer_types must name 4 layers", "linear_attention")),
        ("qwen3_next", {"layer_types": None}, ("missing model.layers.1.linear_attn.in_proj_qkvz.weight",)),
        ("lfm2_moe", {"layer_types": ["conv", "conv", "mamba", "conv"]}, ("layer_types must name 4 layers", "'mamba'")),
        ("lfm2_moe", {"use_expert_bias": False}, ("not known: model.layers.1.feed_forward.expert_bias",)),
    ],
)
def test_hybrids_that_contradict_their_tensors(tmp_path, case, config, parts):
    refused(folders.folder(tmp_path, case, **config), *parts)

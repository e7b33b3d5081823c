"""Weights go straight where they belong: shards onto a mesh, layers one at a time, never the whole model on the host."""
import tracemalloc

import jax
import numpy as np
import pytest

from effmodels.interop import load_pretrained, save_pretrained
from effmodels.models import state as model_state
from effmodels.parallel import mesh as meshes
from tests.interop import folders
from tests.numerics import assert_close

SIZES = {"vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 12, "num_attention_heads": 4, "intermediate_size": 512}


def large(path):
    """A Llama of 12 layers of 1 MB, its largest tensor a quarter of that."""
    D, F, V = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["vocab_size"]
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    for i in range(SIZES["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}self_attn.{x}_proj.weight": (D, D) for x in "qkvo"}
        shapes |= {f"{layer}mlp.gate_proj.weight": (F, D), f"{layer}mlp.up_proj.weight": (F, D), f"{layer}mlp.down_proj.weight": (D, F)}
        shapes |= {f"{layer}input_layernorm.weight": (D,), f"{layer}post_attention_layernorm.weight": (D,)}
    arrays = {n: np.full(s, i, np.float32) for i, (n, s) in enumerate(shapes.items())}
    return folders.write(path, arrays, {"model_type": "llama", "tie_word_embeddings": True, **SIZES})


def peak(f):
    tracemalloc.start()
    f()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most


def test_host_memory_is_one_tensor_and_one_layer(tmp_path):
    path = large(tmp_path / "a")
    model, _ = load_pretrained(path)  # compiled once
    largest, layer = 4 * 512 * 128, 4 * (4 * 128 * 128 + 3 * 512 * 128)
    slack = 300_000  # Python's own objects
    kept = []
    loading = peak(lambda: kept.append(load_pretrained(path)))
    assert loading <= largest + layer + slack, f"{loading} bytes"
    writing = peak(lambda: save_pretrained(model, tmp_path / "b"))
    assert writing <= largest + layer + slack, f"{writing} bytes"
    assert folders.contents(tmp_path / "b") == folders.contents(path)


@pytest.mark.parametrize("name", ["mixtral", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gpt_neox", "gpt_oss"))])
def test_onto_a_mesh_shard_by_shard(tmp_path, name):
    path = folders.folder(tmp_path / "a", name)
    mesh = meshes.make_mesh({"fsdp": 2, "tensor": 2, "data": -1})
    one, _ = load_pretrained(path)
    split, _ = load_pretrained(path, mesh=mesh)
    a, b = model_state.split(one)[1], model_state.split(split)[1]
    shards = 0
    for p in a:
        assert b[p].dtype == a[p].dtype
        np.testing.assert_array_equal(np.asarray(a[p]), np.asarray(b[p]))
        shards += b[p].addressable_shards[0].data.size < b[p].size
    assert shards > 5
    save_pretrained(split, tmp_path / "b")
    assert folders.contents(tmp_path / "b") == folders.contents(path)


@pytest.mark.slow
def test_dtype_on_request_and_stacks_in_place(tmp_path):
    path = folders.folder(tmp_path, "llama", dtype="bfloat16")
    wide, _ = load_pretrained(path, dtype="float32")
    kept, _ = load_pretrained(path)
    for p, x in model_state.split(wide)[1].items():
        assert x.dtype == np.float32
        np.testing.assert_array_equal(np.asarray(x), np.asarray(model_state.split(kept)[1][p]).astype(np.float32))
    unrolled, _ = load_pretrained(path, dtype="float32", overrides={"scan_layers": False})
    assert len(unrolled.segments) == 3
    tokens = jax.numpy.asarray([[1, 2, 3]])
    assert_close("logits", unrolled(tokens), wide(tokens), 1e-6)

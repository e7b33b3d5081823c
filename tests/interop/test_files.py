"""What files of the same model may differ in: names with or without their prefix, shards, dtypes, buffers, a tokenizer or none."""
import json

import jax.numpy as jnp
import numpy as np
import pytest

from effmodels.interop import load_pretrained, registry, save_pretrained
from tests.interop import folders, variants
from tests.interop.test_variants import reference, tensors

QUICK = "gpt2"
FAMILIES = [pytest.param(f, marks=() if f == QUICK else pytest.mark.slow) for f in variants.BASES]
# Buffers that files of a family may hold besides parameters.
BUFFERS = {
    "gpt2": ("transformer.h.0.attn.bias", "transformer.h.1.attn.masked_bias"),
    "gpt_neox": ("gpt_neox.layers.0.attention.bias", "gpt_neox.layers.0.attention.masked_bias",
                 "gpt_neox.layers.1.attention.rotary_emb.inv_freq"),
    "minimax": ("model.layers.1.self_attn.slope_rate", "model.layers.0.self_attn.rotary_emb.inv_freq"),
    "bailing_moe_linear": ("model.layers.0.attention.slope",), "mamba2": (),
    "retnet": ("model.layers.0.attn.rotary.inv_freq",), "torchscale_retnet": ("retnet_rel_pos.angle", "retnet_rel_pos.decay"),
}  # fmt: skip
ROTARY = ("model.layers.0.self_attn.rotary_emb.inv_freq",)


def written(path, family, arrays, dtype=None):
    return folders.write(path, arrays, variants.config(family, {}), dtype)


def kept(path, family):
    """What comes back of a folder: all but known buffers."""
    ignored = registry.get_family(family).ignores
    return {n: t for n, t in folders.contents(path).items() if not ignored(n)}


@pytest.mark.parametrize("family", FAMILIES)
def test_base_model_files_with_buffers_in_half_precision(tmp_path, family):
    """Without the prefix that a base model's names lack, in float16, with buffers: the same parameters, and the same file back."""
    arrays, prefix = tensors(family, "base"), registry.get_family(family).prefix
    arrays |= {n: np.ones((2, 2), np.float32) for n in BUFFERS.get(family, ROTARY) if n not in arrays}
    plain = written(tmp_path / "a", family, arrays, "float16")
    bare = written(tmp_path / "b", family, {n.removeprefix(prefix): a for n, a in arrays.items()}, "float16")
    a, b = (load_pretrained(path) for path in (plain, bare))
    assert a[1] is b[1] is None and a[0].config.param_dtype == "float16"
    save_pretrained(a[0], tmp_path / "c")
    save_pretrained(b[0], tmp_path / "d")
    assert kept(tmp_path / "c", family) == kept(plain, family)
    assert kept(tmp_path / "d", family) == kept(bare, family)
    if prefix:
        assert {n.removeprefix(prefix): t for n, t in kept(plain, family).items()} == kept(bare, family)


@pytest.mark.parametrize("family", [pytest.param(f, marks=pytest.mark.slow) for f in variants.BASES])
def test_shards_and_one_tensor_in_another_dtype(tmp_path, family):
    arrays = tensors(family, "base")
    first = next(iter(arrays))
    mixed = written(tmp_path / "a", family, {n: a.astype(jnp.bfloat16 if n != first else np.float32) for n, a in arrays.items()})
    model, _ = load_pretrained(mixed)
    save_pretrained(model, tmp_path / "b", max_shard_bytes=4000)
    assert len(set(json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())["weight_map"].values())) > 2
    assert kept(tmp_path / "b", family) == kept(mixed, family)
    again, _ = load_pretrained(tmp_path / "b", dtype="float32")
    one, _ = load_pretrained(mixed, dtype="float32")
    tokens = jnp.asarray([reference(family)["tokens"]])
    np.testing.assert_array_equal(np.asarray(again(tokens)), np.asarray(one(tokens)))

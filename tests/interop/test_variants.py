"""Fields of config.json that change the computation: honoured, with the logits of independent code, or refused in one sentence."""
import base64
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effmodels.config import ConfigError
from effmodels.interop import load_pretrained, registry
from effmodels.interop.compare import differences
from effmodels.interop.load import model_config
from effmodels.interop.save import export_fields
from effmodels.models import resolve
from tests.interop import folders, variants
from tests.interop.draws import weights
from tests.interop.make_variants import HERE, KEPT
from tests.interop.test_parity import BOUND, error

QUICK = {("minimax_text_01", "base")}
# One per family that is also run token by token; where several parts meet.
STEPPED = {
    "gpt2": "by_layer", "gpt_neox": "linear_old", "llama": "attention_bias", "mistral": "window_of_one", "mixtral": "window",
    "olmoe": "normalised", "qwen2": "window_types", "qwen3": "window_from", "qwen2_moe": "window_types", "qwen3_moe": "window",
    "deepseek_v2": "yarn_mscale", "deepseek_v3": "halves", "minimax": "linear_first", "minimax_text_01": "base",
    "bailing_moe_linear": "silu", "qwen3_next": "partial", "mamba2": "biases", "gpt_oss": "limit", "lfm2_moe": "long_conv",
    "retnet": "sizes", "torchscale_retnet": "scaled",
}  # fmt: skip
# Models without any experts, or any attention, which are not written: config.json would have to make up sizes of what there is not.
UNSAID = ("all_dense", "no_experts", "all_conv")


def named(table, quick=None):
    """(family, variant) of every entry; slow unless it is in `quick`."""
    pairs = [(family, name) for family, entries in table.items() for name in entries]
    return [pytest.param(*p, marks=() if quick is None or p in quick else pytest.mark.slow, id="-".join(p)) for p in pairs]


@functools.cache
def reference(family):
    return json.loads((HERE / f"{family}.json").read_text())


def tensors(family, name):
    """{name: array} of a variant's checkpoint."""
    ref = reference(family)
    merged = {n: s for n, s in (ref["tensors"] | ref["variants"][name]["tensors"]).items() if s is not None}
    return {n: weights(n, tuple(shape), family).astype(dtype) for n, (dtype, *shape) in merged.items()}


def last_logits(family, name):
    """[KEPT, V] of the last tokens."""
    return np.frombuffer(base64.b64decode(reference(family)["variants"][name]["logits"]), np.float32).reshape(KEPT, -1)


def written(path, family, name):
    return folders.write(path, tensors(family, name), variants.config(family, variants.HONOURED[family][name]))


@pytest.mark.parametrize("family, name", named(variants.HONOURED, QUICK))
def test_logits_and_the_way_back(tmp_path, family, name):
    """Load: their logits. Save from the model alone: a config.json of the same model."""
    with jax.default_matmul_precision("highest"):
        model, _ = load_pretrained(written(tmp_path, family, name), dtype="float32")
        got = model(jnp.asarray([reference(family)["tokens"]]))[0, -KEPT:]
    assert error(got, last_logits(family, name)) <= BOUND
    if name not in UNSAID:
        again = export_fields(registry.get_family(family), model)
        assert differences(model.config, model_config(again | {"model_type": family})[1]) == []


@pytest.mark.slow
@pytest.mark.parametrize("family", STEPPED)
def test_logits_token_by_token(tmp_path, family):
    name = STEPPED[family]
    with jax.default_matmul_precision("highest"):
        model, _ = load_pretrained(written(tmp_path, family, name), dtype="float32")
        tokens = jnp.asarray([reference(family)["tokens"]])
        logits, state = model.prefill(tokens[:, :-KEPT], model.init_state(1, tokens.shape[1]))
        got = []
        for t in range(tokens.shape[1] - KEPT, tokens.shape[1]):
            logits, state = model.step(tokens[:, t], state)
            got.append(logits[0])
    assert error(np.stack(got), last_logits(family, name)) <= BOUND


@pytest.mark.parametrize("family, name", named(variants.REFUSED))
def test_a_field_that_is_not_supported_is_named(family, name):
    fields, text = variants.REFUSED[family][name]
    with pytest.raises(ConfigError) as found:
        resolve(model_config(variants.config(family, fields))[1])
    assert text in str(found.value), str(found.value)


def test_every_family_has_variants_of_both_kinds():
    families = registry.FAMILIES.keys() - {"minimax_m1"}  # minimax_text_01 under another name
    assert variants.HONOURED.keys() == variants.REFUSED.keys() == variants.BASES.keys() == STEPPED.keys() == families

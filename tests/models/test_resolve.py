"""Every config that does not fit is refused before an array is made, with the field, what was given and what to do."""
import pytest

from effmodels.config import ConfigError, ModelConfig
from effmodels.models import Decoder, resolve

BASE = {"vocab_size": 9, "d_model": 16, "num_layers": 2}


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"pattern": ("atention",)},
            r"model.pattern: unknown token mixer 'atention'. Did you mean 'attention'\? Available: .*attention.*retention",
        ),
        ({"channel": ("mpl",)}, r"model.channel: unknown channel mixer 'mpl'. Did you mean 'mlp'\?"),
        (
            {"pattern": ("retention,attention",)},
            r"unknown token mixer 'retention,attention'.* Write a tuple as \('retention', 'attention'\), not as text with commas",
        ),
        (
            {"mixers": {"local": {"kind": "atention"}}, "pattern": ("local",)},
            r"model.mixers.local.kind: unknown token mixer 'atention'.*'attention'",
        ),
        ({"mixers": {"attention": {"num_head": 2}}}, r"model.mixers.attention: unknown field 'num_head'. Did you mean 'num_heads'\?"),
        ({"mixers": {"attention": {"num_heads": "8"}}}, r"model.mixers.attention.num_heads: expected int, got '8' \(str\)"),
        ({"mixers": {"attention": {"num_heads": 3}}}, r"d_model=16 is not divisible by num_heads=3; valid: \[1, 2\], or set head_dim"),
        ({"mixers": {"attention": 3}}, r"model.mixers.attention: expected a mapping of fields, got 3"),
        (
            {"mixers": {"retention": {"num_heads": 2}}},
            r"model.mixers: 'retention' is defined but no layer uses it",
        ),
        ({"channels": {"mlp": {"activation": "selu"}}}, r"mlp.activation: unknown 'selu'"),
        ({"prefix": ("attention",)}, r"model.prefix / model.suffix: expected pairs \(mixer, channel\), got 'attention'"),
        ({"prefix": (("attention", "mlp"),) * 3}, r"prefix \(3 layers\) and suffix \(0\) exceed num_layers=2"),
        ({"pattern": ()}, r"model.pattern: expected at least one name"),
        ({"channel": ()}, r"model.channel: expected at least one name"),
        ({"num_layer": 3}, r"model: unknown field 'num_layer'. Did you mean 'num_layers'\?"),
        ({"num_layers": 0}, r"model.num_layers: expected a positive integer, got 0"),
        ({"norm": "rms"}, r"model.norm: unknown 'rms'. Did you mean 'rmsnorm'\?"),
        ({"norm_position": "before"}, r"model.norm_position: unknown 'before'"),
        ({"residual_scales": {"mpl": (2.0, 1.0)}}, r"model.residual_scales: no layer has a 'mpl'. Did you mean 'mlp'\?"),
        ({"residual_scales": {"mlp": 2.0}}, r"model.residual_scales.mlp: expected two numbers, of the stream and of the branch, got 2.0"),
        ({"residual_scales": {"mlp": (2, 1)}, "residual": "parallel"}, r"residual_scales are of a serial residual only"),
        ({"norm_position": "input", "residual": "parallel"}, r"norm_position='input' and residual_scales are of a serial residual only"),
        ({"residual": "paralel"}, r"model.residual: unknown 'paralel'. Did you mean 'parallel'\?"),
        ({"remat": "all"}, r"model.remat: unknown 'all'"),
        ({"compute_dtype": "bf16"}, r"model.compute_dtype: unknown 'bf16'"),
        ({"dropout": 1.0}, r"model.dropout: expected 0 <= dropout < 1, got 1.0"),
        ({"dropout": "0.1"}, r"model.dropout: expected float, got '0.1' \(str\)"),
        ({"tie_embeddings": 1}, r"model.tie_embeddings: expected bool, got 1 \(int\)"),
        ({"logits_soft_cap": 0.0}, r"model.logits_soft_cap: expected a positive number or None, got 0.0"),
    ],
)
def test_errors(fields, message):
    with pytest.raises(ConfigError, match=message):
        resolve({**BASE, **fields})


def test_missing_fields_and_other_types_are_named():
    with pytest.raises(ConfigError, match=r"model: d_model, num_layers must be given"):
        resolve({"vocab_size": 3})
    with pytest.raises(ConfigError, match=r"model: expected a mapping of ModelConfig fields, got 3"):
        resolve(3)


def test_decoder_refuses_before_making_arrays():
    with pytest.raises(ConfigError, match="Did you mean 'attention'"):
        Decoder({**BASE, "pattern": ("atention",)}, rngs=None)


def test_two_instances_of_one_kind_and_shorthands():
    from ml_collections import ConfigDict

    fields = {**BASE, "pattern": ["local", "attention"], "mixers": {"local": {"kind": "attention", "window": 3, "num_heads": 2}}}
    fields["mixers"]["attention"] = {"num_heads": 2}
    resolved = resolve(ConfigDict(fields))
    assert [kind.mixer.config.window for kind in resolved.layers] == [3, None]
    assert resolve(fields) == resolved and hash(resolve(fields).config) == hash(resolved.config)
    assert ModelConfig(**BASE, pattern="attention").pattern == ("attention",)

"""What families brought into the models: counted exactly, and right where decoding and packing meet it."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effmodels.config import ConfigError
from effmodels.interop import InteropError, load_pretrained, registry, save, save_pretrained
from effmodels.interop.compare import differences
from effmodels.interop.fields import Fields
from effmodels.interop.load import model_config
from effmodels.interop.registry import get_family
from effmodels.models import Decoder, cost, resolve
from effmodels.models import state as model_state
from effmodels.train.run_config import RunConfig
from tests.configs import catalogue
from tests.interop import folders
from tests.interop.draws import weights
from tests.numerics import assert_close

BALANCING = ("e_score_correction_bias", "expert_bias")  # trained by rule, no parameters


def abstract(config):
    return nnx.eval_shape(functools.partial(lambda key: Decoder(config, rngs=nnx.Rngs(key))), jax.random.key(0))


@pytest.mark.parametrize("name", folders.ALL)
def test_parameters_are_counted_exactly(name):
    ref = folders.reference(name)
    family, config = model_config(ref["config"])
    counted = (s for n, (_, *s) in ref["tensors"].items() if not family.ignores(n) and not n.endswith(BALANCING))
    held = sum(int(np.prod(shape)) for shape in counted)
    assert cost(config, 8).params == model_state.num_params(abstract(config)) == held


@pytest.mark.parametrize(
    "name, model_type",
    [("minimax_01", "minimax"), ("ring_mini_linear_2", "bailing_moe_linear"), ("ring_flash_linear_2", "bailing_moe_linear"),
     ("gpt_oss_20b", "gpt_oss"), ("mixtral_8x7b", "mixtral")],
)  # fmt: skip
@pytest.mark.parametrize("size", [None, "small"])
def test_a_config_of_a_published_model_is_of_its_family(name, model_type, size):
    """A run of the config can be written as that family's config.json, and read back it is the same model."""
    family, model = registry.get_family(model_type), RunConfig.from_mapping(catalogue.load(name, size)).model
    assert differences(model, family.read(Fields(family.write(resolve(model)), model_type))) == []


def test_what_residual_scales_and_rates_of_decay_differ_in_is_named():
    fields = folders.reference("minimax")["config"]
    family, config = model_config(fields)
    assert differences(config, config) == []
    scales = config["residual_scales"] | {"lightning": (1.3, 1.0)}
    assert differences(config | {"residual_scales": scales}, config)[0].startswith("layers.0.mixer: residual_scales=(1.3, 1.0)")
    mixers = config["mixers"] | {"lightning": config["mixers"]["lightning"] | {"slopes": "alibi"}}
    assert differences(config | {"mixers": mixers}, config) == [], "of a power of two of heads they are the same"
    mixers["lightning"] |= {"layer_factor": "ring"}
    assert differences(config | {"mixers": mixers}, config)[0].startswith("layers.0.mixer.slopes=")


def test_any_number_of_dims_may_rotate():
    """As a share of the head, which is what our config says, the number that the file says comes back whole."""
    from effmodels.interop.families.minimax import _fraction

    pairs = [(dims, head) for head in range(2, 300) for dims in range(2, head + 1, 2)]
    assert all(2 * int(head * _fraction(dims, head) / 2) == dims for dims, head in pairs)


@pytest.mark.slow
def test_learned_positions_end_loudly():
    config = {"vocab_size": 11, "d_model": 16, "num_layers": 1, "learned_positions": 6, "mixers": {"attention": {"num_heads": 2}}}
    model = Decoder(config, rngs=nnx.Rngs(0))
    assert np.all(np.isfinite(model(jnp.zeros((1, 6), jnp.int32))))
    with pytest.raises(ConfigError, match="learned_positions=6: a row of 7 tokens is longer"):
        model(jnp.zeros((1, 7), jnp.int32))
    state = model.prefill(jnp.zeros((1, 6), jnp.int32), model.init_state(1, 8))[1]
    assert np.all(np.isnan(model.step(jnp.zeros((1,), jnp.int32), state)[0]))


@pytest.mark.slow
def test_retention_with_the_decay_normaliser_packed_equals_alone():
    mixers = {"retention": {"num_heads": 2, "decay_norm": True, "head_norm_eps": 1e-2}}
    model = Decoder({"vocab_size": 11, "d_model": 16, "num_layers": 2, "pattern": ("retention",), "mixers": mixers}, rngs=nnx.Rngs(0))
    a, b = np.arange(5) % 11, np.arange(3, 10) % 11
    packed = model(jnp.asarray([[*a, *b]]), segment_ids=jnp.asarray([[1] * 5 + [2] * 7]))
    assert_close("first", packed[:, :5], model(jnp.asarray([a])), 1e-5)
    assert_close("second", packed[:, 5:], model(jnp.asarray([b])), 1e-5)


@pytest.mark.parametrize(
    "model_type, fields",
    [
        ("mamba2", {"pattern": ("ssd",), "channel": ("none",), "mixers": {"ssd": {"num_heads": 4, "dt_max": 2.0, "norm_eps": 1e-6}}}),
        (
            "qwen3_next",
            {
                "pattern": ("gated_delta", "attention"), "channel": ("moe",), "norm_offset": 1.0,
                "mixers": {
                    "gated_delta": {"num_heads": 2, "num_value_heads": 4, "head_dim": 6},
                    "attention": {"num_heads": 2, "qk_norm": True, "output_gate": True},
                },
                "channels": {"moe": {"num_experts": 3, "hidden": 5, "shared_experts": 1, "shared_gate": True}},
            },
        ),
        (
            "lfm2_moe",
            {
                "pattern": ("short_conv", "attention"), "channel": ("moe",), "prefix": (("short_conv", "mlp"),),
                "mixers": {"attention": {"num_heads": 2, "qk_norm": True}},
                "channels": {"moe": {"num_experts": 3, "hidden": 5, "router": "sigmoid", "weights_eps": 1e-6}, "mlp": {"hidden": 7}},
            },
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_hybrids_trained_here_are_written_with_defaults_filled_in(model_type, fields):
    """config.json says the sizes that our config leaves open, and one thing that the family cannot say is refused by its name."""
    model = abstract({"vocab_size": 11, "d_model": 16, "num_layers": 4, **fields})
    written = save.export_fields(get_family(model_type), model)
    assert save.differences(model.config, model_config(written | {"model_type": model_type})[1]) == []
    other = abstract({"vocab_size": 11, "d_model": 16, "num_layers": 4, **fields, "embed_scale": 2.0})
    with pytest.raises(InteropError, match="cannot say embed_scale=2.0"):
        save.export_fields(get_family(model_type), other)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_deepseeks_modules_for_further_tokens_are_read_and_written(tmp_path, dtype):
    """As published: a layer behind the last, with copies of the table and of the head; the same bits come back."""
    ref = folders.reference("deepseek_v3")
    arrays, last, D = folders.tensors(ref), ref["config"]["num_hidden_layers"] - 1, ref["config"]["hidden_size"]
    ahead = f"model.layers.{last + 1}."
    extra = {n.replace(f"model.layers.{last}.", ahead): a for n, a in arrays.items() if n.startswith(f"model.layers.{last}.")}
    extra |= {ahead + n: weights(n, (D,), "deepseek_v3") for n in ("enorm.weight", "hnorm.weight", "shared_head.norm.weight")}
    extra |= {ahead + "eh_proj.weight": weights("eh_proj.weight", (D, 2 * D), "deepseek_v3")}
    copies = {ahead + "embed_tokens.weight": "model.embed_tokens.weight", ahead + "shared_head.head.weight": "lm_head.weight"}
    extra |= {name: arrays[original] for name, original in copies.items()}
    source = folders.write(tmp_path / "a", arrays | extra, ref["config"] | {"num_nextn_predict_layers": 1}, dtype)
    model, _ = load_pretrained(source)
    assert model.config.mtp == {"depth": 1}
    want = arrays["lm_head.weight"].astype(dtype).astype(np.float32)
    assert np.array_equal(np.asarray(model.head[...], np.float32).T, want)
    join = np.asarray(model.mtp[0].w_join[...], np.float32).T
    assert np.array_equal(join, extra[ahead + "eh_proj.weight"].astype(dtype).astype(np.float32))
    save_pretrained(model, tmp_path / "b")
    assert folders.contents(tmp_path / "b") == folders.contents(source)
    del model.pretrained  # what is left says it all
    save_pretrained(model, tmp_path / "c", model_type="deepseek_v3")
    assert folders.contents(tmp_path / "c").keys() == folders.contents(source).keys()
    other = arrays | extra | {ahead + "shared_head.head.weight": arrays["lm_head.weight"] + 1}
    with pytest.raises(InteropError, match="shared_head.head.weight must repeat lm_head.weight, but they differ"):
        load_pretrained(folders.write(tmp_path / "d", other, ref["config"], dtype))


@pytest.mark.parametrize("name", ["qwen3_next", pytest.param("qwen3_next_biases", marks=pytest.mark.slow)])
def test_qwen3_nexts_module_for_further_tokens_is_read_and_written(tmp_path, name):
    """As published: a layer of attention and of experts under names of its own, without copies; the same bits come back."""
    ref = folders.reference(name)
    arrays, full, D = folders.tensors(ref), 3, ref["config"]["hidden_size"]
    layer, ahead = f"model.layers.{full}.", "mtp.layers.0."
    shapes = {n.replace(layer, ahead): a.shape for n, a in arrays.items() if n.startswith(layer)}
    extra = {n: weights(n, shape, "qwen3_next") for n, shape in shapes.items()}
    norms = ("mtp.pre_fc_norm_embedding.weight", "mtp.pre_fc_norm_hidden.weight", "mtp.norm.weight")
    extra |= {n: weights(n, (D,), "qwen3_next") for n in norms} | {"mtp.fc.weight": weights("mtp.fc.weight", (D, 2 * D), "qwen3_next")}
    source = folders.write(tmp_path / "a", arrays | extra, ref["config"])
    model, _ = load_pretrained(source)
    assert model.config.mtp == {"depth": 1, "mixer": "attention", "channel": "moe"}
    module = model.mtp[0]
    assert np.array_equal(np.asarray(module.w_join[...]).T, extra["mtp.fc.weight"])
    for norm, n in zip((module.norm_embed, module.norm_hidden, module.norm_out), norms):
        assert np.array_equal(np.asarray(norm.scale[...]), extra[n])
    assert np.array_equal(np.asarray(module.layer.mixer.wo[...]).reshape(-1, D).T, extra[ahead + "self_attn.o_proj.weight"])
    save_pretrained(model, tmp_path / "b")
    assert folders.contents(tmp_path / "b") == folders.contents(source)
    del model.pretrained
    save_pretrained(model, tmp_path / "c", model_type="qwen3_next")
    assert folders.contents(tmp_path / "c") == folders.contents(source)
    second = {"mtp.layers.1.input_layernorm.weight": np.zeros(D, np.float32)}
    with pytest.raises(InteropError, match="not known: mtp.layers.1.input_layernorm.weight"):
        load_pretrained(folders.write(tmp_path / "d", arrays | extra | second, ref["config"]))

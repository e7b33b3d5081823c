"""Costs against published parameter counts and brute force; nothing is built."""
import numpy as np
import pytest

from effmodels.config import ModelConfig
from effmodels.mixers.attention import Attention
from effmodels.mixers.base import Env, visible_pairs
from effmodels.mixers.retention import Retention
from effmodels.models import cost


def test_reference_shape_of_the_benchmark():
    """4 layers, d 256, 4 heads of 64, SwiGLU 1024, vocabulary 8192, untied head: 8,390,912 parameters."""
    config = ModelConfig(
        vocab_size=8192, d_model=256, num_layers=4, mixers={"attention": {"num_heads": 4}}, channels={"mlp": {"hidden": 1024}}
    )  # fmt: skip
    got = cost(config, 512)
    assert got.params == got.active_params == 8_390_912 and got.embedding_params == 2 * 8192 * 256
    matrices = 4 * (4 * 256**2 + 3 * 256 * 1024)
    pairs = 512 * 513 // 2 * 4 * 256 * 4 / 512  # four layers, 4 N H FLOPs a pair
    assert got.prefill_flops_per_token == 2 * (matrices + 8192 * 256) + pairs
    assert got.train_flops_per_token == 3 * got.prefill_flops_per_token


def test_mixtral_8x7b():
    """arXiv:2401.04088: 46.7B parameters, 12.9B active."""
    config = ModelConfig(
        vocab_size=32_000, d_model=4096, num_layers=32, channel=("moe",), param_dtype="bfloat16", compute_dtype="bfloat16",
        mixers={"attention": {"num_heads": 32, "num_kv_heads": 8}}, channels={"moe": {"num_experts": 8, "top_k": 2, "hidden": 14_336}},
    )  # fmt: skip
    got = cost(config, 4096)
    assert round(got.params / 1e9, 1) == 46.7 and round(got.active_params / 1e9, 1) == 12.9
    assert got.param_bytes == 2 * got.params
    assert got.decode_state_bytes == 32 * 4096 * (2 * 8 * 128 * 2 + 4) + 4


def test_retnet_layer_has_twelve_d_squared():
    """arXiv:2307.08621 section 3: 8 d^2 for retention (values twice as wide) and 4 d^2 for the ffn, as a Transformer layer."""
    d = 256
    config = ModelConfig(
        vocab_size=10, d_model=d, num_layers=1, pattern=("retention",), mixers={"retention": {"num_heads": 4}},
        channels={"mlp": {"activation": "gelu", "hidden": 2 * d}},
    )  # fmt: skip
    got = cost(config, 128)
    assert got.params - got.embedding_params - 3 * d == 12 * d**2
    assert cost(config, 1).decode_state_bytes == cost(config, 65_536).decode_state_bytes, "the state does not grow with the length"


@pytest.mark.parametrize("length, window", [(1, None), (7, None), (7, 0), (7, 3), (7, 6), (7, 99)])
def test_visible_pairs(length, window):
    t_s = np.arange(length)[:, None] - np.arange(length)[None, :]
    assert visible_pairs(length, window) == ((t_s >= 0) & (t_s <= (length if window is None else window))).sum()


def test_window_and_chunk_make_cost_linear():
    env = Env(d_model=64)
    for cls, config in ((Attention, Attention.Config(num_heads=4, window=32)), (Retention, Retention.Config(num_heads=4, chunk=32))):
        short, long = (cls.cost(config, env, n).flops for n in (1024, 8192))
        assert 7.8 < long / short < 8.3, cls
    short, long = (Attention.cost(Attention.Config(num_heads=4), env, n).flops for n in (1024, 8192))
    assert long / short > 30


def test_prefix_layers_and_unused_experts_are_counted():
    """Total and active parameters differ by the experts that a token does not use, layer by layer."""
    config = ModelConfig(
        vocab_size=10, d_model=8, num_layers=4, mixers={"attention": {"num_heads": 2}}, channel=("moe",), prefix=(("attention", "mlp"),),
        channels={"moe": {"num_experts": 6, "top_k": 2, "hidden": 5, "shared_experts": 1}, "mlp": {"hidden": 7}},
    )  # fmt: skip
    got = cost(config, 16)
    assert got.params - got.active_params == 3 * (6 - 2) * 3 * 8 * 5

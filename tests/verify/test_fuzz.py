"""Random compositions: mesh x rules x pattern x packing x recomputation x layout x attention form x precision, odd sizes.

A composition that is not legal must be refused with a sentence, and the seed is part of every test's name.
"""
import jax
import numpy as np
import pytest

from effmodels.config import ConfigError
from effmodels.verify import verify
from tests.verify import test_planted as planted
from tests.verify.cases import tiny

# Small ones that compile quickly, about 3 s of one core each: every axis, layout and recomputation policy more than once, and every mixer.
DEFAULT_SEEDS = (0, 2, 6, 7, 11, 12, 15, 18, 22, 23, 32, 40, 56, 68, 81, 103)
MORE_SEEDS = (1, 8, 16, 19, 20, 24, 38, 70, 87, 89, 102)
REFUSED = (15, 19, 32)
SLOW_SEEDS = range(1000, 1200)
AXES = ("data", "fsdp", "tensor", "seq", "expert", "stage")
MIXERS = {
    "attention": [{"num_heads": 2}, {"num_heads": 4, "num_kv_heads": 2, "qk_norm": True}, {"num_heads": 4, "soft_cap": 5.0, "sinks": True}],
    "local": [{"kind": "attention", "num_heads": 2, "window": 3}, {"kind": "attention", "num_heads": 4, "window": 9}],
    "retention": [{"num_heads": 2, "head_dim": 8, "value_dim": 12}, {"num_heads": 4, "head_dim": 4, "value_dim": 6, "chunk": 5}],
}
CHANNELS = {
    "mlp": [{"hidden": 24}, {"hidden": 40, "activation": "gelu"}],
    "moe": [
        {"num_experts": 4, "top_k": 2, "hidden": 8}, {"num_experts": 8, "top_k": 1, "hidden": 12, "bias_update_rate": 1e-3},
        {"num_experts": 4, "top_k": 2, "hidden": 8, "capacity_factor": 1.0, "shared_experts": 1, "z_coef": 1e-3},
        {"num_experts": 4, "top_k": 2, "hidden": 8, "balance": "batch", "router": "sigmoid"},
    ],
}  # fmt: skip
# What may be placed otherwise, as typed on a command line; half of the draws keep the default table.
RULES = [
    {"res_seq": "seq,tensor"}, {"embed": "none"}, {"embed": "data,fsdp"}, {"mlp": "none", "act_mlp": "none"}, {"expert_mlp": "none"},
    {"heads": "none", "act_heads": "none", "kv_heads": "none", "act_kv_heads": "none"}, {"vocab": "none", "act_vocab": "none"},
    {"expert": "none", "act_expert": "none"}, {"vocab": "fsdp", "embed": "none"}, {"norm": "fsdp"},
    {"batch": "data,fsdp", "tokens": "data,fsdp,seq"},
]  # fmt: skip
PATTERNS = [("attention",), ("retention",), ("retention", "attention"), ("local", "attention"), ("retention", "local")]
CHANNEL_PATTERNS = [("mlp",), ("moe",), ("mlp", "moe")]


def composition(seed, small=False):
    """A run's config as a dict and the number of devices. small: one kind of layer, the least number of layers."""
    rng = np.random.default_rng(seed)

    def pick(options):
        return options[int(rng.integers(len(options)))]

    devices = pick((2, 4, 8, 8))
    mesh, left = dict.fromkeys(AXES, 1), devices
    while left > 1:
        mesh[pick(AXES)] *= 2
        left //= 2
    pattern, channel = pick(PATTERNS), pick(CHANNEL_PATTERNS)
    if small:
        pattern, channel = (pick(pattern),), (pick(channel),)
    period, repeats = max(len(pattern), len(channel)), pick((1, 1, 2) if small else (1, 2))
    model = {
        "pattern": pattern, "channel": channel, "num_layers": period * repeats * mesh["stage"], "d_model": pick((16, 24, 32)),
        "mixers": {m: pick(MIXERS[m]) for m in sorted(set(pattern))}, "channels": {c: pick(CHANNELS[c]) for c in sorted(set(channel))},
        "vocab_size": pick((37, 48)), "tie_embeddings": bool(rng.integers(2)), "norm_position": pick(("pre", "post", "sandwich")),
        "residual": pick(("serial", "parallel")), "dropout": pick((0.0, 0.0, 0.1)), "z_loss": pick((0.0, 1e-3)),
        "compute_dtype": pick(("float32", "bfloat16")),
    }  # fmt: skip
    parallel = {
        "layout": pick(("auto", "contiguous", "zigzag", "striped")), "attention": pick(("ring", "ring", "all_gather", "ulysses")),
        "states": pick(("auto", "ring", "log")), "experts": pick(("auto", "padded", "gather")), "zero1": bool(rng.integers(2)),
    }  # fmt: skip
    c = tiny(mesh, parallel, seq_len=2 * mesh["seq"] * int(rng.integers(3, 8)), **model)
    c["train"]["remat"] = pick(("none", "full", "dots", "dots_no_batch"))
    c["rules"] = dict(pick(RULES)) if rng.integers(2) else {}
    return c, devices


def check(seed, small=False):
    """Verifies the composition, or sees it refused."""
    config, devices = composition(seed, small)
    given = f"{config['mesh']}, {config['rules']}, {config['parallel']}, remat {config['train']['remat']}, {config['model']}"
    print(f"seed {seed}: {devices} devices, {given}")
    # In bfloat16 many expert scores are near ties, and retention's norm over a nearly zero product is all rounding: both sides are right.
    exact = "moe" in config["model"]["channel"] or "retention" in config["model"]["pattern"]
    precision = "float32" if exact else config["model"]["compute_dtype"]
    try:
        report = verify(config, devices=jax.devices()[:devices], checks=["mesh"], seed=seed, compute_dtype=precision)
    except ConfigError as error:
        assert len(str(error)) > 30 and str(error).rstrip().endswith((".", ")")), f"not a sentence: {error}"
        return "refused"
    assert report.passed, report.table()
    return "verified"


@pytest.mark.parametrize("seed", [*DEFAULT_SEEDS, *(pytest.param(seed, marks=pytest.mark.slow) for seed in MORE_SEEDS)])
def test_random_composition(seed):
    assert check(seed, small=True) == ("refused" if seed in REFUSED else "verified")


@pytest.mark.slow
@pytest.mark.parametrize(
    "plant, seed", [(planted.state_gradient_stays, 6), (planted.gradient_of_another_stage, 12), (planted.exchanged_gradient_doubled, 23)]
)
def test_small_compositions_notice_planted_faults(plant, seed, monkeypatch):
    plant(monkeypatch)
    with pytest.raises(AssertionError, match="mesh FAILED"):
        check(seed, small=True)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SLOW_SEEDS)
def test_random_composition_slow(seed):
    check(seed)

"""Random compositions: mesh x pattern x packing x recomputation x layout x attention form x precision, odd sizes; against one device.

A composition that is not legal must be refused with a sentence, and the seed is part of every test's name.
"""
import jax
import numpy as np
import pytest

from effmodels.config import ConfigError
from effmodels.verify import verify
from tests.verify.cases import tiny

# Every axis, both mixers, experts, dropout, zigzag, zero1 once; 15, 16 and 19 are refused. About 35 s of one core; the slow ones 12 s each.
DEFAULT_SEEDS, SLOW_SEEDS = (0, 12, 15, 22), (1, 14, 16, 19, *range(1000, 1196))
REFUSED = (15, 16, 19)
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
PATTERNS = [("attention",), ("retention",), ("retention", "attention"), ("local", "attention"), ("retention", "local")]
CHANNEL_PATTERNS = [("mlp",), ("moe",), ("mlp", "moe")]


def composition(seed):
    """A run's config as a dict and the number of devices."""
    rng = np.random.default_rng(seed)

    def pick(options):
        return options[int(rng.integers(len(options)))]

    devices = pick((2, 4, 8, 8))
    mesh, left = dict.fromkeys(AXES, 1), devices
    while left > 1:
        mesh[pick(AXES)] *= 2
        left //= 2
    pattern, channel = pick(PATTERNS), pick(CHANNEL_PATTERNS)
    period = max(len(pattern), len(channel))
    model = {
        "pattern": pattern, "channel": channel, "num_layers": period * pick((1, 2)) * mesh["stage"], "d_model": pick((16, 24, 32)),
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
    return c, devices


def check(seed):
    """Verifies the composition, or sees it refused."""
    config, devices = composition(seed)
    print(f"seed {seed}: {devices} devices, {config['mesh']}, {config['parallel']}, remat {config['train']['remat']}, {config['model']}")
    # In bfloat16 many expert scores are near ties, and both choices are right.
    precision = "float32" if "moe" in config["model"]["channel"] else config["model"]["compute_dtype"]
    try:
        report = verify(config, devices=jax.devices()[:devices], checks=["mesh"], seed=seed, compute_dtype=precision)
    except ConfigError as error:
        assert len(str(error)) > 30 and str(error).rstrip().endswith((".", ")")), f"not a sentence: {error}"
        return "refused"
    assert report.passed, report.table()
    return "verified"


@pytest.mark.parametrize("seed", DEFAULT_SEEDS)
def test_random_composition(seed):
    assert check(seed) == ("refused" if seed in REFUSED else "verified")


@pytest.mark.slow
@pytest.mark.parametrize("seed", SLOW_SEEDS)
def test_random_composition_slow(seed):
    check(seed)

"""What the contract tests run over: every line of the registries with its default Config, and variants of kinds that have options.

A new mixer or channel mixer is covered by its registry line alone; a line in VARIANTS adds a configuration worth a test of its own.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effmodels.channel.registry import CHANNELS, get_channel
from effmodels.config import ModelConfig, build
from effmodels.layers.context import Ctx
from effmodels.mixers import registry
from effmodels.mixers.base import Env
from effmodels.mixers.registry import get_mixer
from effmodels.models import state as model_state

# What attends to a memory of the call does nothing without one; its own test gives it one and holds it to the same contract.
MIXERS = {kind: path for kind, path in registry.MIXERS.items() if kind != "cross_attention"}
D_MODEL = 32
WINDOW = 4
SLOW = {  # what they hold is in other cases too
    ("attention", "gqa_window"), ("attention", "no_positions"), ("attention", "mqa_sinks_qknorm"), ("attention", "window_0"),
    ("retention", "bare"), ("lightning", "minimax"), ("lightning", "ring"), ("local_global", "first"), ("local_global", "top_strided"),
    ("local_global", "every_strided_gate"), ("gated_delta", "grouped"), ("ssd", "groups"),
    ("block_sparse", "gqa"), ("mlp", "swiglu"), ("mlp", "geglu"), ("mlp", "relu2"), ("moe", "top1_raw"),
    ("local_global", "top_gate"), ("retention", "paper_chunk"), ("topk_sparse", "gqa"),
}  # fmt: skip

# A kernel whose slow twin is a scan, which the compiler's count sees once, is counted in another implementation without loops.
FLOPS_IMPLEMENTATION = {"gated_delta": "xla", "lightning": "xla", "retention": "xla", "ssd": "xla"}

# Compile time is nearly all of these tests' time: the compiler's least effort halves it and changes no test's outcome.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

MIXER_VARIANTS = {
    "attention": {
        "gqa_window": {"num_heads": 4, "num_kv_heads": 2, "window": WINDOW},
        "mqa_sinks_qknorm": {"num_heads": 3, "num_kv_heads": 1, "head_dim": 6, "sinks": True, "qk_norm": True},
        "everything": {
            "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "window": WINDOW, "sinks": True, "qk_norm": True, "bias": True,
            "soft_cap": 5.0, "rotary_fraction": 0.5, "scale": 0.3, "output_gate": True,
        },
        "window_0": {"num_heads": 2, "window": 0, "sinks": True},
        "no_positions": {"num_heads": 2, "rotary_fraction": 0.0, "soft_cap": 2.0},
    },
    "lightning": {
        "ring": {"num_heads": 6, "head_dim": 6, "value_dim": 5, "norm_groups": 2, "layer_factor": "ring", "slopes": "alibi"},
        "minimax": {"num_heads": 2, "qkv_activation": "silu", "scale": 1.0, "rotary_fraction": 0.0, "norm_groups": 1, "qk_norm": False},
    },
    "local_global": {
        "first": {"num_heads": 4, "num_kv_heads": 2, "window": 2, "num_first": 2, "sinks": True, "soft_cap": 5.0},
        "every_strided_gate": {"num_heads": 2, "window": 2, "stride": 2, "globals": "every", "every": 3, "gate": True},
        "top_gate": {"num_heads": 2, "window": 1, "globals": "top", "top_block": 2, "top_ratio": 0.5, "gate": True},
        "top_strided": {"num_heads": 2, "window": 2, "stride": 1, "globals": "top", "top_block": 2, "top_ratio": 0.34},
    },
    "topk_sparse": {"gqa": {"num_heads": 4, "num_kv_heads": 2, "top_k": 3, "index_heads": 2, "index_dim": 6, "qk_norm": True}},
    "block_sparse": {
        "gqa": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "window": 3, "block": 2, "top_blocks": 1, "qk_norm": True},
    },
    "gated_delta": {"grouped": {"num_heads": 2, "num_value_heads": 4, "head_dim": 5, "value_dim": 3, "conv_width": 3, "chunk": WINDOW}},
    "latent": {"deepseek": {"num_heads": 2, "rope_dim": 4, "value_dim": 3, "kv_rank": 12, "q_rank": 6, "rope_interleaved": True}},
    "retention": {
        "paper_chunk": {"num_heads": 3, "head_dim": 6, "value_dim": 5, "decay": "paper", "chunk": WINDOW},
        "bare": {"num_heads": 2, "gate": False, "head_norm": False, "decay": (0.5, 1.0)},
    },
    "ssd": {
        "groups": {
            "num_heads": 4, "head_dim": 3, "state_dim": 5, "groups": 2, "norm": "before_gate", "norm_groups": 2, "chunk": WINDOW,
            "conv_width": 3, "conv_bias": False, "bias": True, "dt_min": 0.1,
        },
    },
}  # fmt: skip

CHANNEL_VARIANTS = {
    "mlp": {name: {"hidden": 24, "activation": name} for name in ("swiglu", "geglu", "gelu", "relu2")},
    "moe": {
        "sigmoid_groups": {
            "num_experts": 6, "top_k": 2, "hidden": 10, "router": "sigmoid", "groups": 3, "top_groups": 2, "routed_scaling": 2.5,
            "bias_update_rate": 1e-3, "shared_experts": 2, "z_coef": 1e-3,
        },
        "top1_raw": {"num_experts": 5, "top_k": 1, "hidden": 8, "normalize_weights": False, "activation": "relu2", "balance": "batch"},
        "capacity": {"num_experts": 4, "top_k": 2, "hidden": 8, "capacity_factor": 0.75, "balance_coef": 0.0},
        "biases": {
            "num_experts": 5, "top_k": 2, "hidden": 8, "activation": "swiglu_clamped", "swiglu_limit": 0.7, "bias": True,
            "router_bias": True,
        },
    },
}  # fmt: skip


def cases(registry, variants):
    """pytest parameters (kind, fields), named kind-variant."""
    found = [pytest.param(kind, {}, id=f"{kind}-default") for kind in registry]
    for kind, named in variants.items():
        for name, fields in named.items():
            found.append(pytest.param(kind, fields, id=f"{kind}-{name}", marks=[pytest.mark.slow] if (kind, name) in SLOW else []))
    return found


MIXER_CASES = cases(MIXERS, MIXER_VARIANTS)
CHANNEL_CASES = cases(CHANNELS, CHANNEL_VARIANTS)


def make(kind, fields, get=get_mixer, dtype="float64", implementation=None):
    """(graphdef, params, buffers) of one layer, the parameters as `fill` draws them."""
    cls = get(kind)
    env = Env(d_model=D_MODEL, num_layers=3, param_dtype=dtype, implementation=implementation)
    config = build(cls.Config, fields, kind)
    cls.check(config, env)
    return fill(lambda: cls(config, env, rngs=nnx.Rngs(0)))


def make_channel(kind, fields, **options):
    return make(kind, fields, get_channel, **options)


def fill(build_model, seed=1):
    """(graphdef, params, buffers) of a module, drawn by numpy: nothing is compiled, and no initial zero or one hides a wrong term."""
    rng, model = np.random.default_rng(seed), nnx.eval_shape(build_model)
    graphdef, params, buffers = model_state.split(model)
    infos = model_state.info(model)

    def values(path, a):
        sizes = dict(zip(infos[path].dim_names, a.shape))
        fan_in = np.prod([sizes[d] for d in infos[path].in_dims])
        noise = rng.normal(size=a.shape) * (fan_in**-0.5 if infos[path].in_dims else 0.2)
        return (noise + path.endswith("scale")).astype(a.dtype)

    return graphdef, {p: values(p, a) for p, a in params.items()}, {p: np.zeros(b.shape, b.dtype) for p, b in buffers.items()}


def draw(*shape, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def jacobian(f, x):
    """d f(x)[t] / d x for every entry t of f's vector, one vector-Jacobian product after the other."""
    y, pull = jax.vjp(f, x)
    return jax.lax.map(lambda row: pull(row)[0], jnp.eye(y.shape[0], dtype=y.dtype))


def decode_ctx(valid_BT, before_B=0, mode="prefill"):
    """The context that a decoder gives to a mixer's prefill and step."""
    index_BT = before_B + jnp.cumsum(valid_BT, axis=1, dtype=jnp.int32) - valid_BT
    return Ctx(positions_BT=index_BT, index_BT=index_BT, segment_ids_BT=valid_BT.astype(jnp.int32), mode=mode)


def all_kinds_config(repeats=1, **fields):
    """A ModelConfig in which every registered mixer and every registered channel mixer occurs, `repeats` times over."""
    period = max(len(MIXERS), len(CHANNELS))
    mixers, channels = sorted(MIXERS), sorted(CHANNELS)
    defaults = {
        "vocab_size": 62, "d_model": D_MODEL, "num_layers": period * repeats,
        "pattern": tuple(mixers[i % len(mixers)] for i in range(period)),
        "channel": tuple(channels[i % len(channels)] for i in range(period)),
        "param_dtype": "float64", "compute_dtype": "float64",
    }  # fmt: skip
    return ModelConfig(**{**defaults, **fields})


def packed_batch(B, T, vocab, seed=0):
    """Rows of documents of random lengths with padding behind: tokens, targets, weights, segment_ids, positions."""
    rng = np.random.default_rng(seed)
    segments, positions = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
    for b in range(B):
        at, document = 0, 0
        while at < T - b % 3:
            n = min(int(rng.integers(1, T)), T - b % 3 - at)
            document += 1
            segments[b, at : at + n], positions[b, at : at + n] = document, np.arange(n)
            at += n
    follows = np.concatenate([segments[:, 1:] == segments[:, :-1], np.zeros((B, 1), bool)], axis=1)
    tokens = rng.integers(0, vocab, (B, T)).astype(np.int32) * (segments > 0)
    return {
        "tokens": tokens, "targets": np.roll(tokens, -1, axis=1), "weights": (follows & (segments > 0)).astype(np.float32),
        "segment_ids": segments, "positions": positions,
    }  # fmt: skip


def loss_and_grads(graphdef, key_seed=None):
    """A function of (params, buffers, batch): ((total, (ce_sum, weight_sum, losses, load, metrics)), gradients)."""

    def total(params, buffers, batch):
        key = None if key_seed is None else jax.random.key(key_seed, impl="threefry2x32")
        out = model_state.merge(graphdef, params, buffers).loss(batch, key=key)
        return out.total_sum, (out.ce_sum, out.weight_sum, out.aux.losses, out.aux.load_LE, out.aux.metrics)

    return jax.value_and_grad(total, has_aux=True)

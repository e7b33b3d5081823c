"""The contract of a channel mixer. Letters: B batch, T time, D model, E experts."""
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerAux:
    """What one layer reports besides its output: weighted losses (sums over valid tokens), tokens per expert, scalar metrics."""

    losses: Any
    load_E: Any
    metrics: Any


class ChannelMixer(nnx.Module):
    """Base of all channel mixers; a subclass has a frozen dataclass `Config`, and `__init__(self, config, env, *, rngs)`.

    `__call__(x_BTD, ctx)` returns (y_BTD, LayerAux or None). It keeps no state between tokens, so training and decoding share it.
    """

    Config: Any = None
    absent = False  # True: the layer ends with its token mixer, without a second norm and residual
    reports_load = False  # True: every call returns a LayerAux with load_E over config.num_experts

    @classmethod
    def check(cls, config, env):
        """Raises ConfigError when the config does not fit the model; called before anything is built."""

    def __call__(self, x_BTD, ctx):
        raise NotImplementedError

    @classmethod
    def cost(cls, config, env, seq_len, dtype_bytes=2):
        """The `Cost` of one layer."""
        raise NotImplementedError


def _relu_squared(x):
    return jnp.square(jax.nn.relu(x))


def _gelu_exact(x):
    return jax.nn.gelu(x, approximate=False)


def _swiglu_clamped(gate, up, swiglu_alpha=1.702, swiglu_limit=7.0):
    """g sigmoid(alpha g) (u + 1) of a gate g that is at most limit and u between -limit and limit (gpt-oss, arXiv:2508.10925)."""
    gate, up = jnp.minimum(gate, swiglu_limit), jnp.clip(up, -swiglu_limit, swiglu_limit)
    # In float32: alpha itself would be rounded to bfloat16.
    wide = gate.astype(jnp.promote_types(gate.dtype, jnp.float32))
    return gate * jax.nn.sigmoid(swiglu_alpha * wide).astype(gate.dtype) * (up + 1)


# name -> (function of one array per input matrix, number of input matrices)
ACTIVATIONS = {
    "swiglu": (lambda gate, up: jax.nn.silu(gate) * up, 2),  # arXiv:2002.05202
    "geglu": (lambda gate, up: jax.nn.gelu(gate) * up, 2),
    "geglu_exact": (lambda gate, up: _gelu_exact(gate) * up, 2),
    "gelu": (jax.nn.gelu, 1),
    "gelu_exact": (_gelu_exact, 1),
    "relu2": (_relu_squared, 1),  # arXiv:2109.08668
    "swiglu_clamped": (_swiglu_clamped, 2),
}
# Fields of a Config that an activation takes besides.
ACTIVATION_FIELDS = {"swiglu_clamped": ("swiglu_alpha", "swiglu_limit")}


def activation(config):
    """(function of one array per input matrix, number of input matrices) of a Config with `activation` and the fields that it takes."""
    function, inputs = ACTIVATIONS[config.activation]
    return functools.partial(function, **{n: getattr(config, n) for n in ACTIVATION_FIELDS.get(config.activation, ())}), inputs

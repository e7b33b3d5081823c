"""Initial rates and step sizes of state-space layers (Mamba, arXiv:2312.00752, section 3.6; Mamba-2, arXiv:2405.21060)."""
import math

import jax
import jax.numpy as jnp

RATES = (1.0, 16.0)
STEPS = (1e-3, 1e-1)


def log_rates(key, shape, dtype):
    """Initialiser of A_log: the logarithm of rates that are uniform in RATES."""
    return jnp.log(jax.random.uniform(key, shape, jnp.float32, *RATES)).astype(dtype)


def step_biases(key, shape, dtype):
    """Initialiser of dt_bias: softplus(dt_bias) is uniform in its logarithm in STEPS."""
    step = jnp.exp(jax.random.uniform(key, shape, jnp.float32, math.log(STEPS[0]), math.log(STEPS[1])))
    return (step + jnp.log(-jnp.expm1(-step))).astype(dtype)

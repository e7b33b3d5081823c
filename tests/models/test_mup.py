"""muP's coordinate check (arXiv:2203.03466, appendix D.1): the size of what one Adam step changes does not grow with width."""
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from effmodels.models import Decoder, state
from effmodels.train.optim import make_optimizer

WIDTHS, BASE = (128, 256, 512), 32


def change_after_steps(width, mup, steps=1):
    """RMS of the change of the logits after Adam steps on one batch."""
    config = {
        "vocab_size": 64, "d_model": width, "num_layers": 2, "pattern": ("attention", "retention"), "channel": ("mlp",),
        "mixers": {"attention": {"num_heads": 4}, "retention": {"num_heads": 4}}, "channels": {"mlp": {"hidden": 2 * width}},
        "mup_base_width": BASE if mup else None, "embed_scale": width**0.5,
    }  # fmt: skip
    model = Decoder(config, rngs=nnx.Rngs(0))
    graphdef, params, buffers = state.split(model)
    infos, shapes = state.info(model), {p: a.shape for p, a in params.items()}
    optim = {"name": "adam", "lr": 3e-3, "schedule": "constant", "warmup_steps": 0}
    optimizer = make_optimizer(optim, infos, shapes, steps, mup_width_multiplier=width / BASE if mup else None)
    tokens = jax.random.randint(jax.random.key(1), (4, 17), 0, 64)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}

    @jax.jit
    def step(params, opt_state):
        grads = jax.grad(lambda p: state.merge(graphdef, p, buffers).loss(batch).total_sum / tokens.size)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    logits = jax.jit(lambda p: state.merge(graphdef, p, buffers)(batch["tokens"]))
    before, opt_state = logits(params), optimizer.init(params)
    for _ in range(steps):
        params, opt_state = step(params, opt_state)
    return float(jnp.sqrt(jnp.mean((logits(params) - before) ** 2)))


@pytest.mark.slow
def test_coordinate_check():
    """Log-log slope of the change against width: it does not grow with muP, and grows like the root of the width without.

    Measured from 32 to 512 on, halving by halving: -0.39, -0.45, -0.24, -0.23 with muP (finite-width terms die out), 0.81, 0.71, 0.59, 0.54
    without.
    """
    slopes = {}
    for mup in (True, False):
        changes = [change_after_steps(width, mup) for width in WIDTHS]
        slopes[mup] = np.polyfit(np.log(WIDTHS), np.log(changes), 1)[0]
    assert -0.35 < slopes[True] < 0.05, slopes
    assert slopes[False] > 0.4, slopes

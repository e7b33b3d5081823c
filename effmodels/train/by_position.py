"""The loss by how many tokens of its document come before: does a model use what is far away, and does it survive rows longer than its own.

Letters: B batch, T time.
"""
import dataclasses
import math

import jax
import numpy as np
from flax import nnx

from effmodels.config import ConfigError
from effmodels.layers.positions import rope_scaling
from effmodels.models import Decoder
from effmodels.models import state as model_state
from effmodels.models.resolve import resolve
from effmodels.train import sources


@dataclasses.dataclass(frozen=True)
class Bin:
    """Tokens with first <= position <= last in their document: how many were predicted, and their mean loss in nats."""

    first: int
    last: int
    tokens: float
    loss: float


def loss_by_position(model, batches):
    """[Bin] with edges at powers of two: 0, 1, 2..3, 4..7, ...; batches: dicts as of `data.batches`. Empty bins are left out."""
    graphdef, params, buffers = model_state.split(model)

    @jax.jit
    def losses(params, buffers, batch):
        def ce_sum(weights_BT):
            return model_state.merge(graphdef, params, buffers).loss(batch | {"weights": weights_BT}, mode="eval").ce_sum

        return jax.grad(ce_sum)(batch["weights"])  # the sum of w ce is linear in w: what is left are the losses

    names = ("tokens", "targets", "weights", "segment_ids", "positions", *sources.arrays(model.config))
    sums, counts = np.zeros(64), np.zeros(64)
    for batch in batches:
        batch = {name: np.asarray(batch[name]) for name in names}
        ce_BT = np.asarray(losses(params, buffers, batch | {"weights": batch["weights"].astype(np.float32)}), np.float64)
        bin_BT = np.ceil(np.log2(batch["positions"] + 1)).astype(int)
        sums += np.bincount(bin_BT.ravel(), (batch["weights"] * ce_BT).ravel(), 64)
        counts += np.bincount(bin_BT.ravel(), batch["weights"].ravel(), 64)
    return [Bin(2**i // 2, 2**i - 1, counts[i], sums[i] / counts[i]) for i in np.flatnonzero(counts).tolist()]


def with_rope_scaling(model, scaling):
    """The model with the same arrays and `scaling` (fields of `RopeScaling`) in every mixer that rotates by RoPE.

    Raises ConfigError where no mixer does.
    """
    extended = dataclasses.replace(model.config, mixers=scaled_mixers(model.config, scaling))
    graphdef = model_state.split(nnx.eval_shape(lambda: Decoder(extended, rngs=nnx.Rngs(0))))[0]
    return model_state.merge(graphdef, *model_state.split(model)[1:])


def scaled_mixers(c, scaling):
    """`mixers` of a ModelConfig with `scaling` where a mixer rotates by RoPE; raises ConfigError where none does."""
    rope_scaling(scaling)
    mixers = {}
    for name, config in {k.mixer.name: k.mixer.config for k in resolve(c).layers}.items():
        fields = dict(c.mixers.get(name, {}))
        mixers[name] = fields | ({"rope_scaling": dict(scaling)} if hasattr(config, "rope_scaling") else {})
    if not any("rope_scaling" in fields for fields in mixers.values()):
        raise ConfigError(f"rope_scaling: no mixer of this model rotates by RoPE ({', '.join(mixers)}); leave it out.")
    return {**c.mixers, **mixers}


def table(bins):
    """The bins as text."""
    rows = [f"{'position':>15} {'tokens':>10} {'loss':>8} {'perplexity':>11}"]
    for b in bins:
        where = str(b.first) if b.first == b.last else f"{b.first}..{b.last}"
        rows.append(f"{where:>15} {b.tokens:>10,.0f} {b.loss:>8.4f} {math.exp(min(b.loss, 700.0)):>11.2f}")
    return "\n".join(rows)

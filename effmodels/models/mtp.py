"""Multi-token prediction: modules behind the last layer that predict tokens after the next one, with the model's own table and head.

    model.mtp = {"depth": 1, "weight": 0.3}

"sequential" (DeepSeek-V3, arXiv:2412.19437, equations 21 to 25): module k joins what module k - 1, at first the model, made of token i with
the embedding of token i + k, and predicts token i + k + 1. "parallel" (arXiv:2404.19737): every module reads the model's output for token
i; the next-token head's own layer is then the model's last one. `decode.speculate` uses the modules to draft.
Letters: B batch, T time, D model.
"""
import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from effmodels.config import ConfigError, build, nearest
from effmodels.layers.context import dropout
from effmodels.layers.linear import dot
from effmodels.layers.norms import NORMS
from effmodels.layers.param import param
from effmodels.models.blocks import Block
from effmodels.parallel import layouts, stack
from effmodels.parallel.axes import shard, shards

FORMS = ("sequential", "parallel")
DROPOUT_JOINED = 3  # site of Ctx.key_for, besides those of a block


@dataclasses.dataclass(frozen=True)
class MTP:
    """The checked `model.mtp`. depth: modules, 0: none; weight: of their mean loss; mixer, channel: of their layers, None: as the last."""

    depth: int = 0
    weight: float = 0.3
    form: str = "sequential"
    mixer: str | None = None
    channel: str | None = None


def check(mapping):
    """The `MTP` of a mapping; raises ConfigError naming the field."""
    mtp = build(MTP, mapping, "model.mtp")
    if mtp.depth < 0 or mtp.weight < 0:
        raise ConfigError(f"model.mtp: expected depth >= 0 and weight >= 0, got depth={mtp.depth}, weight={mtp.weight}.")
    if mtp.form not in FORMS:
        raise ConfigError(f"model.mtp.form: unknown {mtp.form!r}.{nearest(mtp.form, FORMS)}")
    return mtp


class Module(nnx.Module):
    """Module `number` (from 1) of `depth`; as a layer it is the one behind the last, as a segment of layers it has one."""

    period = repeats = 1

    def __init__(self, number, resolved, key):
        c, rngs = resolved.config, nnx.Rngs(key)
        self.number, self.start, self.rate, self.remat = number, c.num_layers + number - 1, c.dropout, c.remat
        self.sequential = check(c.mtp).form == "sequential"

        def norm():
            return NORMS[c.norm](c.d_model, rngs=rngs, eps=c.norm_eps, offset=c.norm_offset, param_dtype=c.param_dtype)

        if self.sequential:
            self.norm_embed, self.norm_hidden = norm(), norm()
            shape = (2 * c.d_model, c.d_model)  # rows of the embedding first
            self.w_join = param(jax.random.normal, rngs.params(), shape, ("embed", None), in_dims=("embed",), dtype=c.param_dtype)
        self.layer = Block(resolved.ahead, resolved, rngs=rngs)
        self.norm_out = norm()

    @property
    def blocks(self):
        """As of a segment."""
        return (self.layer,)

    def __call__(self, hidden_BTD, embedded_BTD, ctx):
        """(hidden_BTD of this module, LayerAux or None); embedded: of the tokens `number` later, unused in the parallel form."""

        def run(state, hidden_BTD, embedded_BTD):
            module = nnx.merge(graphdef, state)
            x_BTD = dropout(module.joined(hidden_BTD, embedded_BTD), module.rate, ctx.key_for(DROPOUT_JOINED), ctx.layout)
            y_BTD, aux = module.layer(x_BTD, ctx)
            return module.norm_out(y_BTD), aux

        graphdef, state = nnx.split(self)
        return stack.checkpointed(run, self.remat)(state, hidden_BTD, embedded_BTD)

    def prefill(self, hidden_BTD, embedded_BTD, ctx, state, valid_BT):
        """(hidden_BTD of this module, state of its mixer) while decoding."""
        y_BTD, state = self.layer.prefill(self.joined(hidden_BTD, embedded_BTD), ctx, state, valid_BT)
        return self.norm_out(y_BTD), state

    def joined(self, hidden_BTD, embedded_BTD):
        """What the module's layer reads."""
        if not self.sequential:
            return hidden_BTD
        both = jnp.concatenate([self.norm_embed(embedded_BTD), self.norm_hidden(hidden_BTD)], axis=-1)
        return shard(dot("BTI,ID->BTD", both, self.w_join), "batch", "res_seq", "act_embed")


def losses(model, hidden_BTD, ctx, tokens_BT, targets_BT, weights_BT):
    """({"mtp_<k>": sum over tokens of weight / depth times module k's cross entropy}, [LayerAux of each module]) of a Decoder.

    Token i counts for module k if token i + k is of its document (then it has the weight of token i + k) and is padding otherwise: so are
    the last k tokens of every document. Division by the step's target tokens makes it the loss of equations 24 and 25.
    """
    mtp, found, auxes, h_BTD = check(model.config.mtp), {}, [], hidden_BTD
    segment_BT = jnp.ones(tokens_BT.shape, jnp.int32) if ctx.segment_ids_BT is None else ctx.segment_ids_BT
    for module in model.mtp:
        k = module.number
        inside_BT = (later(segment_BT, k, ctx) == segment_BT) & (segment_BT > 0)
        # Routers given a choice of experts are those of the model's layers.
        at = dataclasses.replace(ctx, segment_ids_BT=jnp.where(inside_BT, segment_BT, 0), experts_BTLk=None).at_layer(module.start)
        embedded_BTD = model.embedded(later(tokens_BT, k, ctx)) if module.sequential else None
        h_BTD, aux = module(h_BTD if module.sequential else hidden_BTD, embedded_BTD, at)
        weight_BT = later(weights_BT, k, ctx) * inside_BT
        found[f"mtp_{k}"] = mtp.weight / mtp.depth * model.head_loss(h_BTD, later(targets_BT, k, ctx), weight_BT)[0]
        auxes.append((aux,))
    return found, auxes


def later(a_BT, k, ctx):
    """What is k tokens later in the row, zero at its end; in the layout of ctx."""
    pieces, T = shards("seq") if ctx.layout != "contiguous" else 1, a_BT.shape[1]
    row_BT = layouts.from_layout(a_BT, ctx.layout, pieces)
    return layouts.to_layout(jnp.pad(row_BT, ((0, 0), (0, k)))[:, k : k + T], ctx.layout, pieces)

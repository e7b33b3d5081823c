"""The decoder: embedding, segments of layers, head; one loss, and decoding with a state.

Letters: B batch, T time, D model, V vocab, L layers, E experts.
"""
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from effmodels.channel.routers import updated_bias
from effmodels.config import ConfigError
from effmodels.layers import head
from effmodels.layers.context import Ctx, dropout
from effmodels.layers.norms import NORMS
from effmodels.layers.param import param
from effmodels.models import memory as memories
from effmodels.models import mtp, sharing, staged
from effmodels.models.blocks import Segment, lent, segments
from effmodels.models.resolve import resolve
from effmodels.multimodal.media import Media
from effmodels.parallel import layouts, ops, options
from effmodels.parallel.axes import shard, shards

DROPOUT_EMBED = 2  # site of Ctx.key_for
EVAL_MICRO_BATCHES_PER_STAGE = 4  # of an evaluation's rows, at most: few ticks without work, matmuls still large


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Aux:
    """What the layers report. losses: {name: scalar}, weighted, in the unit of ce_sum (a sum over tokens). load_LE: routed choices per MoE
    layer (absolute order) and expert, or None. metrics: {name: [L]} over the same layers."""

    losses: Any
    load_LE: Any
    metrics: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossOut:
    """Sums, so that micro-batches and devices add up: the step's loss is total_sum over everything / weight_sum over everything."""

    ce_sum: Any
    weight_sum: Any
    aux: Aux

    @property
    def total_sum(self):
        """What is differentiated: cross entropy and auxiliary losses, both summed over tokens."""
        return self.ce_sum + sum(self.aux.losses.values())

    @property
    def loss(self):
        """Mean cross entropy per target token, in nats."""
        return self.ce_sum / jnp.maximum(self.weight_sum, 1e-9)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """The mixers' states by segment and place, the valid tokens of each row, how many fit, memories no layer has read yet, kept images."""

    layers: Any
    length_B: Any
    max_len: int = dataclasses.field(metadata={"static": True})
    memory: Any = dataclasses.field(default_factory=dict)


class Decoder(nnx.Module):
    """A causal language model from a ModelConfig (or its mapping); raises ConfigError before any array is made."""

    def __init__(self, config, *, rngs):
        self.resolved = resolve(config)
        c = self.config = self.resolved.config
        self.embed = param(
            jax.random.normal, rngs.params(), (c.vocab_size, c.d_model), ("vocab", "embed"), in_dims=("embed",), dtype=c.param_dtype
        )  # fmt: skip
        if not c.tie_embeddings:
            self.head = param(
                jax.random.normal, rngs.params(), (c.d_model, c.vocab_size), ("embed", "vocab"), in_dims=("embed",), dtype=c.param_dtype
            )  # fmt: skip
        if c.learned_positions:
            self.positions = param(
                jax.random.normal, rngs.params(), (c.learned_positions, c.d_model), (None, "embed"), in_dims=("embed",), dtype=c.param_dtype
            )  # fmt: skip
        self.final_norm = NORMS[c.norm](c.d_model, rngs=rngs, eps=c.norm_eps, param_dtype=c.param_dtype, offset=c.norm_offset)
        layer_key = rngs.params()
        runs = segments(self.resolved.layers, c.scan_layers)
        held, sources = sharing.sources(runs, self.resolved.layers)
        self.segments = nnx.List([Segment(run, self.resolved, layer_key, chosen) for run, chosen in zip(runs, sources)])
        self.shared = nnx.List([lent(self.resolved, layer_key, owner, parts) for owner, parts in held])
        ahead = range(1, mtp.check(c.mtp).depth + 1)
        self.mtp = nnx.List([mtp.Module(k, self.resolved, jax.random.fold_in(layer_key, c.num_layers + k - 1)) for k in ahead])
        images = self.resolved.media
        self.media = None if images is None else Media(images, self.resolved.env, c.compute_dtype, c.remat, rngs=rngs)

    def __call__(self, tokens_BT, segment_ids=None, positions=None, memory=None):
        """float32 logits [B, T, V]; memory: {name: Memory} for layers that attend to one."""
        layout, pieces = _layout(), shards("seq")
        tokens_BT, segment_ids, positions = (
            None if a is None else layouts.to_layout(a, layout, pieces) for a in (tokens_BT, segment_ids, positions)
        )
        memory = memories.checked(memory, self.resolved)
        hidden_BTD, _ = self.hidden(tokens_BT, segment_ids_BT=segment_ids, positions_BT=positions, memory=memory, mode="eval")
        return layouts.from_layout(self.logits(hidden_BTD), layout, pieces)

    def hidden(self, tokens_BT, **ctx_fields):
        """(hidden_BTD after the final norm, Aux); ctx_fields are those of `Ctx`.

        Everything [B, T] is in the layout in force (`parallel.options`), in which the data path puts it; so is the result.
        """
        if ctx_fields.setdefault("layout", _layout()) != _layout():
            raise ValueError(f"layout={ctx_fields['layout']!r}, but the layout in force is {_layout()!r}; say it by `parallel.options`.")
        if staged.stages() > 1:
            return self._staged_hidden(tokens_BT, ctx_fields)
        hidden_BTD, auxes = self._hidden(tokens_BT, Ctx(**ctx_fields))
        return hidden_BTD, _gather_aux(auxes, self.segments)

    def _hidden(self, tokens_BT, ctx):
        x_BTD = self._embed(tokens_BT, ctx)
        auxes = []
        for segment in self.segments:
            x_BTD, aux = segment(x_BTD, ctx, self.shared)
            auxes.append(aux)
        return self.final_norm(x_BTD), auxes

    def logits(self, hidden_BTD):
        """float32 logits [B, T, V] of the hidden states that `hidden` returns."""
        c = self.config
        weight = self.embed if c.tie_embeddings else self.head
        z_BTV = head.logits(hidden_BTD, weight, tied=c.tie_embeddings, soft_cap=c.logits_soft_cap, scale=self._head_scale())
        return shard(z_BTV, "batch", "seq", "act_vocab" if c.vocab_size % shards("act_vocab") == 0 else None)

    def loss(self, batch, key=None, mode="train"):
        """The one loss of train, plan, verify and compare: `LossOut` of a batch {tokens, targets, weights, segment_ids, positions} [B, T].

        weights, segment_ids and positions may be absent. Logits are never built. key: None for no dropout.
        `experts` [B, T, L, k], too, may be there: see `Ctx`; and source_x, source_segment_ids, source_index: see `models.memory`.
        Over the stages of a pipeline the batch may be micro-batches [M, B, T] with keys [M]: every entry of the result is then their sum.
        """
        batch = {name.removesuffix("_BT"): value for name, value in batch.items()}
        if batch.get("weights") is None:
            batch["weights"] = jnp.ones(batch["tokens"].shape, jnp.float32)
        if staged.stages() > 1:
            return self._staged_loss(batch, key, mode)
        ctx = Ctx(
            segment_ids_BT=batch.get("segment_ids"), positions_BT=batch.get("positions"), key=key, mode=mode, layout=_layout(),
            experts_BTLk=batch.get("experts"), memory=memories.of_batch(batch, self.resolved, self.media),
        )  # fmt: skip
        hidden_BTD, auxes = self._hidden(batch["tokens"], ctx)
        ce_sum, weight_sum, losses = self.head_loss(hidden_BTD, batch["targets"], batch["weights"])
        ahead, ahead_auxes = mtp.losses(self, hidden_BTD, ctx, batch["tokens"], batch["targets"], batch["weights"])
        aux = _gather_aux([*auxes, *ahead_auxes], [*self.segments, *self.mtp])
        aux.losses.update(losses | ahead)
        return LossOut(ce_sum, weight_sum, aux)

    def head_loss(self, hidden_BTD, targets_BT, weights_BT):
        """(sum of weighted cross entropy, sum of weights, {auxiliary loss: sum}) of what `hidden` returns."""
        c, weights_BT = self.config, weights_BT.astype(jnp.float32)
        scale = self._head_scale()
        ce_BT, lse_BT = ops.linear_cross_entropy(
            hidden_BTD if scale == 1.0 else hidden_BTD * scale,
            (self.embed if c.tie_embeddings else self.head)[...].astype(hidden_BTD.dtype),
            targets_BT, w_layout="VD" if c.tie_embeddings else "DV",
            logits_soft_cap=c.logits_soft_cap, implementation=c.implementation,
        )  # fmt: skip
        losses = {"z_loss": c.z_loss * jnp.sum(weights_BT * lse_BT**2)} if c.z_loss else {}
        return jnp.sum(weights_BT * ce_BT), jnp.sum(weights_BT), losses

    def _staged_loss(self, batch, key, mode):
        """`loss` over the stages of a pipeline; rows of an evaluation are micro-batches too, since none of its sums depends on that."""
        batch = {name: a for name, a in batch.items() if a is not None}
        if batch["tokens"].ndim == 2:
            split = key is None and mode == "eval"
            batch = staged.rows_as_micro_batches(batch, EVAL_MICRO_BATCHES_PER_STAGE * staged.stages() if split else 1)
            key = None if key is None else key[None]
        static = {"mode": mode, "layout": _layout()}
        fields = {"segment_ids_BT": batch.get("segment_ids"), "positions_BT": batch.get("positions"), "key": key}
        fields |= {"experts_BTLk": batch.get("experts"), "memory": memories.of_batch(batch, self.resolved, self.media)}

        def tail(x_BTD, ctx, targets_BT, weights_BT, *tokens_BT):
            hidden_BTD = self.final_norm(x_BTD)
            ce_sum, weight_sum, losses = self.head_loss(hidden_BTD, targets_BT, weights_BT)
            ahead, auxes = mtp.losses(self, hidden_BTD, ctx, *tokens_BT, targets_BT, weights_BT) if self.mtp else ({}, [])
            return ce_sum, weight_sum, losses | ahead, auxes

        arrays = (batch["targets"], batch["weights"], *([batch["tokens"]] if self.mtp else []))
        out, micro_Ks, auxes = staged.forward(self, batch["tokens"], fields, tail, arrays, **static)
        ce_sum, weight_sum, losses, ahead_auxes = staged.total(out, micro_Ks >= 0)
        aux = _gather_aux([*auxes, *ahead_auxes], [*self.segments, *self.mtp])
        aux.losses.update(losses)
        return LossOut(ce_sum, weight_sum, aux)

    def _staged_hidden(self, tokens_BT, ctx_fields):
        """`hidden` over the stages of a pipeline, as one micro-batch: the last one of what leaves it."""
        static = {name: ctx_fields.pop(name) for name in ("mode", "layout") if name in ctx_fields}
        fields = jax.tree.map(lambda a: a[None], ctx_fields)
        out, micro_Ks, auxes = staged.forward(self, tokens_BT[None], fields, lambda x, ctx: self.final_norm(x), **static)
        k, s = np.argwhere(micro_Ks == 0)[0]
        return out[k, s], _gather_aux(auxes, self.segments)

    def init_state(self, batch, max_len, dtype=None, memory=None):
        """The empty decoding state of `batch` sequences of up to max_len tokens; dtype of caches (default: the compute dtype)."""
        if memory is not None and not memories.readers(self.resolved):
            raise NotImplementedError("Decoder.init_state: no mixer of this model attends to a memory; leave memory=None.")
        dtype = self.config.compute_dtype if dtype is None else dtype
        layers = tuple(segment.init_state(batch, max_len, dtype) for segment in self.segments)
        return DecodeState(layers, jnp.zeros((batch,), jnp.int32), max_len, memories.for_decoding(memory, self.resolved, self.media))

    def prefill(self, tokens_BT, state, valid_BT=None, positions_BT=None, last_only=False):
        """(logits_BTV, state) after T more tokens, any T, callable again; with last_only logits_BV of each row's last valid token.

        valid_BT: False for padding, left, right or inside. positions_BT: for rotary; default: the number of valid tokens before each.
        """
        B, T = tokens_BT.shape
        hidden_BTD, state = self.prefill_hidden(tokens_BT, state, valid_BT, positions_BT)
        if last_only:
            last_B = T - 1 if valid_BT is None else T - 1 - jnp.argmax(valid_BT[:, ::-1], axis=1)
            return self.logits(hidden_BTD[jnp.arange(B), last_B][:, None])[:, 0], state
        return self.logits(hidden_BTD), state

    def prefill_hidden(self, tokens_BT, state, valid_BT=None, positions_BT=None):
        """(hidden_BTD after the final norm, state): `prefill` without the logits."""
        _check_whole_rows()
        valid = jnp.ones(tokens_BT.shape, bool) if valid_BT is None else valid_BT
        before_BT = state.length_B[:, None] + jnp.cumsum(valid, axis=1, dtype=jnp.int32) - valid
        self._check_room(state, tokens_BT.shape[1] if valid_BT is None else jnp.sum(valid, axis=1))
        ctx = dataclasses.replace(self.decode_ctx(before_BT, valid, positions_BT), memory=state.memory)
        x_BTD, layers = self._decode(self._embed(tokens_BT, ctx), ctx, state, lambda b, x, c, s: b.prefill(x, c, s, valid_BT))
        length_B = state.length_B + jnp.sum(valid, axis=1, dtype=jnp.int32)
        return self.final_norm(x_BTD), DecodeState(layers, length_B, state.max_len, memories.kept(state.memory))

    def step(self, tokens_B, state, active_B=None):
        """(logits_BV, state) after one more token; rows that are not active keep their state."""
        _check_whole_rows()
        memory = memories.kept(state.memory)
        if memory.keys() != state.memory.keys():
            raise ValueError("Decoder.step: the state's memory has not been read yet; prefill at least one token first.")
        self._check_room(state, 1 if active_B is None else active_B)
        active = jnp.ones(tokens_B.shape, bool) if active_B is None else active_B
        ctx = dataclasses.replace(self.decode_ctx(state.length_B[:, None], active[:, None], None, "step"), memory=memory)
        x_BD, layers = self._decode(self._embed(tokens_B[:, None], ctx)[:, 0], ctx, state, lambda b, x, c, s: b.step(x, c, s, active_B))
        logits_BV = self.logits(self.final_norm(x_BD)[:, None])[:, 0]
        return logits_BV, DecodeState(layers, state.length_B + active.astype(jnp.int32), state.max_len, memory)

    def update_buffers(self, buffers, load_LE):
        """The buffers (dict by path) after one optimiser step whose routed choices per MoE layer and expert were load_LE."""
        if load_LE is None:
            return buffers
        runs = [*self.segments, *self.mtp]
        buffers, rows = dict(buffers), _aux_rows(runs)
        for (s, p), layers in rows.items():
            block = f"segments.{s}.blocks.{p}" if s < len(self.segments) else f"mtp.{s - len(self.segments)}.layer"
            channel, path = runs[s].blocks[p].channel, f"{block}.channel.bias"
            if path in buffers:
                load = load_LE[jnp.asarray(layers), : channel.config.num_experts]
                load = load if runs[s].repeats > 1 else load[0]
                buffers[path] = updated_bias(buffers[path], load, channel.config.bias_update_rate)
        return buffers

    def embedded(self, tokens_BT):
        """Rows of the table [B, T, D] in the compute dtype, as the first layer reads them (without learned positions)."""
        return ops.embedding(self.embed[...], tokens_BT).astype(self.config.compute_dtype) * self.config.embed_scale

    def _embed(self, tokens_BT, ctx):
        x_BTD = self.embedded(tokens_BT)
        if self.media is not None and self.media.at_input:
            x_BTD = self.media.fuse(x_BTD, self._images(ctx), ctx)
        if self.config.learned_positions:
            x_BTD = x_BTD + self._positions(ctx, tokens_BT.shape).astype(x_BTD.dtype)
        key = ctx.at_layer(-1).key_for(DROPOUT_EMBED)
        return dropout(shard(x_BTD, "batch", "res_seq", "act_embed"), self.config.dropout, key, ctx.layout)

    def _images(self, ctx):
        """What the fusion at the input needs of the images of a call, or None without any."""
        if memories.SOURCE in ctx.memory:
            return self.media.prepare(ctx.memory[memories.SOURCE])
        return ctx.memory.get(memories.IMAGES)

    def _positions(self, ctx, shape):
        """Rows of the learned table; NaN past its end, so that what is too long inside jit cannot pass for a result."""
        rows = self.config.learned_positions
        if shape[1] > rows:
            raise ConfigError(f"model.learned_positions={rows}: a row of {shape[1]} tokens is longer.")
        return jnp.take(self.positions[...], ctx.rotary_positions(*shape), axis=0, mode="fill", fill_value=jnp.nan)

    def _decode(self, x, ctx, state, call):
        layers = []
        for segment, old in zip(self.segments, state.layers):
            x, new = segment.decode(x, ctx, old, call, self.shared)
            layers.append(new)
        return x, tuple(layers)

    def decode_ctx(self, index_BT, valid_BT, positions_BT=None, mode="prefill"):
        """The `Ctx` of tokens with these indices in their rows; positions default to them."""
        positions_BT = index_BT if positions_BT is None else positions_BT
        return Ctx(positions_BT=positions_BT, index_BT=index_BT, segment_ids_BT=valid_BT.astype(jnp.int32), mode=mode)

    def _check_room(self, state, new_tokens):
        """A full cache is an error on the host; inside jit the lengths are unknown and the caller keeps count."""
        if not any(kind.mixer.cls.fills(kind.mixer.config, state.max_len) for kind in self.resolved.layers):
            return
        longest = jnp.max(state.length_B + new_tokens)
        if not isinstance(longest, jax.core.Tracer) and int(longest) > state.max_len:
            raise ValueError(
                f"the decoding state holds max_len={state.max_len} tokens and this call would make a row {int(longest)} long; "
                "make it with a larger max_len."
            )

    def _head_scale(self):
        # muP (arXiv:2203.03466, table 8: std 1, multiplier 1/width), for a head drawn with std width^-1/2 and its rate scaled accordingly.
        c = self.config
        return 1.0 if c.mup_base_width is None else (c.mup_base_width / c.d_model) ** 0.5


def _check_whole_rows():
    if shards("seq") > 1:
        raise ConfigError(
            "decoding: rows of a few tokens cannot be split over a sequence axis; enter axes.use(mesh, axes.decode_rules(rules)), whose "
            "table splits none."
        )


def _layout():
    """In which order the tokens of every row are."""
    return options.current().layout if shards("seq") > 1 else "contiguous"


def _aux_rows(segs):
    """(segment, place in the period) -> rows of load_LE, for every layer that reports a load; absolute layer order."""
    layers = []
    for s, segment in enumerate(segs):
        for p, block in enumerate(segment.blocks):
            if block.channel.reports_load:
                layers += [(segment.start + r * segment.period + p, (s, p)) for r in range(segment.repeats)]
    rows = {}
    for row, (_, place) in enumerate(sorted(layers)):
        rows.setdefault(place, []).append(row)
    return rows


def _gather_aux(auxes, segs):
    """One Aux from the segments' LayerAux: losses added, loads and metrics put in absolute layer order."""
    losses, loads, metrics, layers = {}, [], {}, []
    for segment, by_place in zip(segs, auxes):
        for p, aux in enumerate(by_place):
            if aux is None:
                continue
            aux = aux if segment.repeats > 1 else jax.tree.map(lambda a: a[None], aux)
            layers += [segment.start + r * segment.period + p for r in range(segment.repeats)]
            for name, value in aux.losses.items():
                losses[name] = losses.get(name, 0.0) + jnp.sum(value)
            loads.append(aux.load_E)
            for name, value in aux.metrics.items():
                metrics.setdefault(name, []).append(value)
    if not layers:
        return Aux(losses, None, metrics)
    order = jnp.asarray(sorted(range(len(layers)), key=layers.__getitem__))
    experts = max(load.shape[-1] for load in loads)  # layers with fewer experts are padded with zeros
    load_LE = jnp.concatenate([jnp.pad(load, ((0, 0), (0, experts - load.shape[-1]))) for load in loads])[order]
    return Aux(losses, jax.lax.stop_gradient(load_LE), {name: jnp.concatenate(values)[order] for name, values in metrics.items()})

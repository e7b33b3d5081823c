"""Faults planted in the real code: each must exceed its bound tenfold, in the check that is about it, and be named.

Every fault is one that a training loss can hide.
"""
import types

import jax
import jax.numpy as jnp
import pytest

from effmodels.channel import moe
from effmodels.layers import context
from effmodels.mixers import attention
from effmodels.models import decoder
from effmodels.parallel import axes, exchange, expert, ops, pipeline, ring, stack, state_passing
from effmodels.train import checkpoint, setup, step
from effmodels.verify import verify
from effmodels.verify.case import Case
from tests.verify.cases import ATTENTION_ONLY, EXPERTS_ONLY, RETENTION_ONLY, tiny

MIXED = {"data": 2, "fsdp": 2, "tensor": 2}


class Patched(types.ModuleType):
    """A module with some names replaced, for one importing file."""

    def __init__(self, module, **names):
        super().__init__(module.__name__)
        self.__dict__.update(vars(module) | names)


def with_lax(monkeypatch, module, **names):
    monkeypatch.setattr(module, "jax", Patched(jax, lax=Patched(jax.lax, **names)))


def missing_psum(monkeypatch):
    with_lax(monkeypatch, expert, psum=lambda x, axes: x)


def doubled_psum(monkeypatch):
    psum = jax.lax.psum
    with_lax(monkeypatch, expert, psum=lambda x, axes: psum(psum(x, axes), axes))


def doubled_gradient(monkeypatch):
    """Expert weights whose gradients are summed twice on a mesh, while the loss is perfect."""
    original = moe.expert_ffn

    def planted(x, ids, weights, w_in, w_out, *rest, **options):
        if axes.current_mesh() is not None:
            w_out = 2 * w_out - jax.lax.stop_gradient(w_out)
        return original(x, ids, weights, w_in, w_out, *rest, **options)

    monkeypatch.setattr(moe, "expert_ffn", planted)


def missing_vocab_psum(monkeypatch):
    with_lax(monkeypatch, ops, psum=lambda x, axes: x)


def mask_off_by_one(monkeypatch):
    """The first token of every later shard believes that it is the last one of the shard before: that one sees it too early."""
    original = ops.layout_positions
    monkeypatch.setattr(ops, "layout_positions", lambda x_BT: early(original(x_BT)))


def ring_mask_off_by_one(monkeypatch):
    """The same in a ring, which counts the places of both sides itself."""
    original = ring._places
    monkeypatch.setattr(ring, "_places", lambda *shard: early(original(*shard)))


def early(place):
    return place - ((place % 16 == 0) & (place > 0))


def state_not_reset(monkeypatch):
    original = ops.retention
    monkeypatch.setattr(ops, "retention", lambda *args, segment_ids=None, **rest: original(*args, **rest))


def state_over_documents(monkeypatch):
    """A state that passes to the next shard although a document begins there."""
    original = state_passing._joined
    monkeypatch.setattr(state_passing, "_joined", lambda *args: jnp.ones_like(original(*args)))


def state_gradient_stays(monkeypatch):
    """States pass, their gradients do not: every shard trains as if the row began with it."""
    original = state_passing._pass_states

    def planted(*args, reverse=False):
        states = original(*args, reverse=reverse)
        return jnp.zeros_like(states) if reverse else states

    monkeypatch.setattr(state_passing, "_pass_states", planted)


def dropped_rows(monkeypatch):
    """An exchange with too little room that says nothing: tokens that found none get zeros."""
    original = expert._exchanged
    monkeypatch.setattr(exchange, "pair_rows", lambda batch, time, *_, **__: batch * time // 2)

    def planted(*args):
        y_MD, lost_M = original(*args)
        return y_MD, jnp.zeros_like(lost_M)

    monkeypatch.setattr(expert, "_exchanged", planted)


def exchanged_gradient_doubled(monkeypatch):
    original = exchange.Exchange.there

    def planted(self, rows_SD):
        rows_SD = original(self, rows_SD)
        return 2 * rows_SD - jax.lax.stop_gradient(rows_SD)

    monkeypatch.setattr(exchange.Exchange, "there", planted)


def bubbles_counted(monkeypatch):
    """What idle stages compute on copies counts in loads and auxiliary losses."""
    original = pipeline.Schedule.per_tick

    def planted(self):
        ticks = original(self)
        return ticks | {"real": ticks["real"] | True}

    monkeypatch.setattr(pipeline.Schedule, "per_tick", planted)


def another_micro_batch(monkeypatch):
    """Later stages take documents and positions of the micro-batch that the first stage works on."""
    original = pipeline.Schedule.per_tick

    def planted(self):
        ticks = original(self)
        return ticks | {"micro": ticks["micro"][:, :1].repeat(self.stages, axis=1)}

    monkeypatch.setattr(pipeline.Schedule, "per_tick", planted)


def gradient_of_another_stage(monkeypatch):
    """Activations go to the next stage; their gradients stay where they are."""
    forward = pipeline._shift
    shift = jax.custom_vjp(lambda x_sBTD, by: forward(x_sBTD, by), nondiff_argnums=(1,))
    shift.defvjp(lambda x_sBTD, by: (forward(x_sBTD, by), None), lambda by, _, g: (g,))
    monkeypatch.setattr(pipeline, "_shift", shift)


def backward_over_documents(monkeypatch):
    """Attention whose backward pass forgets the documents; the forward pass is right."""
    original = ops.attention

    def planted(q, k, v, *, segment_ids=None, **rest):
        right, wrong = original(q, k, v, segment_ids=segment_ids, **rest), original(q, k, v, **rest)
        return wrong + jax.lax.stop_gradient(right - wrong)

    monkeypatch.setattr(ops, "attention", planted)


def permuted_labels(monkeypatch):
    original = setup.Setup.put

    def planted(self, batches):
        batches = [batches] if isinstance(batches, dict) else batches
        undone = [b | {"targets": setup.layouts.from_layout(b["targets"], self.options.layout, self.sizes["seq"])} for b in batches]
        return original(self, undone)

    monkeypatch.setattr(setup.Setup, "put", planted)


def dropped_auxiliary_loss(monkeypatch):
    monkeypatch.setattr(decoder.LossOut, "total_sum", property(lambda self: self.ce_sum))


def stale_micro_batch_key(monkeypatch):
    """Every micro-batch of a step draws the masks of the first."""
    fold_in = jax.random.fold_in
    calls = []

    def planted(key, data):
        calls.append(data)
        return fold_in(key, data) if len(calls) % 2 else fold_in(key, 0)

    monkeypatch.setattr(step, "jax", Patched(jax, random=Patched(jax.random, fold_in=planted)))


def stale_layer_key(monkeypatch):
    monkeypatch.setattr(context.Ctx, "key_for", lambda self, site: None if self.key is None else jax.random.fold_in(self.key, site))


def wrong_scale(monkeypatch):
    """Gradients divided by the mean instead of the number of target tokens."""
    monkeypatch.setattr(step, "jnp", Patched(jnp, maximum=lambda a, b: jnp.maximum(a, b) / 2))


def mean_of_micro_batches(monkeypatch):
    """Each micro-batch is divided by its own tokens before it is added."""
    original = decoder.Decoder.loss

    def planted(self, batch, key=None, mode="train"):
        out = original(self, batch, key=key, mode=mode)
        if type(self) is decoder.Decoder:  # the reference
            return out
        w = jnp.maximum(out.weight_sum, 1.0)
        losses = {n: x / w for n, x in out.aux.losses.items()}
        return decoder.LossOut(out.ce_sum / w, out.weight_sum / w, decoder.Aux(losses, out.aux.load_LE, out.aux.metrics))

    monkeypatch.setattr(decoder.Decoder, "loss", planted)


def recomputed_otherwise(monkeypatch):
    """The backward pass recomputes a layer on activations rounded to bfloat16."""
    original = stack.checkpointed

    def planted(f, remat, in_scan=False):
        if remat == "none":
            return f

        def rounded(weights, x):
            y, aux = f(weights, x.astype(jnp.bfloat16).astype(x.dtype))
            return y + jax.lax.stop_gradient(f(weights, x)[0] - y), aux

        return original(rounded, remat, in_scan)

    monkeypatch.setattr(stack, "checkpointed", planted)


def ring_too_short(monkeypatch):
    """A window's cache forgets the oldest key that the next token still sees."""
    monkeypatch.setattr(attention, "_slots", lambda c, max_len: max_len if c.window is None else min(max_len, c.window - 1))


def moments_not_restored(monkeypatch):
    original = checkpoint.Checkpointer.restore

    def planted(self, *args, **kwargs):
        state, host, number = original(self, *args, **kwargs)
        return state.replace(opt_state=jax.tree.map(jnp.zeros_like, state.opt_state)), host, number

    monkeypatch.setattr(checkpoint.Checkpointer, "restore", planted)


def no_bfloat16(monkeypatch):
    """compute_dtype is accepted and not used."""
    original = Case.setup

    def planted(self, *args, compute_dtype=None, **fields):
        return original(self, *args, **fields)

    monkeypatch.setattr(Case, "setup", planted)


ALL_GATHER = {"attention": "all_gather"}
PLANTED = {
    "missing_psum": (missing_psum, tiny(MIXED, **EXPERTS_ONLY), "mesh", "forward pass differs on the mesh"),
    "doubled_psum": (doubled_psum, tiny({"data": 2, "tensor": 4}, **EXPERTS_ONLY), "mesh", "forward pass differs on the mesh"),
    "doubled_gradient": (doubled_gradient, tiny({"data": 8}, **EXPERTS_ONLY), "mesh", "summed twice"),
    "missing_vocab_psum": (missing_vocab_psum, tiny(MIXED, **ATTENTION_ONLY), "mesh", "forward pass differs on the mesh"),
    "mask_off_by_one": (
        mask_off_by_one, tiny({"data": 4, "seq": 2}, ALL_GATHER | {"layout": "contiguous"}, **ATTENTION_ONLY), "mesh",
        "an edge between sequence shards",
    ),
    "ring_mask_off_by_one": (
        ring_mask_off_by_one, tiny({"data": 4, "seq": 2}, {"layout": "contiguous"}, **ATTENTION_ONLY), "mesh",
        "an edge between sequence shards",
    ),
    "state_not_reset": (state_not_reset, tiny(**RETENTION_ONLY), "packed", "a mask or a state crosses the boundary"),
    "state_over_documents": (
        state_over_documents, tiny({"data": 4, "seq": 2}, **RETENTION_ONLY), "mesh", "the boundary is not respected",
    ),
    "state_gradient_stays": (
        state_gradient_stays, tiny({"data": 4, "seq": 2}, **RETENTION_ONLY), "mesh", "the fault is in a backward pass",
    ),
    "dropped_rows": (dropped_rows, tiny({"data": 4, "expert": 2}, **EXPERTS_ONLY), "mesh", "forward pass differs on the mesh"),
    "exchanged_gradient_doubled": (
        exchanged_gradient_doubled, tiny({"data": 4, "expert": 2}, **EXPERTS_ONLY), "mesh", "the fault is in a backward pass",
    ),
    "bubbles_counted": (bubbles_counted, tiny({"data": 4, "stage": 2}, **EXPERTS_ONLY), "mesh", "all loads together are 1."),
    "another_micro_batch": (
        another_micro_batch, tiny({"data": 4, "stage": 2}, **ATTENTION_ONLY), "mesh", "forward pass differs on the mesh stage=2",
    ),
    "gradient_of_another_stage": (
        gradient_of_another_stage, tiny({"data": 4, "stage": 2}, **ATTENTION_ONLY), "mesh", "the fault is in a backward pass",
    ),
    "backward_over_documents": (backward_over_documents, tiny(**ATTENTION_ONLY), "packed", "a backward pass crosses the boundary"),
    "permuted_labels": (
        permuted_labels, tiny({"data": 4, "seq": 2}, ALL_GATHER | {"layout": "zigzag"}, **ATTENTION_ONLY), "mesh",
        "`targets` was not permuted",
    ),
    "dropped_auxiliary_loss": (dropped_auxiliary_loss, tiny(**EXPERTS_ONLY), "accumulation", "without the auxiliary losses (moe_balance)"),
    "stale_micro_batch_key": (stale_micro_batch_key, tiny(**ATTENTION_ONLY, dropout=0.1), "accumulation", "stale key"),
    "stale_layer_key": (stale_layer_key, tiny(**ATTENTION_ONLY, dropout=0.1), "dropout", "stale key"),
    "wrong_scale": (wrong_scale, tiny(**ATTENTION_ONLY), "accumulation", "wrong scale"),
    "mean_of_micro_batches": (mean_of_micro_batches, tiny(**ATTENTION_ONLY), "accumulation", "wrong scale"),
    "recomputed_otherwise": (recomputed_otherwise, tiny(**ATTENTION_ONLY), "remat", "what is recomputed"),
    "ring_too_short": (
        ring_too_short, tiny(**ATTENTION_ONLY | {"mixers": {"attention": {"num_heads": 2, "window": 5}}}), "forms",
        "the logits differ from token",
    ),
    "moments_not_restored": (moments_not_restored, tiny(**ATTENTION_ONLY), "resume", "restored with other bits than saved: opt_state"),
    "no_bfloat16": (no_bfloat16, tiny(**ATTENTION_ONLY), "bf16", "compute_dtype has no effect"),
}


# One of each kind by default: a sum, a mask, a state, a label, a loss, a key, a scale, what is recomputed, what is restored.
DEFAULT = {
    "missing_psum", "ring_mask_off_by_one", "state_not_reset", "permuted_labels", "dropped_auxiliary_loss", "stale_micro_batch_key",
    "wrong_scale", "recomputed_otherwise", "moments_not_restored", "state_gradient_stays",
}  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in DEFAULT else pytest.mark.slow) for n in PLANTED])
def test_planted_fault_is_caught_and_named(name, monkeypatch):
    plant, config, check, says = PLANTED[name]
    plant(monkeypatch)
    report = verify(config, checks=[check], log=lambda *_: None)
    assert not report.passed, f"{name} went unseen:\n{report.table()}"
    failed = [r for r in report.outcomes[0].rows if not r.passed]
    exceeds = [r.value >= 10 * r.bound or r.note.startswith("at least") and r.value < r.bound / 10 for r in failed]
    assert any(exceeds), report.table()
    assert any(says in text for text in report.outcomes[0].explanations), report.table()

"""The ops under a mesh equal the ops without one, values and every gradient; also where a dim does not divide or two rules share an axis.

Letters: B batch, T time, N heads, K kv heads, H head dim, D model, V vocab, E experts, F ffn.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effmodels.config import ConfigError
from effmodels.parallel import axes, mesh, ops
from effmodels.parallel.expert import expert_ffn
from tests.contract.cases import draw, jit
from tests.numerics import assert_trees_close

B, T, D = 8, 6, 4
SEGMENTS = np.minimum(np.arange(T) // 2 + np.arange(B)[:, None] % 2, 2).astype(np.int32)
TOKENS = np.random.default_rng(0).integers(0, 12, (B, T)).astype(np.int32)


def attention(heads, kv_heads, **options):
    arrays = draw(B, T, heads, D), draw(B, T, kv_heads, D, seed=1), draw(B, T, kv_heads, 3, seed=2), draw(heads, seed=3)
    return arrays, lambda q, k, v, sinks: ops.attention(q, k, v, sinks=sinks, segment_ids=SEGMENTS, implementation="reference", **options)


def retention():
    arrays = draw(B, T, 4, D), draw(B, T, 4, D, seed=1), draw(B, T, 4, 3, seed=2), -np.abs(draw(4, seed=3)), draw(B, 4, D, 3, seed=4)
    return arrays, lambda q, k, v, decay, s: ops.retention(
        q, k, v, decay, initial_state=s, segment_ids=SEGMENTS, output_final_state=True, scale=1.0, implementation="reference"
    )


def cross_entropy(vocab, layout, **options):
    w = draw(D, vocab, seed=1) if layout == "DV" else draw(vocab, D, seed=1)
    labels = np.where(TOKENS % 5 == 0, -1, TOKENS % vocab)  # -1: no label
    return (draw(B, T, D), w), lambda x, w: ops.linear_cross_entropy(x, w, labels, w_layout=layout, implementation="reference", **options)


def embedding(vocab):
    return (draw(vocab, D),), lambda table: ops.embedding(table, TOKENS % vocab)


def experts(E=3, F=8):
    ids = np.stack([TOKENS % (E + 1), (TOKENS + 1) % (E + 1)], axis=-1)  # E: not routed
    arrays = draw(B, T, D), draw(B, T, 2, seed=1), draw(E, D, F, seed=2), draw(E, D, F, seed=3), draw(E, F, D, seed=4)
    return arrays, lambda x, weights, w_in, w_up, w_out: expert_ffn(
        x, ids, weights, (w_in, w_up), w_out, lambda a, b: jnp.tanh(a) * b, implementation="reference"
    )


TENSOR2, TENSOR4, MIXED = {"tensor": 2}, {"tensor": 4}, {"data": 2, "fsdp": 2, "tensor": 2}
VOCAB_ON_FSDP = {"vocab": ("tensor", "fsdp"), "act_vocab": ("tensor", "fsdp"), "embed": None}
CASES = {
    "attention": (attention(4, 4), MIXED, {}),
    "attention gqa": (attention(8, 4, local_window_size=2), TENSOR4, {}),
    "attention, fewer kv heads than tensor": (attention(8, 2), TENSOR4, {"kv_heads": None, "act_kv_heads": None}),
    "attention, kv heads that do not divide": (attention(12, 3), TENSOR4, {"kv_heads": None, "act_kv_heads": None}),
    "retention": (retention(), MIXED, {}),
    "cross entropy": (cross_entropy(12, "DV", logits_soft_cap=2.0), MIXED, {}),
    "cross entropy, tied": (cross_entropy(12, "VD"), TENSOR4, {}),
    "cross entropy, vocabulary 11, tokens divide": (cross_entropy(11, "DV"), TENSOR2, {}),
    "cross entropy, vocabulary 11, tokens do not divide": (cross_entropy(11, "VD"), TENSOR4, {}),
    "cross entropy, vocabulary on a batch axis": (cross_entropy(12, "DV"), MIXED, VOCAB_ON_FSDP),
    "embedding": (embedding(12), MIXED, {}),
    "embedding, vocabulary 11": (embedding(11), MIXED, {}),
    "embedding, vocabulary on a batch axis": (embedding(12), MIXED, VOCAB_ON_FSDP),
    "experts": (experts(), MIXED, {}),
    "experts, ffn on a batch axis": (experts(), MIXED, {"expert_mlp": ("tensor", "fsdp"), "embed": None}),
    "experts, ffn on a batch axis only": (experts(), MIXED, {"expert_mlp": "fsdp", "embed": None}),
}


@pytest.mark.parametrize("name", CASES)
def test_under_a_mesh_as_without(name, x64):
    (arrays, op), sizes, rules = CASES[name]

    def run(*arrays):
        out = op(*arrays)
        weights = [draw(*o.shape, seed=8 + i) for i, o in enumerate(jax.tree.leaves(out))]
        return sum(jnp.sum(o * w) for o, w in zip(jax.tree.leaves(out), weights)), out

    step = jit(functools.partial(jax.grad(run, argnums=tuple(range(len(arrays))), has_aux=True)))
    want = step(*arrays)
    with axes.use(mesh.make_mesh(sizes), rules):
        got = step(*arrays)
    assert_trees_close(got, want, rel=1e-12)


def test_a_batch_that_does_not_divide_says_so():
    message = r"tokens \('batch', 'seq'\): batch=3 cannot be split over 8"
    with axes.use(mesh.make_mesh({"data": 8})), pytest.raises(ConfigError, match=message):
        ops.embedding(jnp.zeros((12, D)), jnp.zeros((3, T), jnp.int32))

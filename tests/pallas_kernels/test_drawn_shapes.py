"""Shapes and options that nobody chose: hypothesis draws them, the interpreted TPU kernels must agree with the reference, gradients too.

B batch, T time, S keys, N heads, K kv heads, H head dim, P value dim; M rows, D in, F out, E experts, V vocab.
"""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pallas_kernels
from tests.numerics import assert_trees_close

length, size, seed = st.integers(1, 300), st.integers(1, 140), st.integers(0, 2**31)


def drawn(examples):
    # derandomize: the same shapes in every run; a failure prints what to put into @example.
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


def agree(op, arguments, floats, **options):
    """Value and the gradients of the first `floats` arguments: pallas_tpu against reference."""
    def run(implementation):
        def scalar(*args):
            out = op(*args, implementation=implementation, **options)
            finite = jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, 0.0), out)
            return sum(jnp.sin(x).sum() for x in jax.tree.leaves(finite)), finite

        return jax.jit(jax.value_and_grad(scalar, tuple(range(floats)), has_aux=True))(*arguments)

    (_, got), got_grads = run("pallas_tpu")
    (_, want), want_grads = run("reference")
    assert_trees_close((got, got_grads), (want, want_grads), rel=2e-5, floor=1e-4)


def normal(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def documents(rng, B, T):
    """Rows of a few documents and padding anywhere."""
    ids = np.sort(rng.integers(1, 4, (B, T)), axis=1)
    return jnp.asarray(np.where(rng.random((B, T)) < 0.1, 0, ids), jnp.int32)


def attention(B, T, S, K, G, H, P, causal, window, first, cap, packed, seed):
    rng = np.random.default_rng(seed)
    q, k, v = normal(rng, B, T, K * G, H), normal(rng, B, S, K, H), normal(rng, B, S, K, P)
    ids = dict(segment_ids=documents(rng, B, T), kv_segment_ids=documents(rng, B, S)) if packed else {}
    mask = dict(is_causal=causal, local_window_size=window, global_tokens=first)
    agree(pallas_kernels.flash_attention, (q, k, v), 3, **mask, **ids, logits_soft_cap=cap, return_residual=True)


def retention(B, T, N, H, P, per_token, packed, seed):
    rng = np.random.default_rng(seed)
    decay = -jnp.abs(normal(rng, *((B, T, N) if per_token else (N,))))
    arguments = normal(rng, B, T, N, H), normal(rng, B, T, N, H), normal(rng, B, T, N, P), decay, normal(rng, B, N, H, P)
    ids = documents(rng, B, T) if packed else None

    def op(q, k, v, decay, state, **options):
        return pallas_kernels.retention(q, k, v, decay, initial_state=state, segment_ids=ids, output_final_state=True, **options)

    agree(op, arguments, 5)


def grouped(M, D, F, E, seed):
    rng = np.random.default_rng(seed)
    sizes = jnp.asarray(rng.multinomial(rng.integers(0, M + 1), rng.dirichlet(np.full(E, 0.4))), jnp.int32)
    agree(pallas_kernels.grouped_matmul, (normal(rng, M, D), normal(rng, E, D, F), sizes), 2)


def cross_entropy(T, D, V, layout, cap, seed):
    rng = np.random.default_rng(seed)
    w = normal(rng, *((D, V) if layout == "DV" else (V, D)))
    labels = jnp.asarray(rng.integers(-2, V + 2, T), jnp.int32)
    x = normal(rng, T, D) * D**-0.5
    agree(pallas_kernels.linear_cross_entropy, (x, w, labels), 2, w_layout=layout, logits_soft_cap=cap, z_loss=1e-3)


few = st.integers(1, 3)
DRAWN = {
    "attention": (attention, dict(
        B=st.integers(1, 2), T=length, S=length, K=st.integers(1, 2), G=few, H=size, P=size, causal=st.booleans(),
        window=st.none() | st.integers(0, 90), first=st.integers(0, 5), cap=st.none() | st.just(5.0), packed=st.booleans(), seed=seed)),
    "retention": (retention, dict(B=few, T=length, N=few, H=size, P=size, per_token=st.booleans(), packed=st.booleans(), seed=seed)),
    "grouped": (grouped, dict(M=st.integers(1, 700), D=size, F=st.integers(1, 300), E=st.integers(1, 9), seed=seed)),
    "cross_entropy": (cross_entropy, dict(
        T=length, D=size, V=st.integers(1, 700), layout=st.sampled_from(["DV", "VD"]), cap=st.none() | st.just(3.0), seed=seed)),
}  # fmt: skip


@pytest.mark.parametrize("op", DRAWN)
def test_a_few_drawn_shapes(op):
    check, strategies = DRAWN[op]
    drawn(2)(given(**strategies)(check))()


@pytest.mark.slow
@pytest.mark.parametrize("op", DRAWN)
def test_many_drawn_shapes(op):
    check, strategies = DRAWN[op]
    drawn(6)(given(**strategies)(check))()

"""Fused linear + cross entropy against the logits written out in float64; kept and recomputed logits; shards of the vocabulary."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import linear_cross_entropy
from pallas_kernels.linear_cross_entropy import xla
from tests.numerics import assert_close, assert_trees_close


def normal(*shapes, dtype=np.float32):
    """Draws by numpy: jax would compile a generator for every shape."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def oracle(x, w_DV, labels, weights, z_loss, cap, dloss, dlse):
    """Values and gradients by the chain rule, in numpy: (loss, lse, dx, dw [D,V], dweights)."""
    x, w, weights, dloss, dlse = (np.asarray(a, np.float64) for a in (x, w_DV, weights, dloss, dlse))
    raw = x @ w
    logits = raw if cap is None else cap * np.tanh(raw / cap)
    lse = np.log(np.exp(logits).sum(1))
    p = np.exp(logits - lse[:, None])
    hot = np.arange(w.shape[1]) == np.asarray(labels)[:, None]
    plain = lse - (logits * hot).sum(1) + z_loss * lse**2
    dlogits = (dloss * weights * (1 + 2 * z_loss * lse) + dlse)[:, None] * p - (dloss * weights)[:, None] * hot
    dlogits = dlogits if cap is None else dlogits * (1 - (logits / cap) ** 2)
    return weights * plain, lse, dlogits @ w.T, x.T @ dlogits, dloss * plain


CASES = [  # implementation, w_layout, cap, z_loss, dtype, rel, recomputed
    ("reference", "DV", 2.0, 0.1, "float64", 1e-12, False),
    ("xla", "DV", 2.0, 0.1, "float64", 1e-12, True),
    ("xla", "VD", None, 0.1, "float32", 1e-5, False),
    ("xla", "VD", 2.0, 0.0, "float32", 1e-5, True),
    pytest.param("xla", "DV", None, 0.0, "float32", 1e-5, False, marks=pytest.mark.slow),
    pytest.param("reference", "VD", None, 0.0, "float32", 1e-5, False, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("implementation, layout, cap, z_loss, dtype, rel, recomputed", CASES)
@pytest.mark.parametrize("T", [150, pytest.param(1, marks=pytest.mark.slow)])
def test_equals_oracle(T, implementation, layout, cap, z_loss, dtype, rel, recomputed, x64, monkeypatch):
    if recomputed:
        monkeypatch.setattr(xla, "KEEP_LOGITS", 0)
        monkeypatch.setattr(xla, "CHUNK_LOGITS", 64 * 31)
    x, w, weights, dloss, dlse = normal((T, 8), (8, 31), (T,), (T,), (T,), dtype=dtype)
    labels = np.random.default_rng(1).integers(-4, 36, T)  # some outside the vocabulary on either side

    @jax.jit
    def run(x, w, weights):
        f = lambda x, w, weights: linear_cross_entropy(x, w if layout == "DV" else w.T, labels, w_layout=layout, weights_T=weights,  # noqa: E731
                                                       z_loss=z_loss, logits_soft_cap=cap, implementation=implementation)
        values, vjp = jax.vjp(f, x, w, weights)
        return *values, *vjp((dloss, dlse))

    assert_trees_close(run(x, w, weights), oracle(x, w, labels, weights, z_loss, cap, dloss, dlse), rel)


def test_shards_of_the_vocabulary_combine():
    x, w = normal((20, 8), (8, 30))
    labels = np.random.default_rng(1).integers(0, 30, 20)
    whole, whole_lse = linear_cross_entropy(x, w, labels)
    parts = [linear_cross_entropy(x, w[:, v : v + 10], labels - v) for v in (0, 10, 20)]
    lse = jax.nn.logsumexp(jnp.stack([lse for _, lse in parts]), axis=0)
    assert_close("lse", lse, whole_lse, rel=1e-6)
    assert_close("loss", lse - sum(lse - loss for loss, lse in parts), whole, rel=1e-5)


def test_memory_does_not_hold_the_logits():
    """2^16 tokens x 2^12 words = 1 GiB of logits; temporaries stay below a tenth of it."""
    shapes = [jax.ShapeDtypeStruct(s, d) for s, d in (((2**16, 8), jnp.float32), ((8, 2**12), jnp.float32), ((2**16,), jnp.int32))]
    f = jax.grad(lambda x, w, y: linear_cross_entropy(x, w, y)[0].sum(), (0, 1))
    assert jax.jit(f).lower(*shapes).compile().memory_analysis().temp_size_in_bytes < 100e6


def test_bfloat16_and_repeatable():
    x, w = normal((70, 16), (16, 50))
    labels = np.random.default_rng(1).integers(0, 50, 70)
    f = jax.jit(lambda x, w: jax.value_and_grad(lambda x, w: linear_cross_entropy(x, w, labels)[0].sum(), (0, 1))(x, w))
    want = f(x, w)
    for one, two in zip(jax.tree.leaves(want), jax.tree.leaves(f(x, w))):
        assert (np.asarray(one) == np.asarray(two)).all()
    value, (dx, dw) = f(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16))
    assert value.dtype == jnp.float32 and dx.dtype == dw.dtype == jnp.bfloat16
    assert_close("value", value, want[0], rel=1e-2)
    assert_close("dw", dw.astype(jnp.float32), want[1][1], rel=2e-2)


X, W, Y = jnp.zeros((4, 3)), jnp.zeros((3, 5)), jnp.zeros(4, jnp.int32)


@pytest.mark.parametrize("args, kwargs, error, message", [
    ((X, W, Y), dict(w_layout="TD"), ValueError, "w_layout='TD' is unknown; expected 'DV' or 'VD'"),
    ((X, W, Y), dict(w_layout="VD"), ValueError, r"w must have shape \(3, 3\) \(D of x_TD, w_layout='VD'\), got \(3, 5\)"),
    ((jnp.zeros((1, 4, 3)), W, Y), {}, ValueError, r"x_TD must have 2 axes \[T, D\]"),
    ((X, W, jnp.zeros(3, jnp.int32)), {}, ValueError, r"labels_T must have shape \(4,\)"),
    ((X, W, jnp.zeros(4)), {}, TypeError, "labels_T must be an integer array, got float32"),
    ((X, W.astype(jnp.bfloat16), Y), {}, TypeError, "w has dtype bfloat16 but x_TD has float32; cast one"),
    ((X, W, Y), dict(weights_T=jnp.zeros(2)), ValueError, r"weights_T must have shape \(4,\)"),
    ((X, W, Y), dict(z_loss=jnp.zeros(())), TypeError, "z_loss must be a Python number"),
    ((X, W, Y), dict(implementation="pallas_gpu"), NotImplementedError, r"linear_cross_entropy\[pallas_gpu\]: .* Use implementation='xla'"),
])
def test_bad_input_is_refused(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        linear_cross_entropy(*args, **kwargs)

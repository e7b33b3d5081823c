"""The TPU kernels of the linear cross entropy, interpreted: against a float64 oracle with every gradient; shards, poison, races."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import linear_cross_entropy
from pallas_kernels.linear_cross_entropy import reference, tpu, tpu_logits
from tests.numerics import assert_as_accurate, assert_close
from tests.pallas_kernels.common import assert_float32_products, assert_no_races

kernel = functools.partial(linear_cross_entropy, implementation="pallas_tpu", interpret=True)


@pytest.fixture
def small_blocks(monkeypatch):
    """Many blocks at small sizes: 128 tokens, 128 of the model dim, 128 or 256 columns, two of them a chunk."""
    use_small_blocks(monkeypatch.setattr)


def use_small_blocks(set_attribute):
    set_attribute(tpu_logits, "blocks", lambda T, D, V, *_: (128, min(D, 128), 256 if V > 512 else 128))
    set_attribute(tpu_logits, "SLICE", 128)
    set_attribute(tpu, "CHUNK", 512)


def operands(T, D, V, dtype, layout):
    """(x, w, labels, (cotangent of lse, of the label's logit)); some labels are outside the vocabulary, on either side."""
    rng = np.random.default_rng(T + V)
    x, w, dlse, dlabel = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((T, D), (D, V), (T,), (T,)))
    w = w * 2 / D**0.5
    labels = jnp.asarray(rng.integers(-max(1, V // 8), V + max(1, V // 8), T), jnp.int32)
    return x.astype(dtype), (w if layout == "DV" else w.T).astype(dtype), labels, (dlse, dlabel)


def naive(x, w, labels, soft_cap, layout):
    """All logits, from one matmul in the inputs' dtype; the softmax in float32."""
    logits = (x @ (w if layout == "DV" else w.T)).astype(jnp.float32)
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    return jax.nn.logsumexp(logits, axis=1), jnp.where(jnp.arange(logits.shape[1]) == labels[:, None], logits, 0).sum(1)


def values_and_gradients(f, x, w, labels, cotangents, soft_cap, layout):
    """{name: tensor}: logsumexp, label logit, and the gradients of x and w."""
    (lse, label_logit), vjp = jax.vjp(lambda x, w: f(x, w, labels, soft_cap, layout), x, w)
    dx, dw = vjp(tuple(c.astype(lse.dtype) for c in cotangents))
    return dict(lse=lse, label_logit=label_logit, dx=dx, dw=dw)


def check(T, D, V, dtype="float32", layout="DV", soft_cap=None):
    x, w, labels, cotangents = operands(T, D, V, jnp.dtype(dtype), layout)
    run = lambda f: jax.jit(lambda x, w: values_and_gradients(f, x, w, labels, cotangents, soft_cap, layout))  # noqa: E731
    got = run(functools.partial(tpu.lse_and_label_logit, interpret=True))(x, w)
    want = run(reference.lse_and_label_logit)(x.astype(jnp.float64), w.astype(jnp.float64))
    plain = run(naive)(x, w)
    for name in want:
        assert got[name].dtype == plain[name].dtype
        assert_as_accurate(name, got[name], want[name], plain[name], gradient=name[0] == "d")


@pytest.mark.parametrize("T, D, V, dtype, layout, soft_cap", [
    (300, 200, 1100, "float32", "DV", None),  # nothing divides: masked model dim, tokens and vocabulary; whole chunks and a rest
    (300, 200, 1100, "float32", "VD", 2.0),
    (129, 64, 1024, "bfloat16", "DV", 2.0),
    (100, 256, 300, "bfloat16", "VD", None),
    (1, 5, 3, "float32", "DV", None),
])
def test_equals_oracle(T, D, V, dtype, layout, soft_cap, x64, small_blocks):
    check(T, D, V, dtype, layout, soft_cap)


def test_equals_oracle_with_the_blocks_of_the_chip(x64):
    check(600, 96, 1000, "float32", "DV", 30.0)


@pytest.mark.slow
@pytest.mark.parametrize("layout, soft_cap, dtype", [("DV", None, "float32"), ("VD", 2.0, "float32"), ("DV", 2.0, "bfloat16"),
                                                     ("VD", None, "bfloat16")])
@pytest.mark.parametrize("T", [1, 63, 64, 100, 127, 128, 129, 500, 1000, 2000])
def test_lengths(T, layout, soft_cap, dtype, x64):
    check(T, 48, 700, dtype, layout, soft_cap)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_drawn_shapes(seed, x64, small_blocks):
    rng = np.random.default_rng(seed)
    T, D, V = (int(rng.integers(1, most)) for most in (300, 400, 1500))
    check(T, D, V, str(rng.choice(["float32", "bfloat16"])), str(rng.choice(["DV", "VD"])), rng.choice([None, 3.0]))


def test_the_op_with_weights_z_loss_and_shards_of_the_vocabulary(small_blocks):
    """The public function: shards combine to the whole, and the loss is that of the reference, with every gradient."""
    x, w, labels, _ = operands(70, 16, 600, jnp.float32, "DV")
    weights = jnp.linspace(0, 1, 70)
    options = dict(weights_T=weights, z_loss=0.1, logits_soft_cap=3.0)

    def loss(op, x, w):
        return op(x, w, labels, **options)[0].sum()

    plain = functools.partial(linear_cross_entropy, implementation="reference")
    got, want = (jax.jit(jax.value_and_grad(functools.partial(loss, op), (0, 1)))(x, w) for op in (kernel, plain))
    for name, one, two in zip(("loss", "dx", "dw"), (got[0], *got[1]), (want[0], *want[1])):
        assert_close(name, one, two, rel=1e-5)
    parts = [kernel(x, w[:, v : v + 300], labels - v) for v in (0, 300)]
    lse = jax.nn.logsumexp(jnp.stack([lse for _, lse in parts]), axis=0)
    assert_close("loss of shards", lse - sum(lse - loss for loss, lse in parts), plain(x, w, labels)[0], rel=1e-5)


def test_extreme_logits(small_blocks):
    """Logits of +-1e4 and one of 3e4: the maximum is subtracted, nothing overflows, and a certain token has no loss and no gradient."""
    x, w = jnp.full((2, 8), 100.0), jnp.zeros((8, 300)).at[0].set(jnp.where(jnp.arange(300) % 2, 100.0, -100.0)).at[0, 77].set(300.0)
    (loss, lse), (dx, dw) = jax.jit(lambda x, w: (kernel(x, w, jnp.array([77, 78])), jax.grad(
        lambda x, w: kernel(x, w, jnp.array([77, 77]))[0].sum(), (0, 1))(x, w)))(x, w)
    assert lse.tolist() == [3e4, 3e4] and loss.tolist() == [0.0, 4e4]
    assert (dx == 0).all() and (dw == 0).all()


def test_two_runs_are_bitwise_equal_and_vmap(small_blocks):
    x, w, labels, _ = operands(150, 24, 700, jnp.float32, "VD")
    f = jax.grad(lambda x, w, y: kernel(x, w, y, w_layout="VD")[0].sum(), (0, 1))
    alone = jax.jit(f)
    together = jax.jit(jax.vmap(f, (0, None, 0)))(jnp.stack([x, 2 * x]), w, jnp.stack([labels, labels[::-1]]))
    for i, problem in enumerate(((x, w, labels), (2 * x, w, labels[::-1]))):
        for one, two, vmapped in zip(alone(*problem), alone(*problem), together):
            assert (np.asarray(one) == np.asarray(two)).all()
            assert_close("vmapped", vmapped[i], one, rel=1e-5)


@pytest.mark.parametrize("layout", ["DV", "VD"])
def test_float32_is_multiplied_as_float32(layout):
    x, w, labels, cotangents = operands(150, 24, 700, jnp.float32, layout)
    f = functools.partial(tpu.lse_and_label_logit, interpret=False)
    traced = jax.make_jaxpr(lambda x, w: values_and_gradients(f, x, w, labels, cotangents, None, layout))(x, w)
    assert_float32_products(traced.jaxpr, at_least=4)


RACES = """
import jax, jax.numpy as jnp, numpy as np
from jax.experimental.pallas import tpu as pltpu
from tests.pallas_kernels import test_linear_cross_entropy_tpu as t
t.use_small_blocks(setattr)
params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", num_cores_or_threads=2)
x, w, labels, cotangents = t.operands(200, 140, 600, jnp.float32, "DV")
f = t.functools.partial(t.tpu.lse_and_label_logit, interpret=params)
got, want = (jax.jit(lambda x, w: t.values_and_gradients(g, x, w, labels, cotangents, 3.0, "DV"))(x, w) for g in (f, t.naive))
for name in want:
    np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=1e-4, err_msg=name)
"""


@pytest.mark.subprocess
def test_no_race_and_no_uninitialised_memory():
    """Two simulated cores, memory that starts as nan. In a process of its own: a race leaves the interpreter in a bad state."""
    assert_no_races(RACES)


def test_what_a_tpu_does_not_multiply_is_refused():
    with pytest.raises(NotImplementedError, match=r"linear_cross_entropy\[pallas_tpu\]: float16 is not multiplied on a TPU; .* Use impl"):
        kernel(jnp.zeros((4, 3), jnp.float16), jnp.zeros((3, 5), jnp.float16), jnp.zeros(4, jnp.int32))


@pytest.mark.aot
def test_no_array_of_tokens_times_vocabulary():
    """Temporaries on a v4 chip, forward and backward: below a fifth of the logits in bfloat16, and not growing with the vocabulary."""
    from effmodels.plan.topology import compile_for

    cases = [aot_case(8192, 2048, V) for V in (32768, 65536)]
    bytes_of = [compile_for("v4", f, *shapes).memory_analysis().temp_size_in_bytes for f, shapes in cases]
    assert bytes_of[0] < 2 * 8192 * 32768 / 5
    assert bytes_of[1] < 1.1 * bytes_of[0]


def aot_case(T, D, V, dtype="bfloat16", layout="DV", soft_cap=None, backward=True):
    """(f, shapes) for the TPU compiler: the op, or the gradient of its sum."""
    shape = jax.ShapeDtypeStruct
    shapes = shape((T, D), jnp.dtype(dtype)), shape((D, V) if layout == "DV" else (V, D), jnp.dtype(dtype)), shape((T,), jnp.int32)

    def op(x, w, labels):
        return linear_cross_entropy(x, w, labels, w_layout=layout, logits_soft_cap=soft_cap, implementation="pallas_tpu", interpret=False)

    return (jax.grad(lambda x, w, labels: op(x, w, labels)[0].sum(), (0, 1)) if backward else op), shapes


def aot_cases():
    """{"production" or "odd": {name: (f, shapes)}}."""
    return {
        "production": {
            "linear_cross_entropy": aot_case(8192, 2048, 32768, backward=False),
            "linear_cross_entropy gradients": aot_case(8192, 2048, 32768),
        },
        "odd": {f"linear_cross_entropy T={T} D={D} V={V} {dtype} {layout} {soft_cap}": aot_case(T, D, V, dtype, layout, soft_cap)
                for T, D, V, dtype, layout, soft_cap in [
                    (1, 1, 1, "float32", "DV", None), (63, 24, 100, "bfloat16", "VD", 30.0), (100, 300, 4100, "float32", "VD", None),
                    (127, 96, 50257, "bfloat16", "DV", 30.0), (128, 80, 1000, "float32", "DV", 2.0),
                    (129, 80, 1000, "bfloat16", "VD", None),
                    (1000, 2048, 50257, "bfloat16", "VD", None), (2000, 5000, 32000, "bfloat16", "DV", None),
                    (4096, 12288, 256000, "bfloat16", "VD", 30.0), (8192, 4096, 128256, "bfloat16", "DV", None),
                    (128, 12288, 131072, "float32", "DV", None), (500, 2048, 32000, "float32", "VD", None),
                ]},
    }

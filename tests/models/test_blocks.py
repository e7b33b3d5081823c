"""How layers are grouped into scanned runs, and how norms and residuals are wired. Letters: D model."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effmodels.config import ModelConfig
from effmodels.layers.context import Ctx
from effmodels.models import resolve
from effmodels.models import state as model_state
from effmodels.models.blocks import Block, segments
from tests.contract.cases import draw, fill
from tests.numerics import assert_close, assert_trees_close


@pytest.mark.parametrize(
    "kinds, want",
    [
        ("AAAA", [(0, "A", 4)]),
        ("A", [(0, "A", 1)]),
        ("RRRA" * 4, [(0, "RRRA", 4)]),
        ("AAAAAAAABBBBBBBBCCCCCCCCDDDDDDDD", [(0, "A", 8), (8, "B", 8), (16, "C", 8), (24, "D", 8)]),  # 4 x 8 layers with four windows
        ("P" + "RA" * 3, [(0, "P", 1), (1, "RA", 3)]),
        ("RA" * 3 + "S", [(0, "RA", 3), (6, "S", 1)]),
        ("PARARAS", [(0, "P", 1), (1, "AR", 2), (5, "A", 1), (6, "S", 1)]),  # a prefix over layer 0 keeps the phase of the rest
        ("ABC", [(0, "A", 1), (1, "B", 1), (2, "C", 1)]),
        ("AABAAB", [(0, "AAB", 2)]),
        ("ABABA", [(0, "AB", 2), (4, "A", 1)]),
    ],
)
def test_segments_are_the_largest_runs(kinds, want):
    got = segments(tuple(kinds))
    assert [(run.start, "".join(run.kinds), run.repeats) for run in got] == want
    assert "".join("".join(run.kinds) * run.repeats for run in got) == kinds
    assert [(r.start, r.repeats) for r in segments(tuple(kinds), scan_layers=False)] == [(i, 1) for i in range(len(kinds))]


def test_prefix_and_suffix_do_not_shift_the_pattern():
    config = ModelConfig(
        vocab_size=9, d_model=8, num_layers=7, pattern=("retention", "attention"), channel=("mlp", "mlp", "moe"),
        prefix=(("local", "mlp"),), suffix=(("attention", "moe"), ("local", "mlp")),
        mixers={"local": {"kind": "attention", "window": 2, "num_heads": 2}, "attention": {"num_heads": 2}, "retention": {"num_heads": 2}},
    )  # fmt: skip
    names = [(kind.mixer.name, kind.channel.name) for kind in resolve(config).layers]
    assert names == [
        ("local", "mlp"), ("attention", "mlp"), ("retention", "moe"), ("attention", "mlp"), ("retention", "mlp"), ("attention", "moe"),
        ("local", "mlp"),
    ]  # fmt: skip


def rms(x, scale):
    return x / ((x * x).mean(-1, keepdims=True) + 1e-6) ** 0.5 * scale


@pytest.mark.parametrize("position", ["pre", "post", "sandwich"])
@pytest.mark.parametrize("residual", ["serial", "parallel"])
def test_norms_and_residuals(position, residual, x64):
    config = ModelConfig(
        vocab_size=9, d_model=8, num_layers=1, mixers={"attention": {"num_heads": 2}}, channels={"mlp": {"hidden": 5}},
        norm_position=position, residual=residual, param_dtype="float64", implementation="reference",
    )  # fmt: skip
    resolved = resolve(config)
    graphdef, params, _ = fill(lambda: Block(resolved.layers[0], resolved, rngs=nnx.Rngs(0)))
    block, x, ctx = model_state.merge(graphdef, params, {}), draw(2, 3, 8), Ctx()

    def norm(name, x):
        return rms(x, params[f"{name}.scale"])

    def f(x):
        return np.asarray(block.mixer(x, ctx))

    def g(x):
        return np.asarray(block.channel(x, ctx)[0])

    def around(branch, name, x):
        return {
            "pre": lambda: x + branch(norm(name, x)),
            "post": lambda: norm(name, x + branch(x)),
            "sandwich": lambda: x + norm(f"{name}_out", branch(norm(name, x))),
        }[position]()

    if residual == "serial":
        want = around(g, "norm_channel", around(f, "norm_mixer", x))
    elif position == "post":
        want = norm("norm_mixer", x + f(x) + g(x))
        assert "norm_channel.scale" not in params, "a norm that nothing reads"
    else:
        want = around(f, "norm_mixer", x) + around(g, "norm_channel", x) - x
    assert_close("block", block(x, ctx)[0], want, rel=1e-12)


@pytest.mark.parametrize(
    "position, scales",
    [("input", {}), ("input", {"attention": (1.7, 0.6), "mlp": (0.8, 1.1)}), ("pre", {"mlp": (0.5, 1.0)}), ("post", {"attention": (3, 1)})],
)
def test_scaled_residuals_and_every_gradient(position, scales, x64):
    config = ModelConfig(
        vocab_size=9, d_model=8, num_layers=1, mixers={"attention": {"num_heads": 2}}, channels={"mlp": {"hidden": 5}},
        norm_position=position, residual_scales=scales, param_dtype="float64", implementation="reference",
    )  # fmt: skip
    resolved = resolve(config)
    graphdef, params, _ = fill(lambda: Block(resolved.layers[0], resolved, rngs=nnx.Rngs(0)))
    x, probe, ctx = draw(2, 3, 8), draw(2, 3, 8, seed=2), Ctx()

    def slow(params, x):
        block = model_state.merge(graphdef, params, {})
        branches = ("attention", "norm_mixer", lambda h: block.mixer(h, ctx)), ("mlp", "norm_channel", lambda h: block.channel(h, ctx)[0])
        for name, norm, f in branches:
            scale, (a, b) = params[f"{norm}.scale"], scales.get(name, (1, 1))
            h = x if position == "post" else rms(x, scale)
            x = a * (h if position == "input" else x) + b * f(h)
            x = rms(x, scale) if position == "post" else x
        return x

    @jax.jit
    def both(params, x):
        fast = jax.value_and_grad(lambda p, x: jnp.sum(model_state.merge(graphdef, p, {})(x, ctx)[0] * probe), argnums=(0, 1))
        return fast(params, x), jax.value_and_grad(lambda p, x: jnp.sum(slow(p, x) * probe), argnums=(0, 1))(params, x)

    got, want = both(params, x)
    assert_trees_close(got, want, rel=1e-11)


def test_scales_are_not_rounded_to_the_compute_dtype():
    """The stream is bfloat16, whose nearest number to 3.5566 is 3.5625: one rounding, of the sum."""
    config = ModelConfig(
        vocab_size=9, d_model=8, num_layers=1, mixers={"attention": {"num_heads": 2}}, residual_scales={"attention": (3.5566, 0.3)},
        norm_position="input", implementation="reference",
    )  # fmt: skip
    block = Block(resolve(config).layers[0], resolve(config), rngs=nnx.Rngs(0))
    x, f = (jnp.asarray(draw(2, 3, 8, seed=seed), jnp.bfloat16) for seed in (1, 2))
    want = 3.5566 * np.asarray(x, np.float32) + 0.3 * np.asarray(f, np.float32)
    np.testing.assert_array_equal(block._sum(0, x, x, f), want.astype(jnp.bfloat16))

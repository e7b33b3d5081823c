"""How layers are grouped into scanned runs, and how norms and residuals are wired. Letters: D model."""
import numpy as np
import pytest
from flax import nnx

from effmodels.config import ModelConfig
from effmodels.layers.context import Ctx
from effmodels.models import resolve
from effmodels.models import state as model_state
from effmodels.models.blocks import Block, segments
from tests.contract.cases import draw, fill
from tests.numerics import assert_close


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
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale


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

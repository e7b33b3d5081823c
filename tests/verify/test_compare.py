"""The arithmetic of a verdict: errors, ratios and their names, drawn batches, ties of expert scores, the report."""
import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effmodels.channel import routers
from effmodels.config import ConfigError
from effmodels.verify import compare, draw, ties, verify
from effmodels.verify.mesh_check import split_rows
from effmodels.verify.report import Outcome, Report, row
from tests.verify.cases import tiny

SIZES = {"data": 3, "fsdp": 1, "tensor": 4, "seq": 5}
RNG = np.random.default_rng(0)
WANT = {"a": RNG.normal(size=(5, 7)), "b": 1e-3 * RNG.normal(size=11), "zero": np.zeros(3)}


def only(got_a, **rest):
    """The Leaf of "a" when it is `got_a` and all else is right."""
    return next(leaf for leaf in compare.compare(WANT | {"a": got_a} | rest, WANT, 1e-5) if leaf.name == "a")


@pytest.mark.parametrize(
    "factor, says",
    [
        (0.0, "missing"), (2.0, "summed twice"), (-1.0, "the sign"), (3.0, "once too often over mesh axis data (3)"),
        (0.25, "averaged once too often over mesh axis tensor (4)"), (12.0, "mesh axis data x tensor (12)"), (0.5, "halved"),
        (0.2, "mesh axis seq (5)"), (1.7, "1.700 times the reference"), (math.nan, "not finite"),
    ],
)  # fmt: skip
def test_ratios_are_named(factor, says):
    leaf = only(WANT["a"] * factor)
    assert leaf.failed and says in compare.reading(leaf, SIZES)
    if math.isfinite(factor):
        assert leaf.error == pytest.approx(abs(factor - 1)) and leaf.ratio == pytest.approx(abs(factor))


def test_another_direction_is_no_factor():
    leaf = only(RNG.permuted(WANT["a"], axis=0))
    assert leaf.failed and "not a multiple" in compare.reading(leaf, SIZES)
    assert compare.reading(only(WANT["a"] * (1 + 1e-7)), SIZES) == "equal"


def test_zero_up_to_rounding_is_zero():
    """A gradient that cancels exactly is noise on both sides; what is not noise counts, however small the leaf."""
    assert compare.agree(compare.compare(WANT | {"zero": np.full(3, 1e-8)}, WANT, 1e-5))
    assert not compare.agree(compare.compare(WANT | {"zero": np.full(3, 1e-3)}, WANT, 1e-5))
    assert not compare.agree(compare.compare(WANT | {"b": 2 * WANT["b"]}, WANT, 1e-5))
    assert compare.agree(compare.compare(WANT | {"b": 2 * WANT["b"]}, WANT, 1e-5, {"b": 1.5}))


def test_worst_first_and_folded_names():
    names = [f"layers.{i}.mixer.wq" for i in range(3)] + ["embed"]
    want = {n: np.ones(4) for n in names}
    leaves = compare.compare(want | {"layers.1.mixer.wq": 2 * np.ones(4), "embed": 1.5 * np.ones(4)}, want, 1e-5)
    assert [leaf.name for leaf in leaves[:2]] == ["layers.1.mixer.wq", "embed"]
    assert compare.patterns(leaves) == ["layers.*.mixer.wq (1 of 3 layers)", "embed"]
    with pytest.raises(ValueError, match="different names"):
        compare.compare({"a": np.ones(1)}, {"b": np.ones(1)}, 1.0)


def test_drawn_rows_are_packed_and_padded():
    batch = draw.packed_batch(8, 33, 50, seed=4)
    docs = draw.documents(batch)
    assert np.any(batch["segment_ids"][:, -1] == 0) and np.any(batch["segment_ids"][:, -1] > 0)
    assert any(stop - start == 1 for _, start, stop in docs) and any(start == 16 for _, start, _ in docs)
    for b, start, stop in docs:
        assert np.array_equal(batch["positions"][b, start:stop], np.arange(stop - start))
        assert np.array_equal(batch["targets"][b, start : stop - 1], batch["tokens"][b, start + 1 : stop])
        assert batch["weights"][b, stop - 1] == 0 and np.all(batch["weights"][b, start : stop - 1] == 1)
    batches, places = draw.alone(batch)
    for (b, start, stop), (i, r) in zip(docs, places):
        assert np.array_equal(batches[i]["tokens"][r, : stop - start], batch["tokens"][b, start:stop])
        assert not batches[i]["segment_ids"][r, stop - start :].any()
    assert sum(b["weights"].sum() for b in batches) == batch["weights"].sum()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_micro_batches_add_up_to_the_batch(count):
    batch = draw.packed_batch(4, 9, 50, seed=1)
    parts = split_rows(batch, count)
    assert len(parts) == count and all(p["weights"].sum() > 0 for p in parts)
    assert all(np.array_equal(sum(p[k] for p in parts), batch[k]) for k in batch)


def test_parameters_do_not_depend_on_the_grouping_of_layers():
    info = {"s": types.SimpleNamespace(dim_names=("layers", "embed"), in_dims=("embed",))}
    flat = {f"s{i}": types.SimpleNamespace(dim_names=("embed",), in_dims=("embed",)) for i in range(2)}
    names = {f"layers.{i}.w": ("s", i) for i in range(2)}
    flat_names = {f"layers.{i}.w": (f"s{i}", None) for i in range(2)}
    stacked = draw.arrays_by_path({"s": np.zeros((2, 8), np.float32)}, info, names, 3)
    alone = draw.arrays_by_path({f"s{i}": np.zeros(8, np.float32) for i in range(2)}, flat, flat_names, 3)
    named = draw.by_name(stacked, names)
    assert all(np.array_equal(named[n], alone[p]) for n, (p, _) in flat_names.items())
    assert np.array_equal(draw.by_path(named, names, stacked)["s"], stacked["s"])


@pytest.mark.parametrize("groups, top_groups", [(1, 1), (3, 2)])
def test_the_gap_is_what_it_takes_to_turn_a_choice(groups, top_groups):
    """A change of scores by less than half the gap turns no choice; one of more than the gap, in the right places, turns one."""
    config = types.SimpleNamespace(
        router="sigmoid", groups=groups, top_groups=top_groups, top_k=2, normalize_weights=False, routed_scaling=1.0,
            group_score="top2",
    )  # fmt: skip
    scores = np.random.default_rng(0).uniform(0.2, 0.8, (1, 40, 6)).astype(np.float32)
    valid, logits = np.ones((1, 40), bool), np.log(scores / (1 - scores))
    gap_T = np.asarray(ties.gap(jnp.asarray(scores), None, config))[0]
    chosen = np.sort(routers.route(jnp.asarray(logits), None, valid, config).ids_BTk, axis=-1)[0]
    signs = np.random.default_rng(1).choice([-1.0, 1.0], (20, 40, 6))
    per_group = 4.5 if groups > 1 else 2.2  # the score of a group is the sum of two
    for sign_TE in signs:
        moved = scores[0] + sign_TE * gap_T[:, None] / per_group
        ids = routers.route(jnp.asarray(np.log(moved / (1 - moved)))[None], None, valid, config).ids_BTk
        assert np.array_equal(np.sort(ids, axis=-1)[0], chosen)
    if groups == 1:
        order = np.argsort(-scores[0], axis=-1)
        moved = scores[0].copy()
        moved[np.arange(40), order[:, 2]] += 1.01 * gap_T
        ids = routers.route(jnp.asarray(np.log(moved / (1 - moved)))[None], None, valid, config).ids_BTk
        assert np.all(np.any(np.sort(ids, axis=-1)[0] != chosen, axis=-1))


def test_report_says_everything():
    good = Outcome("mesh", [row("mesh", "loss", 1e-9, 1e-5)])
    bad = Outcome("packed", [row("packed", "loss", math.nan, 1e-4)], explanations=["a state crosses"])
    banded = Outcome("bf16", [row("bf16", "gradients", 1e-9, 1e-2, least=1e-4)])
    skipped = Outcome("dropout", skipped="model.dropout is 0")
    report = Report({"devices": 8}, [good, bad, banded, skipped])
    assert good.passed and not bad.passed and not banded.passed and skipped.passed and not report.passed
    text = report.table()
    for part in ("1 of 3 checks passed; FAILED: packed, bf16", "a state crosses", "not done: model.dropout", "FAIL  (at least 1.0e-04)"):
        assert part in text
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["outcomes"][1]["rows"][0]["value"] == "nan"


def test_refusals_are_sentences():
    with pytest.raises(ConfigError, match="--checks: unknown check 'mehs'. Did you mean 'mesh'"):
        verify(tiny(), checks=["mehs"])
    with pytest.raises(ConfigError, match="mesh: .* needs a multiple of 3 devices, but 8 are here"):
        verify(tiny({"tensor": 3}))
    with pytest.raises(ConfigError, match=r"verify: this config needs about .* GB .*:small"):
        verify(tiny(d_model=16384, num_layers=96))
    with pytest.raises(ConfigError, match="cannot be split"):
        verify(tiny({"tensor": 4}), checks=["mesh"], devices=jax.devices())


def test_a_batch_that_the_mesh_cannot_split_is_said_before_anything_is_computed():
    """A fixed mesh is refused, as in training. Where an axis is left open the number of devices is verify's choice: said, and verified."""
    message = "batch_size=12 cannot be split over the 8 devices of the mesh's data, fsdp and expert axes; nearest: 8 or 16"
    with pytest.raises(ConfigError, match=message):
        verify(tiny({"data": 8}) | {"batch_size": 12}, checks=["mesh"])
    lines = []
    verify(tiny() | {"batch_size": 12}, checks=["dropout"], log=lines.append)
    assert len(lines) == 3 and lines[1].startswith("training on 8 devices will refuse: config: " + message)

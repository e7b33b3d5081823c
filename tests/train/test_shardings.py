"""Where every parameter, moment and batch lies, per config, mesh and rules: compared with a recorded table, so that no change goes unseen.

After a wanted change: EFFMODELS_RECORD=1 python -m pytest tests/train/test_shardings.py, and read the difference.
"""
import functools
import importlib
import json
import os
import pathlib

import jax
import numpy as np
import pytest

from effmodels.config import ConfigError
from effmodels.parallel import layouts
from effmodels.train import budget
from effmodels.train.setup import DEVICE_KEYS, Setup

RECORD = pathlib.Path(__file__).parent / "shardings.json"
CASES = {
    "quickstart:test data=2 fsdp=2 tensor=2": {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}},
    "quickstart:test data=2 expert=2 seq=2": {"mesh": {"data": 2, "expert": 2, "seq": 2}},
    "moe_1b:small fsdp=4 tensor=2": {"mesh": {"fsdp": 4, "tensor": 2}},
    "moe_1b:small expert=4 tensor=2, sequence-parallel norms": {"mesh": {"expert": 4, "tensor": 2}, "rules": {"res_seq": "seq,tensor"}},
    "reference_8m:small data=8, ZeRO-1": {"mesh": {"data": 8}, "parallel": {"zero1": True}},
}


@functools.cache
def setup(case, **parallel):
    return made(case.split()[0], **CASES[case] | {"parallel": CASES[case].get("parallel", {}) | parallel})


def made(config, mesh, rules=None, parallel=None):
    """The Setup of 8 rows of a config on 8 devices."""
    name, _, arg = config.partition(":")
    config = importlib.import_module(f"configs.{name}").get_config(arg)
    config.batch_size, config.train.micro_batch_size = 8, 8
    config.mesh.update({"data": 1} | mesh)
    config.rules.update(rules or {})
    config.parallel.update(parallel or {})
    return Setup(config, lambda *_: None)


def table(run):
    return {
        "params": {p: _text(s) for p, s in run.shardings.params.items()},
        "opt_state": {jax.tree_util.keystr(k): _text(s) for k, s in jax.tree_util.tree_flatten_with_path(run.shardings.opt_state)[0]},
        "batch": _text(run._batch_sharding(stacked=False)),
    }


def _text(sharding):
    return str(tuple(sharding.spec)).replace("'", "")


@pytest.mark.parametrize("case", CASES)
def test_nothing_moved(case):
    recorded = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    got = table(setup(case))
    if os.environ.get("EFFMODELS_RECORD"):
        RECORD.write_text(json.dumps(recorded | {case: got}, indent=1, sort_keys=True) + "\n")
        return
    assert got == recorded[case]


def bytes_of(run, part):
    return budget.tree_bytes(getattr(run.abstract_state, part), getattr(run.shardings, part))


def test_zero1_holds_an_nth_of_the_optimiser_and_all_parameters():
    """ZeRO-1 (arXiv:1910.02054): 4 bytes of every parameter, an N-th of the moments; leaves that nothing divides stay whole."""
    case = "reference_8m:small data=8, ZeRO-1"
    split, whole = setup(case), setup(case, zero1=False)
    assert bytes_of(split, "params") == bytes_of(whole, "params") == 4 * split.cost.params
    assert bytes_of(split, "opt_state") == pytest.approx(bytes_of(whole, "opt_state") / 8, rel=1e-3)


def test_fsdp_holds_an_nth_of_the_parameters():
    run = setup("moe_1b:small fsdp=4 tensor=2")
    # Norm scales and a router's few columns are split less or not at all.
    assert bytes_of(run, "params") == pytest.approx(4 * run.cost.params / 8, rel=0.03)


def test_the_layout_is_chosen_by_the_attention_layers_and_the_batch_is_put_in_it():
    run = setup("quickstart:test data=2 expert=2 seq=2")
    assert run.options.layout == "contiguous", "a window of 16 in rows of 64"
    run = setup("quickstart:test data=2 expert=2 seq=2", layout="zigzag")
    rows = {k: np.arange(8 * 64, dtype=np.int32).reshape(8, 64) for k in DEVICE_KEYS}
    placed = run.put(rows)["tokens"]
    order = np.concatenate([np.arange(0, 16), np.arange(48, 64), np.arange(16, 48)])
    np.testing.assert_array_equal(placed, rows["tokens"][:, order])
    np.testing.assert_array_equal(run.put([rows, rows])["tokens"][1], rows["tokens"][:, order])


def test_a_row_is_split_by_the_rules_not_by_the_axis_of_that_name():
    rules = {"seq": "seq,tensor", "act_heads": "none", "act_mlp": "none"}
    run = made("quickstart:test", {"data": 2, "seq": 2, "tensor": 2}, rules, {"layout": "zigzag"})
    rows = {k: np.arange(8 * 64, dtype=np.int32).reshape(8, 64) for k in DEVICE_KEYS}
    np.testing.assert_array_equal(run.put(rows)["tokens"][0], layouts.order("zigzag", 64, 4))


def test_a_layout_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match=r"layout='striped': the mixers retention are not right in that order .* contiguous, zigzag"):
        setup("quickstart:test data=2 expert=2 seq=2", layout="striped")
    with pytest.raises(ConfigError, match=r"rules.kv_seq='seq': no form of attention joins keys"):
        made("quickstart:test", {"data": 4, "seq": 2}, {"seq": "none", "kv_seq": "seq"})
    with pytest.raises(ConfigError, match=r"parallel.layout: unknown 'zig'. Did you mean 'zigzag'\?"):
        setup("quickstart:test data=2 expert=2 seq=2", layout="zig")


@pytest.mark.parametrize("mesh", [{"seq": 2}, {"expert": 4}, {"stage": 2}, {"fsdp": 4}], ids=str)
def test_the_billion_takes_each_axis_by_one_override(mesh):
    """As typed in docs/parallel.md: --config.mesh.<axis>=n and nothing else, on eight devices."""
    config = importlib.import_module("configs.moe_1b").get_config()
    config.mesh.update(mesh)
    run = Setup(config, lambda *_: None)
    assert run.sizes["data"] * list(mesh.values())[0] == 8 and run.cost.params > 1e9
    assert bool(run.spread()) == ("fsdp" not in mesh)

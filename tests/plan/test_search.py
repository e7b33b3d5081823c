"""The search: what it proposes fits, is ranked, says what to paste, and asks the compiler only as long as there is time."""
import dataclasses

import pytest

from configs import quickstart
from effmodels.plan import chips, closed_form, search
from effmodels.plan.topology import Topology
from effmodels.train.run_config import RunConfig


def config():
    """Two layers of attention and MLP: a trace takes a moment."""
    c = quickstart.get_config("test")
    c.batch_size, c.model.num_layers, c.model.pattern, c.model.channel = 16, 2, ("attention",), ("mlp",)
    c.model.mixers, c.model.channels = {"attention": {"num_heads": 2}}, {"mlp": {"hidden": 64}}
    return c


def place(number, hbm=2**30):
    chip = dataclasses.replace(chips.measured("cpu", 1e11, 1e10), hbm=hbm)
    return Topology(f"cpu:{number}", chip, (number,), number, 1, (False,))


@pytest.fixture(scope="module")
def found():
    return search.search(config(), place(4), seconds=30, log=lambda text: None)


def test_candidates_fit_and_the_fastest_is_first(found):
    seconds = [x.plan.seconds for x in found.candidates]
    assert found.candidates and seconds == sorted(seconds) and all(x.fits for x in found.candidates)
    assert found.tried > len(found.candidates)
    assert seconds[0] <= closed_form.plan(config(), place(4)).seconds


def test_overrides_are_what_was_planned(found):
    for candidate in found.candidates[:3]:
        again = closed_form.plan(search.apply(config(), candidate.overrides), place(4))
        assert again.memory == candidate.plan.memory and again.seconds == candidate.plan.seconds
        assert candidate.text == " ".join(f"--config.{k}={v}" for k, v in candidate.overrides.items())
        assert "mesh.data" in candidate.overrides


def test_applying_leaves_the_config_alone():
    c = config()
    changed = search.apply(c, {"mesh.fsdp": 4, "train.remat": "full"})
    assert changed["mesh"]["fsdp"] == 4 and changed["train"]["remat"] == "full" and c.mesh.fsdp == 1


def test_what_does_not_fit_is_not_proposed():
    """A chip with less memory than the leanest settings need; one with as much as they need."""
    plan = closed_form.price(search.abstract.place(search._lean(_on({"data": 1, "fsdp": 4})), place(4)), place(4))
    assert not search.search(config(), place(4, hbm=plan.memory.total // 8), seconds=20, log=lambda text: None).candidates
    lean = search.search(config(), place(4, hbm=int(plan.memory.total / search.MARGIN) + 1), seconds=30, log=lambda text: None)
    assert any(x.overrides.get("mesh.fsdp") == 4 for x in lean.candidates)


def _on(mesh):
    full = {"data": 1, "fsdp": 1, "seq": 1, "tensor": 1, "expert": 1, "stage": 1}
    return dataclasses.replace(RunConfig.from_mapping(config(), "cpu"), mesh=full | mesh)


def test_meshes_divide_what_they_split():
    shapes = search.mesh_shapes(_on({}), 8)
    assert {"data": 8, "fsdp": 1, "seq": 1, "tensor": 1, "expert": 1, "stage": 1} in shapes
    for mesh in shapes:
        assert 32 % mesh["fsdp"] == 0 and 2 % mesh["tensor"] == 0 and mesh["expert"] == mesh["seq"] == mesh["stage"] == 1
        assert 16 % (mesh["data"] * mesh["fsdp"]) == 0
    assert {mesh["stage"] for mesh in search.mesh_shapes(_on({"stage": 2}), 8)} == {1, 2}  # two layers, asked for
    experts = RunConfig.from_mapping(quickstart.get_config("test"), "cpu")
    assert {mesh["expert"] for mesh in search.mesh_shapes(experts, 8)} == {1, 2, 4}


def test_the_compiler_confirms_the_best_until_the_time_is_up(found):
    asked = []

    def compile(c):
        asked.append(c)
        plan = closed_form.plan(c, place(4))
        return dataclasses.replace(plan, out_of_memory="no" if len(asked) == 1 else "", method="compiled")

    best = list(found.candidates[:4])
    confirmed = search._confirmed(config(), best, compile, float("inf"), lambda text: None)
    assert len(asked) == search.CONFIRMED and asked[0]["mesh"]["data"] == best[0].overrides["mesh.data"]
    assert best[0].text not in [x.text for x in confirmed] and confirmed[-1].compiled is None
    assert [x.compiled.method for x in confirmed[:-1]] == ["compiled"] * 2
    assert search._confirmed(config(), best, compile, 0.0, lambda text: None) == best and len(asked) == search.CONFIRMED

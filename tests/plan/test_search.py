"""The search: what it proposes fits, is ranked, says what to paste, and asks the compiler only as long as there is time."""
import dataclasses
import itertools
import shlex

import pytest
from absl import flags
from ml_collections import config_flags

from configs import quickstart
from effmodels.config import REMAT
from effmodels.plan import chips, topology
from effmodels.plan.formulas import closed_form, policies, search, variants
from effmodels.plan.schedule.dump import CompilerError
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


def test_what_is_pasted_parses_and_gives_that_plan():
    """Every kind of override, typed behind the command's own flag for configs."""
    before = RunConfig.from_mapping(_deep(), "tpu")
    four = topology.parse("v4:2x2x1")
    mesh = {"data": 1, "fsdp": 1, "seq": 2, "tensor": 1, "expert": 2, "stage": 1}
    chosen = dataclasses.replace(variants.asynchronous(before, four), mesh=mesh)
    chosen = [one for one in variants._with_rules(chosen) if one.rules["priority"]][0]
    chosen = variants.half_precision(variants.ringed(next(iter(variants.settings(chosen, "save:kernel,heads")))))
    piped = dataclasses.replace(before, mesh=dict.fromkeys(mesh, 1) | {"stage": 2, "data": 2})
    piped = list(variants.settings(piped, "full"))[-1]
    names = {"mesh", "rules", "train", "parallel", "optim"}
    for after in (chosen, piped):
        candidate = search.Candidate(variants.overrides(before, after), search._plan(after, four))
        parsed = _typed(_deep(), shlex.split(candidate.text))
        again = closed_form.plan(parsed, four)
        assert (again.memory, again.seconds, again.mesh) == (candidate.plan.memory, candidate.plan.seconds, candidate.plan.mesh)
        names -= {name.partition(".")[0] for name in candidate.overrides}
    assert not names, "every section has an override here"
    assert piped.parallel.rounds == 2 and piped.parallel.zero1


def _deep():
    """Four layers with experts."""
    c = config()
    c.model.num_layers, c.model.channel, c.model.channels = 4, ("moe",), {"moe": {"num_experts": 4, "top_k": 2, "hidden": 64}}
    return c


def _typed(c, arguments):
    """The config after what was typed behind it, as `experiments.plan` reads it."""
    values, typed = flags.FlagValues(), ["plan", *arguments]
    config_flags.DEFINE_config_dict("config", c, flag_values=values, sys_argv=typed)
    values(typed)
    return values.config


def test_rules_follow_the_axes():
    """Weights are also split over the axes of a row and of the experts; of an expert's weights, the expert dim keeps its axis."""
    tables = [one.rules.get("embed") for one in variants._with_rules(_on({"seq": 2, "expert": 2}))]
    assert tables == ["default", ("fsdp", "seq"), ("fsdp", "seq", "expert")]
    assert [one.rules.get("priority") for one in variants._with_rules(_on({"expert": 2}))] == ["", "expert"]
    assert len(list(variants._with_rules(_on({"fsdp": 2})))) == 1


def test_the_bound_on_the_state_is_below_what_is_held():
    for mesh in ({"data": 4}, {"fsdp": 4}, {"data": 2, "tensor": 2}):
        one = variants.lean(_on(mesh))
        held = search._plan(one, place(4)).memory
        assert 0.9 * (held.parameters + held.optimizer) <= variants.state_bytes(one) <= held.parameters + held.optimizer


def test_less_precise_settings_are_told_and_must_gain_something():
    plan = closed_form.plan(config(), place(4))
    slower = dataclasses.replace(plan, operations=plan.operations * 2)
    exact, same, better = search.Candidate({}, slower), search.Candidate({"optim.options": {"mu_dtype": "bfloat16"}}, slower), plan
    better = search.Candidate({"train.accumulate_dtype": "bfloat16"}, better)
    assert search._spread([exact, same], 10) == [exact] and search._spread([better, exact], 10) == [better, exact]
    assert "less precise" in better.line() and "less precise" not in exact.line()
    assert len(search._spread([exact] * 9, 10)) == search.OF_ONE_MESH


def test_applying_leaves_the_config_alone():
    c = config()
    changed = search.apply(c, {"mesh.fsdp": 4, "train.remat": "full"})
    assert changed["mesh"]["fsdp"] == 4 and changed["train"]["remat"] == "full" and c.mesh.fsdp == 1


@pytest.mark.slow
def test_what_does_not_fit_is_not_proposed():
    """A chip with less memory than the leanest settings need; one with as much as they need."""
    plan = closed_form.price(search.abstract.place(variants.lean(_on({"data": 1, "fsdp": 4})), place(4)), place(4))
    assert not search.search(config(), place(4, hbm=plan.memory.total // 8), seconds=20, log=lambda text: None).candidates
    lean = search.search(config(), place(4, hbm=int(plan.memory.total / search.MARGIN) + 1), seconds=30, log=lambda text: None)
    assert any(x.overrides.get("mesh.fsdp") == 4 for x in lean.candidates)


def _on(mesh):
    full = {"data": 1, "fsdp": 1, "seq": 1, "tensor": 1, "expert": 1, "stage": 1}
    return dataclasses.replace(RunConfig.from_mapping(config(), "cpu"), mesh=full | mesh)


def test_meshes_divide_what_they_split():
    shapes = variants.mesh_shapes(_on({}), 8)
    assert {"data": 8, "fsdp": 1, "seq": 1, "tensor": 1, "expert": 1, "stage": 1} in shapes
    for mesh in shapes:
        assert 32 % mesh["fsdp"] == 0 and 2 % mesh["tensor"] == 0 and mesh["expert"] == mesh["seq"] == mesh["stage"] == 1
        assert 16 % (mesh["data"] * mesh["fsdp"]) == 0
    assert {mesh["stage"] for mesh in variants.mesh_shapes(_on({"stage": 2}), 8)} == {1, 2}  # two layers, asked for
    experts = RunConfig.from_mapping(quickstart.get_config("test"), "cpu")
    assert {mesh["expert"] for mesh in variants.mesh_shapes(experts, 8)} == {1, 2, 4}


def test_the_compiler_confirms_the_best_until_the_time_is_up(found):
    asked = []

    def compile(c):
        asked.append(c)
        plan = closed_form.plan(c, place(4))
        if len(asked) == 2:
            raise CompilerError("it broke")
        return dataclasses.replace(plan, out_of_memory="no" if len(asked) == 1 else "", method="compiled")

    best, told = list(found.candidates[:6]), []
    confirmed, rest = search._confirmed(config(), best, compile, float("inf"), told.append)
    assert len(asked) == search.CONFIRMED + 2 and asked[0]["mesh"]["data"] == best[0].overrides["mesh.data"]
    assert {x.text for x in confirmed} == {x.text for x in best[2:5]} and rest == best[5:]  # the first does not fit, the second breaks
    assert [x.compiled.method for x in confirmed] == ["compiled"] * search.CONFIRMED
    assert "search: dropped, it does not compile: it broke" in told and "search: does not fit: no" in told
    assert search._confirmed(config(), best, compile, 0.0, lambda text: None) == ([], best) and len(asked) == search.CONFIRMED + 2


def test_what_no_compiler_confirmed_is_listed_apart(monkeypatch):
    """All that is compiled does not fit: nothing is proposed, and what was not asked about is not among the candidates."""
    monkeypatch.setattr(search, "_confirmed", lambda config, best, *more: ([], best[2:]))
    found = search.search(config(), place(4), seconds=5, log=lambda text: None, compile=lambda c: None)
    assert found.candidates == () and found.unconfirmed and all(x.compiled is None for x in found.unconfirmed)


def test_policies_are_named_by_what_they_save_for_their_bytes():
    """The plain ones, the usual ones, then lists of which each holds the one before; every one is a policy that a config takes."""
    c = RunConfig.from_mapping(config(), "cpu")
    model = search.abstract.model(c)
    found = policies.policies(model.resolved, [(model.resolved.layers[:1], 2)], c.seq_len, place(4).chip)
    assert found[:4] == REMAT and "save:kernel" in found and "save:heads,kv_heads,embed,kernel" in found
    assert found[-2] == "save:kernel+offload:heads,kv_heads,embed" and found[-1].startswith("save:kernel+offload:")
    lists = [set(p.removeprefix("save:").split(",")) for p in found[6:-2]]
    everything = lists + [{"heads", "kv_heads", "embed", "kernel"}]
    assert {"heads", "kv_heads", "embed", "mlp"} <= set().union(*everything)
    assert all(a < b for a, b in itertools.pairwise(lists))
    assert len(found) == len(set(found)) and all(RunConfig.check(_with_remat(p)) is None for p in found)


def _with_remat(remat):
    c = config()
    c.train.remat = remat
    return RunConfig.from_mapping(c, "cpu")


@pytest.mark.parametrize("name, largest", [("v4:2x2x1", 4096), ("v5p:2x2x1", 4096), ("7x:2x2x1", 2 * 8192), ("v5e:2x4", 256)])
def test_slices_go_to_the_largest_of_a_generation(name, largest):
    """In devices, of which a 7x chip has two: a config that needs a whole pod of v4 finds it."""
    sizes = [x.chips for x in search._slices(topology.parse(name))]
    assert sizes == sorted(set(sizes)) and sizes[-1] == largest and all(n & (n - 1) == 0 for n in sizes)


def test_the_smallest_slice_is_the_first_that_fits(monkeypatch):
    c, one = RunConfig.from_mapping(config(), "cpu"), place(1)
    whole = closed_form.price(search.abstract.place(variants.lean(_on({"data": 1, "fsdp": 4})), place(4)), place(4)).memory.total
    monkeypatch.setattr(search, "_slices", lambda _: [place(n, hbm=int(whole / search.MARGIN) + 1) for n in (1, 2, 4, 8)])
    assert search.smallest_slice(c, one, float("inf")) == ("cpu:4", True)
    assert search.smallest_slice(c, one, 0.0) == ("cpu:4", False), "the first one asked about fits"


def test_slices_too_large_for_the_rows_are_passed_over(monkeypatch):
    """Sixteen rows: nothing is to be asked of 64 chips, and the answer lies below."""
    monkeypatch.setattr(search, "_slices", lambda _: [place(n) for n in (1, 16, 64, 128, 256)])
    assert search.smallest_slice(RunConfig.from_mapping(config(), "cpu"), place(1), float("inf")) == ("cpu:1", True)


def test_what_fits_no_plain_mesh_is_tried_with_more_pieces():
    plain, wide = variants.mesh_shapes(_on({}), 8), variants.mesh_shapes(_on({}), 8, wide=True)
    assert all(mesh in wide for mesh in plain) and {mesh["stage"] for mesh in wide} == {1, 2}

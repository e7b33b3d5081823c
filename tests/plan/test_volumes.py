"""What travels by formula, counted by hand from the sizes of a small model (docs/parallel.md)."""
import math

import pytest

from configs import common
from effmodels.config import ConfigError
from effmodels.plan import chips, topology
from effmodels.plan.formulas import abstract, volumes
from effmodels.plan.topology import Topology

CPU = chips.measured("cpu", 1e11, 1e10)
B, T, D, L, F, V, K, H = 8, 64, 32, 4, 128, 256, 2, 8  # rows of a step, tokens, widths, layers, vocabulary, kv heads and their size
ATTENTION, MLP = D * 4 * H * 2 + D * K * H * 2, 3 * D * F


def total(mesh, chips_=4, place=None, **fields):
    """{(axes, collective): bytes that one chip sends in a step}; place: the name of a topology, instead of CPU devices."""
    c = common.base()
    c.batch_size, c.seq_len = B, T
    model = {"pattern": ("attention",), "mixers": {"attention": {"num_heads": 4, "num_kv_heads": K}}, "channels": {"mlp": {"hidden": F}}}
    c.model = common.model(vocab_size=V, d_model=D, num_layers=L, tie_embeddings=True, **model | fields.pop("model", {}))
    c.train.micro_batch_size, c.train.remat = B, fields.pop("remat", "none")
    c.parallel.update(fields.pop("parallel", {}))
    c.rules.update(fields.pop("rules", {}))
    c.mesh.update({"data": 1, **mesh})
    found = {}
    where = topology.parse(place) if place else Topology("cpu", CPU, (chips_,), chips_, 1, (False,))
    for v in volumes.volumes(abstract.run(c, where)):
        found[v.axes, v.collective] = found.get((v.axes, v.collective), 0) + v.bytes * v.calls
    return found


def test_one_chip_sends_nothing():
    assert total({}, 1) == {}


def test_zero_3_gathers_weights_twice_and_scatters_gradients_once():
    """3 (n - 1) / n of the parameters (arXiv:1910.02054); the tied table is gathered once and has two gradients; norms are summed whole."""
    layers, table, norms = 4 * L * (ATTENTION + MLP), 4 * V * D, 4 * D
    found = total({"fsdp": 4})
    assert found[("fsdp",), "all-gather"] == 3 / 4 * (2 * layers + table)
    assert found[("fsdp",), "reduce-scatter"] == 3 / 4 * (layers + 2 * table)
    assert found[("fsdp",), "all-reduce"] == 2 * 3 / 4 * norms * (2 * L + 1)
    assert len(found) == 3


def test_replicas_sum_gradients_and_zero_1_gathers_what_it_updated():
    parameters = 4 * (L * (ATTENTION + MLP + 2 * D) + D + V * D)
    assert total({"data": 4}) == {(("data",), "all-reduce"): 2 * 3 / 4 * (parameters + 4 * V * D)}
    assert total({"data": 4}, parallel={"zero1": True})[("data",), "all-gather"] == 3 / 4 * parameters


@pytest.mark.parametrize("remat, sums", [("none", 4 * L), ("full", 5 * L)])
def test_tensor_parallel_sums_activations(remat, sums):
    """Two sums a layer and direction, one of them again; the table's lookup and its gradient, and the head's (arXiv:1909.08053)."""
    found = total({"tensor": 2}, 2, remat=remat)
    activations = 4 * B * T * D
    assert found == {(("tensor",), "all-reduce"): 2 * 1 / 2 * activations * (sums + 3)}
    split = total({"tensor": 2}, 2, remat=remat, rules={"res_seq": "seq,tensor"})
    assert split[("tensor",), "all-gather"] == split[("tensor",), "reduce-scatter"] == 1 / 2 * activations * sums


@pytest.mark.parametrize("window, hops", [(None, 3), (8, 1)])
def test_a_ring_sends_keys_forward_and_keys_and_gradients_back(window, hops):
    attention = {"mixers": {"attention": {"num_heads": 4, "num_kv_heads": K, "window": window}}}
    found = total({"seq": 4}, model=attention, parallel={"layout": "contiguous"})
    pair = L * B * T / 4 * 2 * K * H * 4
    assert found[("seq",), "collective-permute"] == pytest.approx(hops * 3 * pair, rel=0.05)  # and the documents of the keys
    gathered = total({"seq": 4}, parallel={"attention": "all_gather"})
    assert gathered[("seq",), "all-gather"] == pytest.approx(3 * pair, rel=0.05)


@pytest.mark.parametrize("states, messages", [("ring", 7), ("log", 1 + 3)])
def test_states_pass_in_messages(states, messages):
    retention = {"pattern": ("retention",), "mixers": {"retention": {"num_heads": 4, "head_dim": 8, "value_dim": 16}}}
    found = total({"seq": 8}, 8, model=retention, parallel={"states": states})
    assert found[("seq",), "collective-permute"] == messages * B * 4 * 8 * 16 * 4 * 2 * L


@pytest.mark.parametrize("experts, rows", [("padded", 2 * (B // 2) * T), ("ragged", B // 2 * T * 2), ("gather", None)])
def test_tokens_travel_to_experts_and_back(experts, rows):
    """Two trips forward and two back, one with 128 lanes of weights; the worst case is every token at one of two shards, each with two
    of four experts."""
    moe = {"channel": ("moe",), "channels": {"moe": {"num_experts": 4, "top_k": 2, "hidden": 16}}}
    found = total({"expert": 2}, 2, model=moe, parallel={"experts": experts})
    kind = {"padded": "all-to-all", "ragged": "ragged-all-to-all"}.get(experts)
    if rows is None:
        assert found[("expert",), "all-gather"] == 2 * L * 1 / 2 * 4 * 4 * 3 * D * 16
    else:
        room = rows * (2 if experts == "padded" else 1)  # twice the experts of a token may be at one shard
        counts = 4 * 4 * L  # int32 for every expert, to one other shard
        assert found[("expert",), "all-to-all"] == counts + (kind == "all-to-all") * 2 * L * 1 / 2 * room * 4 * (2 * D + 128)
        assert found[("expert",), kind] - counts * (kind == "all-to-all") == 2 * L * 1 / 2 * room * 4 * (2 * D + 128)
        assert (("expert",), "all-gather") not in found


def test_tokens_travel_again_unless_their_trips_are_kept():
    moe = {"channel": ("moe",), "channels": {"moe": {"num_experts": 4, "top_k": 2, "hidden": 16}}}
    sent = {r: total({"expert": 2}, 2, model=moe, remat=r)[("expert",), "all-to-all"] for r in ("none", "full", "dots", "save:dispatch")}
    assert sent["full"] == sent["dots"] > 1.2 * sent["none"] and sent["save:dispatch"] < sent["full"]


def test_stages_pass_what_they_computed_at_every_tick():
    found = total({"stage": 2}, 2)
    ticks = 1 + 2 - 1
    assert found[("stage",), "collective-permute"] == 2 * 3 * ticks * 4 * B * T * D


def test_what_is_kept_by_name_is_not_summed_again():
    full, named = (total({"tensor": 2}, 2, remat=remat)[("tensor",), "all-reduce"] for remat in ("full", "save:embed"))
    assert full - named == 2 * 1 / 2 * 4 * B * T * D * L
    assert math.isclose(named, total({"tensor": 2}, 2)[("tensor",), "all-reduce"])


def test_on_a_torus_gradients_of_all_its_dims_are_summed_whole():
    """As programs for TPU v4 do: a group in a plane scatters, one in three dims does not; with ZeRO-1 the replicas are in the same sum."""
    layers, fsdp = 4 * L * (ATTENTION + MLP), ("fsdp",)
    plane, cube = total({"fsdp": 4}, place="v4:2x2x1"), total({"fsdp": 8}, place="v4:2x2x2")
    assert plane == total({"fsdp": 4})
    norms = 4 * D * (2 * L + 1)
    assert (fsdp, "reduce-scatter") not in cube and cube[fsdp, "all-gather"] == 7 / 8 * (2 * layers + 4 * V * D)
    assert cube[fsdp, "all-reduce"] == pytest.approx(2 * 7 / 8 * (layers + 2 * 4 * V * D + norms))
    apart, joint = (total({"data": 2, "fsdp": 4}, place="v4:2x2x2", parallel={"zero1": zero1}) for zero1 in (False, True))
    assert (fsdp, "reduce-scatter") in apart and (fsdp, "reduce-scatter") not in joint
    assert joint[("data", "fsdp"), "all-reduce"] == pytest.approx(2 * 7 / 8 * (layers + 2 * 4 * V * D + norms))


def test_weights_split_over_the_experts_axis_are_gathered_but_experts_are_not():
    """Rows lie over the experts' axis too: what every token uses comes to the rows, tokens go to their experts."""
    model = {"channel": ("moe",), "channels": {"moe": {"num_experts": 4, "top_k": 2, "hidden": F}}}
    rules = {"embed": "fsdp,expert", "priority": "expert"}
    found, before = total({"expert": 4}, model=dict(model), rules=rules), total({"expert": 4}, model=dict(model))
    gathered = 2 * 4 * L * (ATTENTION + D * 4) + 4 * V * D  # attention and routers twice, the table once
    assert found[("expert",), "all-gather"] == pytest.approx(3 / 4 * gathered)
    assert (("expert",), "all-gather") not in before
    assert found[("expert",), "all-to-all"] == before[("expert",), "all-to-all"]


def test_layers_without_a_channel_mixer_send_what_their_mixer_does():
    layers, table, norms = 4 * L * ATTENTION, 4 * V * D, 4 * D
    found = total({"fsdp": 4}, model={"channel": ("none",), "channels": {}})
    assert found[("fsdp",), "all-gather"] == 3 / 4 * (2 * layers + table)
    assert found[("fsdp",), "all-reduce"] == 2 * 3 / 4 * norms * (L + 1)
    one = total({"tensor": 2}, 2, model={"channel": ("none",), "channels": {}})[("tensor",), "all-reduce"]
    both = total({"tensor": 2}, 2)[("tensor",), "all-reduce"]
    assert 0 < one < both


def test_a_short_convolution_sends_its_last_inputs_to_one_neighbour():
    """Two inputs of every row and layer, forward, and their gradients back."""
    model = {"pattern": ("short_conv",), "mixers": {}, "channel": ("none",), "channels": {}}
    assert total({"seq": 4}, model=model)[("seq",), "collective-permute"] == 2 * L * B * 2 * D * 4


def test_rings_of_experts_gradients_begin_everywhere_at_once():
    """Two rings of two: half of W round each, 3 / 4 of a hop's worth on average, then what is left of the other half."""
    moe = {"channel": ("moe",), "channels": {"moe": {"num_experts": 4, "top_k": 2, "hidden": 16}}}
    fields = {"model": moe, "rules": {"embed": "data,fsdp", "priority": "expert"}, "parallel": {"gradient_rings": "data,fsdp"}}
    found = total({"data": 2, "fsdp": 2, "expert": 2}, 8, **fields)
    experts = 4 * L * 2 * 3 * D * 16
    assert found[("data",), "collective-permute"] == found[("fsdp",), "collective-permute"] == 3 / 4 * experts / 2 * (1 + 1 / 2)
    with pytest.raises(ConfigError, match="expected the mesh axes that split weights, data,fsdp"):  # as when it is compiled
        total({"data": 2, "fsdp": 2, "expert": 2}, 8, **fields | {"parallel": {"gradient_rings": "fsdp,data"}})
    moe["channels"]["moe"]["bias"] = True
    come = fields | {"rules": {"embed": "fsdp"}, "parallel": {"gradient_rings": "fsdp", "experts": "gather"}}
    assert total({"fsdp": 2, "expert": 2}, **come)[("fsdp",), "collective-permute"]


def test_a_mixer_made_again_gathers_its_weights_again():
    """Its result comes long before its gradients; kept, there is no need. A channel mixer's weights are gathered twice in any case."""
    none, full, kept = (total({"fsdp": 4}, remat=remat)[("fsdp",), "all-gather"] for remat in ("none", "full", "save:embed"))
    assert full - none == 3 / 4 * 4 * L * ATTENTION and kept == none


def test_each_round_of_a_pipeline_runs_its_own_layers():
    """Half of the four layers are a chip's. A micro-batch takes two ticks with both of them, in two rounds four ticks with one."""
    once, twice = (total({"stage": 2, "fsdp": 2}, parallel={"rounds": rounds}) for rounds in (1, 2))
    matrices = 4 * L * (ATTENTION + MLP)
    gathered = [found[("fsdp",), "all-gather"] - 1 / 2 * 4 * V * D for found in (once, twice)]
    assert gathered == [2 * 1 / 2 * matrices / L * ticks * layers for ticks, layers in ((2, 2), (4, 1))]

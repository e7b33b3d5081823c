"""Collectives of compiled programs: kinds, axes, repetitions and bytes equal the formulas."""
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from effmodels.plan.compiled.collectives import collectives, sent_by_axes

R, S = 3, 4 * 16 * 64  # repetitions; bytes of the array that one device holds


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


COLLECTIVES = {
    # name: (what a device does with its [16, 64] floats, kind, bytes that it sends along 4 devices)
    "all-reduce": (lambda x: jax.lax.psum(x, "tensor"), "all-reduce", 2 * 3 / 4 * S),
    "all-gather": (lambda x: jax.lax.all_gather(x, "tensor", tiled=True).sum(0, keepdims=True) + x, "all-gather", 3 / 4 * 4 * S),
    "reduce-scatter": (lambda x: jnp.tile(jax.lax.psum_scatter(x, "tensor", tiled=True), (4, 1)), "reduce-scatter", 3 / 4 * S),
    "permute": (lambda x: jax.lax.ppermute(x, "tensor", [(i, (i + 1) % 4) for i in range(4)]), "collective-permute", S),
    "all-to-all": (lambda x: jax.lax.all_to_all(x, "tensor", 0, 0, tiled=True), "all-to-all", 3 / 4 * S),
}


@pytest.mark.parametrize("name", COLLECTIVES)
def test_bytes_equal_the_formula_and_loops_multiply(name, mesh):
    f, kind, sent = COLLECTIVES[name]

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("tensor", None), out_specs=P("tensor", None), check_vma=False)
    def program(x):
        return jax.lax.scan(lambda x, _: (jnp.tanh(f(x)), None), x, None, length=R)[0]

    found = collectives(jax.jit(program).lower(jax.ShapeDtypeStruct((64, 64), jnp.float32)).compile(), mesh)
    assert [(c.kind, c.axes, c.times) for c in found] == [(kind, ("tensor",), R)]
    assert sent_by_axes(found) == {(("tensor",), kind): R * sent}


@pytest.mark.parametrize(
    "groups, axes, size",
    [
        ("{{0,1,2,3},{4,5,6,7}}", ("tensor",), 4),
        ("{{0,4},{1,5},{2,6},{3,7}}", ("data",), 2),
        ("[2,4]<=[8]", ("tensor",), 4),
        ("[4,2]<=[2,4]T(1,0)", ("data",), 2),
        ("mesh['data'=2,'tensor'=4] {'tensor'}", ("tensor",), 4),
        ("mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_1'}", ("data",), 2),
        ("{}", ("data", "tensor"), 8),
    ],
)
def test_every_notation_of_groups(groups, axes, size, mesh):
    text = (
        "HloModule m\n\nENTRY %main (x: f32[16,64]) -> f32[16,64] {\n  %x = f32[16,64]{1,0} parameter(0)\n"
        f"  ROOT %r = f32[16,64]{{1,0}} all-reduce(%x), replica_groups={groups}, to_apply=%add\n}}\n"
    )
    (found,) = collectives(text, mesh)
    assert (found.axes, found.group, found.size, found.during) == (axes, size, S, None)


def test_what_runs_between_start_and_done(mesh):
    text = (
        "HloModule m\n\nENTRY %main (x: f32[16,64]) -> f32[16,64] {\n  %x = f32[16,64]{1,0} parameter(0)\n"
        "  %s = (f32[16,64]{1,0}, f32[16,64]{1,0}) collective-permute-start(%x), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}\n"
        '  %kernel.7 = f32[16,64]{1,0} custom-call(%x), custom_call_target="tpu_custom_call"\n'
        "  ROOT %d = f32[16,64]{1,0} collective-permute-done(%s)\n}\n"
    )
    (found,) = collectives(text, mesh)
    assert (found.kind, found.axes, found.sent, found.during) == ("collective-permute", ("tensor",), S, ("kernel",))


def test_a_transfer_between_slices_is_a_collective_over_the_axes_that_leave_a_slice():
    devices = np.array([types.SimpleNamespace(slice_index=i // 4) for i in range(8)]).reshape(2, 2, 2)
    mesh = types.SimpleNamespace(devices=devices, axis_names=("data", "fsdp", "tensor"))
    text = (
        "HloModule m\n\nENTRY %main (x: f32[16,64]) -> f32[16,64] {\n  %x = f32[16,64]{1,0} parameter(0)\n"
        "  %s = (f32[16,64]{1,0}, u32[], token[]) send(%x), is_host_transfer=true, "
        'frontend_attributes={_xla_host_transfer_rendezvous="a",_xla_megascale_transfer_type="KIND"}\n'
        "  ROOT %d = token[] send-done(%s)\n}\n"
    )
    (summed,) = collectives(text.replace("KIND", "ALL_REDUCE"), mesh)
    assert (summed.kind, summed.axes, summed.group, summed.sent) == ("all-reduce", ("data",), 2, S)
    (gathered,) = collectives(text.replace("KIND", "ALL_GATHER"), mesh)
    assert (gathered.kind, gathered.size, gathered.sent) == ("all-gather", 2 * S, S)


@pytest.mark.parametrize(
    "strategy, lanes", [("UniDirectionNDRingStrategy{colors:4 phases:2}", 4), ('"emitter":"2DAllGatherOnMajorDim"', 4), ("", 0)]
)
def test_directions_of_the_compilers_strategy_also_of_a_fusion_around_it(strategy, lanes, mesh):
    text = (
        "HloModule m\n\n%all-reduce-scatter.1 (y: f32[16,64]) -> f32[16,64] {\n  %y = f32[16,64]{1,0} parameter(0)\n"
        "  ROOT %r = f32[16,64]{1,0} all-reduce(%y), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add\n}\n\n"
        "ENTRY %main (x: f32[16,64]) -> f32[4,64] {\n  %x = f32[16,64]{1,0} parameter(0)\n"
        f"  ROOT %f = f32[4,64]{{1,0}} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1, backend_config={{{strategy}}}\n}}\n"
    )
    (found,) = collectives(text, mesh)
    assert (found.kind, found.lanes, found.groups) == ("reduce-scatter", lanes, ((0, 1, 2, 3), (4, 5, 6, 7)))

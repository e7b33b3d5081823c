"""Gradients summed along rings of chips: as `psum_scatter`, exactly; experts under it as on one device; what travels are permutes."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from effmodels.config import ConfigError
from effmodels.parallel import axes, expert, mesh, scatter
from effmodels.parallel.options import Options
from tests.contract.cases import draw, jit
from tests.numerics import assert_trees_close
from tests.parallel import test_expert

MESHES = {
    "one ring": ({"data": 8}, (("data",),)),
    "two rings": ({"data": 2, "fsdp": 4}, (("data",), ("fsdp",))),
    "a ring of two axes": ({"data": 2, "fsdp": 2, "seq": 2}, (("data",), ("fsdp", "seq"))),
    "three rings": ({"data": 2, "fsdp": 2, "seq": 2}, (("data",), ("fsdp",), ("seq",))),
}


@pytest.mark.core
@pytest.mark.parametrize("dim", [pytest.param(0, marks=pytest.mark.slow), 1])
@pytest.mark.parametrize("case", MESHES)
def test_rings_sum_and_scatter_exactly(case, dim):
    """Whole numbers, so that no order of sums rounds; 3 and 389 columns do not divide by the links, 1,100 is no multiple of the lanes."""
    sizes, rings = MESHES[case]
    over = tuple(a for ring in rings for a in ring)
    made = mesh.make_mesh({"data": 1} | sizes)
    for columns in (3, 389, 1100):
        shape = (16, columns) if dim == 0 else (columns, 16)
        parts = np.random.default_rng(0).integers(-9, 9, (8, *shape)).astype(np.float32)

        def local(x):
            want = jax.lax.psum_scatter(x[0], over, scatter_dimension=dim, tiled=True)
            return scatter.scattered(x[0], rings, dim), want

        placed = PartitionSpec(*(over if i == dim else None for i in range(2)))
        run = jax.shard_map(local, mesh=made, in_specs=(PartitionSpec(over),), out_specs=(placed, placed), check_vma=False)
        got, want = jax.jit(run)(parts)
        np.testing.assert_array_equal(got, parts.sum(0))
        np.testing.assert_array_equal(got, want)


EXPERTS = {
    "data, fsdp": ({"expert": 2, "data": 2, "fsdp": 2}, {"embed": "data,fsdp"}, "data,fsdp"),
    "fsdp and seq on one ring": ({"expert": 2, "data": 1, "fsdp": 2, "seq": 2}, {"embed": "fsdp,seq"}, "fsdp+seq"),
    "tensor too": ({"data": 2, "fsdp": 2, "tensor": 2}, {"embed": "fsdp"}, "fsdp"),
    "over experts too": ({"data": 1, "fsdp": 4, "expert": 2}, {"embed": "fsdp,expert", "priority": "expert"}, "fsdp"),
}


@pytest.mark.parametrize("case", EXPERTS)
def test_experts_with_rings_as_on_one_device(case, x64):
    sizes, rules, rings = EXPERTS[case]
    k = 2
    step, (x, *w), want = test_expert.make_step(k), test_expert.parameters(), test_expert.wanted(k)
    with axes.use(mesh.make_mesh(sizes), rules, Options(experts="padded", gradient_rings=rings)):
        for name, ids in test_expert.routings(k).items():
            got = step(ids.astype(np.int32), x, draw(test_expert.B, test_expert.T, k, seed=1), *w)
            assert_trees_close({name: got}, {name: want[name]}, rel=1e-11)


def test_biases_of_experts_with_rings(x64):
    """Those of gates and inputs are joined as their matrices are."""
    sizes, rules, rings = EXPERTS["tensor too"]
    E, F, D = (getattr(test_expert, letter) for letter in "EFD")
    biases = draw(E, F, seed=5), draw(E, F, seed=6), draw(E, D, seed=7)
    x, *w = test_expert.parameters()
    ids = test_expert.routings(2)["no token to some, padding"].astype(np.int32)
    arrays = x, draw(test_expert.B, test_expert.T, 2, seed=1), ids, *w, *biases
    want = test_expert.BIASED(False, *arrays)
    with axes.use(mesh.make_mesh(sizes), rules, Options(experts="padded", gradient_rings=rings)):
        assert_trees_close(test_expert.BIASED(True, *arrays), want, rel=1e-11)


def test_a_width_that_rings_cannot_split_is_refused():
    x, w = draw(4, 4, 6), (draw(4, 6, 8), draw(4, 8, 6))
    ids, weights = np.zeros((4, 4, 1), np.int32), np.ones((4, 4, 1))
    with axes.use(mesh.make_mesh({"fsdp": 4}, jax.devices()[:4]), {"embed": "fsdp"}, Options(gradient_rings="fsdp")):
        with pytest.raises(ConfigError, match="gradient_rings: experts of width 6 cannot be split over 4"):
            jax.eval_shape(lambda x: expert.expert_ffn(x, ids, weights, w[:1], w[1], jnp.tanh), x)


def test_what_is_summed_travels_by_permutes():
    made = mesh.make_mesh({"data": 2, "fsdp": 4})
    rings = (("data",), ("fsdp",))

    @functools.partial(jax.shard_map, mesh=made, in_specs=PartitionSpec(("data", "fsdp")), out_specs=PartitionSpec(), check_vma=False)
    def loss(w):
        return jax.lax.pmean(jnp.sum(scatter.gathered(w, rings, 0) ** 2), ("data", "fsdp"))

    w = draw(16, 24, dtype=jnp.float32)
    text = jit(jax.grad(loss)).lower(w).as_text()
    assert "collective_permute" in text and "reduce_scatter" not in text
    np.testing.assert_allclose(jit(jax.grad(loss))(w), 2 * w, rtol=1e-6)


@pytest.mark.parametrize("text", ["fsdp", "fsdp,data", "data+seq"])
def test_rings_must_be_those_that_split_weights(text):
    with axes.use(mesh.make_mesh({"data": 2, "fsdp": 2, "seq": 2}), {"embed": "data,fsdp"}):
        assert scatter.rings("data,fsdp,expert", "embed") == (("data",), ("fsdp",))  # an axis of one device is no ring
        assert scatter.rings("", "embed") == ()
        with pytest.raises(ConfigError, match=r"parallel.gradient_rings=.* expected the mesh axes that split weights, data,fsdp \(rules"):
            scatter.rings(text, "embed")
    assert scatter.rings(text, "embed") == ()  # without a mesh

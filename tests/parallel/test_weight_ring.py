"""A weight's gradient summed in rings while it is computed equals the plain sum: value and every gradient, any placement, odd sizes.

Letters: B batch, T time, D model, F ffn, N heads, H head dim.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from effmodels.config import ConfigError
from effmodels.layers.linear import dot
from effmodels.layers.param import param
from effmodels.parallel import axes, mesh, torus, weight_ring
from effmodels.parallel.options import Options
from effmodels.plan import topology
from effmodels.plan.compiled import collectives
from effmodels.verify import verify
from tests.contract.cases import draw
from tests.numerics import assert_trees_close
from tests.verify.cases import tiny

RING = Options(gradient_sum="ring")
B, T, D, F, N, H = 8, 6, 24, 10, 4, 3


def summed(x, g, dims, last):
    """`summed_product` over eight devices, each with its own rows."""
    over = mesh.make_mesh({"fsdp": 8})
    spec = PartitionSpec(None, "fsdp") if last else PartitionSpec("fsdp")
    ring = jax.shard_map(
        lambda x, g: weight_ring.summed_product(x, g, axis=("fsdp",), dims=dims, last=last),
        mesh=over, in_specs=(PartitionSpec("fsdp"),) * 2, out_specs=spec, check_vma=False,
    )  # fmt: skip
    return np.asarray(jax.jit(ring)(x, g))


@pytest.mark.core
@pytest.mark.parametrize("dims", [(8,), (2, 4), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("columns", [3, 37])
def test_summed_product(dims, columns, x64):
    x, g = draw(16, 24), draw(16, columns, seed=1)
    want = np.asarray(x).T @ np.asarray(g)
    for last in (False, True):
        np.testing.assert_allclose(summed(x, g, dims, last), want.T if last else want, rtol=1e-12, atol=1e-12)


def test_whole_tiles_change_places(x64):
    """Shards of 128 columns are put in the order of another dim by whole tiles."""
    x, g = draw(8 * 8, 8 * 128), draw(8 * 8, 8, seed=1)
    np.testing.assert_allclose(summed(x, g, (2, 4), False), np.asarray(x).T @ np.asarray(g), rtol=1e-12, atol=1e-12)


def test_rounding_in_bfloat16():
    """What travels is rounded at every stop: less than twice the error of adding eight rounded products."""
    x, g = (jnp.asarray(draw(512, n, seed=n), jnp.bfloat16) for n in (24, 16))
    exact = np.asarray(x, np.float64).T @ np.asarray(g, np.float64)
    parts = np.einsum("nmd,nmf->ndf", *(np.asarray(a, np.float32).reshape(8, 64, -1) for a in (x, g)))
    reduced = np.asarray(sum(jnp.asarray(p, jnp.bfloat16) for p in parts), np.float64)
    error = lambda got: np.sqrt(np.mean((got - exact) ** 2) / np.mean(exact**2))  # noqa: E731
    for dims in ((8,), (2, 4)):
        assert error(summed(x, g, dims, False).astype(np.float64)) < 2 * error(reduced)
    assert error(reduced) < 2**-7


PROJECTIONS = {
    "in": ("BTD,DF->BTF", (B, T, D), (D, F), ("embed", "mlp")),
    "out": ("BTF,FD->BTD", (B, T, F), (F, D), ("mlp", "embed")),
    "to heads": ("BTD,DNH->BTNH", (B, T, D), (D, N, H), ("embed", "heads", "head_dim")),
    "from heads": ("BTNH,NHD->BTD", (B, T, N, H), (N, H, D), ("heads", "head_dim", "embed")),
}
MESHES = {
    "fsdp": ({"fsdp": 8}, {}),
    "data fsdp tensor": ({"data": 2, "fsdp": 2, "tensor": 2}, {}),
    "two axes": ({"fsdp": 4, "seq": 2}, {"embed": ("fsdp", "seq")}),
    "rows of another axis": ({"data": 2, "fsdp": 4}, {"embed": None, "mlp": "data", "heads": "data"}),
}


def loss_and_gradients(spec, x, w, names):
    weight = param(lambda *_: w, None, w.shape, names, in_dims=())
    f = lambda x, w: jnp.sin(dot(spec, x, weight.replace(w))).sum()  # noqa: E731
    return jax.jit(jax.value_and_grad(f, (0, 1)))(x, w)


CASES = [
    ("in", "fsdp"), ("out", "data fsdp tensor"), ("to heads", "two axes"), ("from heads", "data fsdp tensor"),
    ("in", "rows of another axis"),
]  # fmt: skip


@pytest.mark.parametrize("projection, place", CASES)
def test_projection(projection, place, x64):
    spec, x_shape, w_shape, names = PROJECTIONS[projection]
    sizes, rules = MESHES[place]
    x, w = draw(*x_shape), draw(*w_shape, seed=1)
    y = np.einsum(spec, x, w)
    _, gradients = jax.vjp(lambda x, w: jnp.einsum(spec, x, w), x, w)
    want = np.sin(y).sum(), gradients(np.cos(y))
    with axes.use(mesh.make_mesh(sizes), rules, RING):
        assert "ppermute" in str(jax.make_jaxpr(functools.partial(loss_and_gradients, spec, names=names))(x, w))
        assert_trees_close(loss_and_gradients(spec, x, w, names), want, rel=1e-12)


def test_what_does_not_compose_is_refused():
    with axes.use(mesh.make_mesh({"fsdp": 4, "tensor": 2}), {"embed": ("fsdp", "tensor"), "mlp": None}, RING):
        with pytest.raises(ConfigError, match=r"parallel.gradient_sum='ring': the weight \('embed', 'mlp'\) is split by rules.embed"):
            weight_ring.placed("BTD,DF->BTF", ("embed", "mlp"))


@pytest.mark.parametrize(
    "coords, rings",
    [
        ([(x, y, 0) for x in range(8) for y in range(8)], (8, 8)),
        ([(x, y, z) for x in range(4) for z in range(2) for y in range(4)], (4, 2, 4)),
        ([(0, 0, 0), (1, 0, 0), (1, 1, 0), (0, 1, 0)], (4,)),  # round a square: no product of lines, one ring
        ([(0, 0, 0)], (1,)),
    ],
)
def test_rings_of_a_torus(coords, rings):
    assert torus.straight_lines(coords) == rings


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 4}, {"fsdp": 2, "seq": 2, "tensor": 2}], ids=str)
def test_a_whole_model(sizes):
    report = verify(tiny(sizes, {"gradient_sum": "ring"}), checks=["mesh"])
    assert report.passed, report.table()


@pytest.mark.aot
def test_products_run_while_sums_travel():
    """On v4 every sum of the loop is under way while a product is computed, and the compiler adds no sum of its own over the ring."""
    over = topology.mesh("v4", fsdp=4)
    rows, split = NamedSharding(over, PartitionSpec("fsdp")), NamedSharding(over, PartitionSpec("fsdp", None))
    shapes = [jax.ShapeDtypeStruct(n, jnp.bfloat16, sharding=place) for n, place in (((4, 2048, 2048), rows), ((2048, 4096), split))]
    names = ("embed", "mlp")
    weight = param(lambda *_: jnp.zeros((1, 1)), None, (1, 1), names, in_dims=())
    with axes.use(over, None, RING):
        loss = lambda x, w: dot("BTD,DF->BTF", x, weight.replace(w)).astype(jnp.float32).sum()  # noqa: E731
        found = collectives.collectives(jax.jit(jax.grad(loss, 1), out_shardings=split).lower(*shapes).compile(), over)
    sums = [c for c in found if c.kind == "collective-permute"]
    assert sums and all(c.during for c in sums), [(c.name, c.during) for c in sums]
    assert not [c for c in found if c.kind in ("all-reduce", "reduce-scatter")]

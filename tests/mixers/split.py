"""A mixer over a split sequence against the same on one device."""
import jax
import jax.numpy as jnp
import numpy as np

from effmodels.layers.context import Ctx
from effmodels.models import state as model_state
from effmodels.parallel import axes, layouts, mesh
from effmodels.parallel.options import Options
from tests.contract.cases import draw, jit
from tests.numerics import assert_close, assert_trees_close

# Documents of 24 tokens in six per shard; the second row has one that ends between shards.
SEGMENTS = np.array([[1] * 9 + [2] * 2 + [3] * 10 + [0] * 3, [1] * 6 + [2] * 12 + [3] * 6], np.int32)


def assert_split_is_whole(graphdef, params, d_model, layout, rel):
    """Values (within rel) and gradients (within 10 rel) of packed rows, time over four devices and heads or channels over two."""
    rows, probe = draw(2, 24, d_model, seed=4), draw(2, 24, d_model, seed=5)

    def run(params, x, probe, segments):
        def loss(params, x):
            y = model_state.merge(graphdef, params, {})(x, Ctx(segment_ids_BT=segments))
            return jnp.sum(y * probe * (segments > 0)[..., None]), y

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    (want_p, want_x), want = jit(lambda p, x: run(p, x, probe, SEGMENTS))(params, rows)
    with axes.use(mesh.make_mesh({"seq": 4, "tensor": 2}), parallel=Options(layout=layout)):
        x, w, s = (layouts.to_layout(a, layout, 4) for a in (rows, probe, SEGMENTS))
        (got_p, got_x), got = jit(lambda p, x: run(p, x, w, s))(params, x)
    valid = SEGMENTS > 0
    assert_close("values", layouts.from_layout(np.asarray(got), layout, 4)[valid], np.asarray(want)[valid], rel=rel)
    assert_close("gradient of x", layouts.from_layout(np.asarray(got_x), layout, 4), want_x, rel=10 * rel)
    assert_trees_close(got_p, want_p, rel=10 * rel)

"""Latent attention against a naive form head by head, absorbed against expanded, and a sequence split over devices against one device.

Letters: T time, D model, N heads, H head dim, P value dim, R rank.
"""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effmodels.config import ConfigError, build
from effmodels.layers.context import Ctx
from effmodels.mixers.base import Env
from effmodels.mixers.latent import Latent, _absorbs
from effmodels.models import state as model_state
from effmodels.parallel import axes, layouts, mesh
from effmodels.parallel.options import Options
from tests.contract.cases import decode_ctx, draw, fill, jit
from tests.mixers.oracles import rms
from tests.numerics import assert_close, assert_trees_close

T, D = 19, 12
CASES = {
    "plain": {"num_heads": 3},
    "deepseek": {
        "num_heads": 2, "head_dim": 5, "rope_dim": 4, "value_dim": 3, "kv_rank": 7, "q_rank": 6, "rope_interleaved": True, "scale": 0.3,
        "norm_eps": 1e-2, "rope_theta": 100.0, "rope_scaling": {"kind": "linear", "factor": 2.0},
    },
}  # fmt: skip


def make(fields):
    env = Env(d_model=D, param_dtype="float64", norm_eps=1e-3)
    return fill(lambda: Latent(build(Latent.Config, fields, "latent"), env, rngs=nnx.Rngs(0)))[:2]


def naive(p, x, fields):
    """One row: softmax of the scores of every head by itself, rotations as complex numbers (arXiv:2405.04434, equations 9 to 19)."""
    H, P, R = p["wk_up"].shape[2], p["wv_up"].shape[2], p["wk_up"].shape[0]
    rope, eps, theta = p["wkv_down"].shape[1] - R, fields.get("norm_eps", 1e-3), fields.get("rope_theta", 1e4)
    scale = fields.get("scale", (H + rope) ** -0.5)
    t_s, slower = jnp.arange(T)[:, None] - jnp.arange(T)[None, :], fields.get("rope_scaling", {}).get("factor", 1.0)
    c = rms(jnp, x @ p["wkv_down"][:, :R], eps, p["kv_norm.scale"])
    k_rope = x @ p["wkv_down"][:, R:]
    y = 0.0
    for n in range(fields["num_heads"]):
        if "wq" in p:
            q = x @ p["wq"][:, n]
        else:
            q = rms(jnp, x @ p["wq_down"], eps, p["q_norm.scale"]) @ p["wq_up"][:, n]
        scores = q[:, :H] @ (c @ p["wk_up"][:, n]).T
        for i in range(rope // 2):
            one, two = (2 * i, 2 * i + 1) if fields.get("rope_interleaved") else (i, i + rope // 2)
            q_i, k_i = q[:, H + one] + 1j * q[:, H + two], k_rope[:, one] + 1j * k_rope[:, two]
            scores = scores + jnp.real(q_i[:, None] * jnp.conj(k_i)[None, :] * jnp.exp(1j * theta ** (-2 * i / rope) / slower * t_s))
        weights = jnp.where(t_s >= 0, jnp.exp(scale * scores), 0.0)
        values = (weights / weights.sum(axis=1, keepdims=True)) @ (c @ p["wv_up"][:, n])
        assert values.shape == (T, P)
        y = y + values @ p["wo"][n]
    return y


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_the_naive_form(name, x64):
    graphdef, params = make(CASES[name])
    x, probe = draw(T, D, seed=1), draw(T, D, seed=2)

    @jit
    def run(params, x):
        def of(f):
            return jax.grad(lambda p, x: (jnp.sum(f(p, x) * probe), f(p, x)), argnums=(0, 1), has_aux=True)(params, x)

        return of(lambda p, x: model_state.merge(graphdef, p, {})(x[None], Ctx())[0]), of(lambda p, x: naive(p, x, CASES[name]))

    (got_grads, got), (want_grads, want) = run(params, x)
    assert_close("values", got, want, rel=1e-12)
    assert_trees_close(got_grads, want_grads, rel=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_absorbed_is_expanded(name, x64):
    graphdef, params = make(CASES[name])
    x, valid = draw(2, T, D), np.ones((2, T), bool)
    valid[1, :3] = valid[1, 7] = False

    @jit
    def run(params, x):
        mixer = model_state.merge(graphdef, params, {})
        _, state = mixer.prefill(x, decode_ctx(valid), mixer.init_state(2, T + 2, jnp.float64), valid)
        ctx = decode_ctx(np.ones((2, T), bool))
        q = mixer._queries(x, ctx)
        where = {"positions": ctx.index_BT, "kv_positions": state.index_BS, "segment_ids": ctx.segment_ids_BT}
        where["kv_segment_ids"] = (state.index_BS >= 0).astype(jnp.int32)
        return mixer._absorbed(q, state.c_BSC, **where), mixer._expanded(q, state.c_BSC, **where)

    absorbed, expanded = run(params, x)
    assert np.abs(np.asarray(expanded)).max() > 0.1
    assert_close("absorbed", absorbed, expanded, rel=1e-13)


def test_the_cheaper_form_runs():
    """DeepSeek-V2's dims: expanding pays from 171 queries on."""
    mixer = Latent.Config(num_heads=128, head_dim=128, rope_dim=64, value_dim=128, kv_rank=512, q_rank=1536)
    assert [_absorbs(mixer, Env(d_model=5120), t) for t in (1, 170, 171, 4096)] == [True, True, False, False]


def test_parameters_and_cache_are_those_of_the_published_models():
    """DeepSeek-V2-Lite's attention: 2048 x 16 x 192 + 2048 x 576 + 512 x 16 x 256 + 16 x 128 x 2048 and a norm of 512; V3's likewise."""
    lite = Latent.Config(num_heads=16, head_dim=128, rope_dim=64, value_dim=128, kv_rank=512)
    v3 = Latent.Config(num_heads=128, head_dim=128, rope_dim=64, value_dim=128, kv_rank=512, q_rank=1536)
    assert Latent.cost(lite, Env(d_model=2048), 16).params == 6291456 + 1179648 + 2097152 + 4194304 + 512
    queries, keys_values = 1536 * (7168 + 128 * 192 + 1), 7168 * 576 + 512 * (128 * 256 + 1)
    assert Latent.cost(v3, Env(d_model=7168), 16).params == queries + keys_values + 128 * 128 * 7168
    assert Latent.cost(v3, Env(d_model=7168), 1000).state_bytes == 1000 * (576 * 2 + 4)


@pytest.mark.parametrize("layout", ["contiguous", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zigzag", "striped"))])
def test_a_split_sequence_is_one_device(layout, x64):
    """Values and gradients of packed rows, time split over four devices and heads over two."""
    graphdef, params = make({"num_heads": 4, "head_dim": 3, "rope_dim": 2, "value_dim": 5, "kv_rank": 6})
    rows, probe = draw(1, 24, D, seed=4), draw(1, 24, D, seed=5)
    segments = np.array([[1] * 9 + [2] * 2 + [3] * 10 + [0] * 3], np.int32)

    def run(params, x, probe, segments, layout):
        def loss(params, x):
            y = model_state.merge(graphdef, params, {})(x, Ctx(segment_ids_BT=segments, layout=layout))
            return jnp.sum(y * probe * (segments > 0)[..., None]), y

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    (want_p, want_x), want = jit(lambda p, x: run(p, x, probe, segments, "contiguous"))(params, rows)
    with axes.use(mesh.make_mesh({"seq": 4, "tensor": 2}), parallel=Options(layout=layout)):
        x, w, s = (layouts.to_layout(a, layout, 4) for a in (rows, probe, segments))
        (got_p, got_x), got = jit(lambda p, x: run(p, x, w, s, layout))(params, x)
    valid = segments[0] > 0
    assert_close("values", layouts.from_layout(np.asarray(got), layout, 4)[:, valid], np.asarray(want)[:, valid], rel=1e-12)
    assert_close("gradient of x", layouts.from_layout(np.asarray(got_x), layout, 4), want_x, rel=1e-11)
    assert_trees_close(got_p, want_p, rel=1e-11)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_heads": 5}, r"latent: d_model=12 is not divisible by num_heads=5; valid: \[1\], or set head_dim"),
        ({"num_heads": 0}, r"expected num_heads >= 1, got num_heads=0"),
        ({"kv_rank": 0}, r"expected kv_rank >= 1, got kv_rank=0"),
        ({"num_heads": 2, "rope_dim": 3}, r"rope_dim=3 must be even"),
        ({"num_heads": 3, "rope_scaling": {"kind": "yarm"}}, r"latent.rope_scaling.kind: unknown 'yarm'. Did you mean 'yarn'"),
    ],
)
def test_bad_configs_say_what_to_do(fields, message):
    with pytest.raises(ConfigError, match=message):
        Latent.check(Latent.Config(**fields), Env(d_model=D))

"""Local-global attention against masks drawn query by query: windows that move or step, first, regular and learned global tokens, gates.

Letters: T time, N heads, K kv heads, H head dim, D model.
"""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs.common import window_stages
from effmodels.config import ConfigError, ModelConfig
from effmodels.layers.context import Ctx
from effmodels.layers.positions import rope_frequencies
from effmodels.mixers.base import Env
from effmodels.mixers.local_global import LocalGlobal, pairs
from effmodels.models import resolve
from effmodels.models import state as model_state
from effmodels.parallel import axes, layouts, mesh
from effmodels.parallel.options import Options
from tests.contract.cases import draw, fill, jit
from tests.numerics import assert_close, assert_trees_close

T, D, H = 32, 12, 6
ENV = Env(d_model=D, param_dtype="float64")
DOCUMENTS = np.array([1] * 3 + [2] * 17 + [3] * 9 + [0] * 3, np.int32)
CASES = {
    "first": {"num_heads": 4, "num_kv_heads": 2, "window": 3, "num_first": 2, "sinks": True, "soft_cap": 3.0},
    "every_strided_gate": {"num_heads": 2, "window": 4, "stride": 2, "globals": "every", "every": 3, "gate": True, "sinks": True},
    "top": {"num_heads": 4, "window": 2, "globals": "top", "top_block": 3, "top_ratio": 0.5},
    "top_gate": {"num_heads": 2, "window": 3, "globals": "top", "top_block": 4, "top_ratio": 0.5, "gate": True},
    "strided": {"num_heads": 2, "window": 6, "stride": 3, "globals": "none", "sinks": True},
    "own_block": {"num_heads": 2, "window": 0, "stride": 4, "num_first": 3},
}


def masks(fields, segments, scores):
    """(local, far) bool [T, T], one query and one key after the other."""
    c = LocalGlobal.Config(**fields)
    local, far = np.zeros((2, len(segments), len(segments)), bool)
    starts = [t for t in range(len(segments)) if t == 0 or segments[t] != segments[t - 1]] + [len(segments)]
    for start, stop in zip(starts, starts[1:]):
        for q in range(stop - start):
            floor = (q if c.stride is None else q // c.stride * c.stride) - c.window
            for k in range(q + 1):
                if segments[start] == 0:
                    continue
                local[start + q, start + k] = k >= floor
                seen_from = {"none": False, "first": k < c.num_first, "every": k % c.every == 0}.get(c.globals)
                if c.globals == "top":
                    first = k // c.top_block * c.top_block
                    block = scores[start + first : min(stop, start + first + c.top_block)]
                    best = np.argsort(-block, kind="stable")[: int(np.ceil(c.top_ratio * c.top_block))]
                    far[start + q, start + k] = k - first in best and first + c.top_block - 1 < floor
                else:
                    far[start + q, start + k] = seen_from and k < floor
    return local, far


def oracle(p, x_TD, fields, local, far):
    """Softmax over the pairs of both masks, or of each with a gate between; learned global tokens have their values weighed."""
    heads = fields["num_heads"]
    kv_heads, output, half = fields.get("num_kv_heads", heads), 0.0, H // 2
    turn = np.exp(1j * np.arange(len(x_TD))[:, None] * rope_frequencies(H, 10_000.0))
    value_weight = jax.nn.sigmoid(x_TD @ p["w_score"])[:, None] if "w_score" in p else 1.0
    for n in range(heads):
        g = n * kv_heads // heads
        q, k = ((a[:, :half] + 1j * a[:, half:]) * turn for a in (x_TD @ p["wq"][:, n], x_TD @ p["wk"][:, g]))
        v, scores = x_TD @ p["wv"][:, g], (q @ k.conj().T).real / H**0.5
        if "soft_cap" in fields:
            scores = fields["soft_cap"] * jnp.tanh(scores / fields["soft_cap"])
        near, beyond = jnp.exp(scores) * local, jnp.exp(scores) * far
        sink = jnp.exp(p["sinks"][n]) if "sinks" in p else 0.0
        if fields.get("gate"):
            gate = jnp.where(far.any(1), jax.nn.sigmoid(x_TD @ p["w_gate"][:, n]), 1.0)[:, None]
            safe = lambda a: jnp.where(a == 0, 1.0, a)  # noqa: E731
            y = gate * (near @ v) / safe(near.sum(1, keepdims=True) + sink)
            y = y + (1 - gate) * (beyond @ (v * value_weight)) / safe(beyond.sum(1, keepdims=True))
        else:
            total = (near + beyond).sum(1, keepdims=True) + sink
            y = (near @ v + beyond @ (v * value_weight)) / jnp.where(total == 0, 1.0, total)
        output = output + y @ p["wo"][n]
    return output


def make(fields):
    return fill(lambda: LocalGlobal(LocalGlobal.Config(head_dim=H, **fields), ENV, rngs=nnx.Rngs(0)))[:2]


def loss_and_grads(f, params, x, probe):
    return jax.grad(lambda p, x: (jnp.sum(f(p, x) * probe), f(p, x)), argnums=(0, 1), has_aux=True)(params, x)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in ("first", "top", "own_block") else []) for n in CASES])
def test_values_and_gradients_are_those_of_the_masks(name, x64):
    fields, probe = CASES[name], draw(T, D, seed=2) * (DOCUMENTS > 0)[:, None]
    graphdef, params = make(fields)
    x = draw(T, D, seed=1)
    scores = x @ params["w_score"] if "w_score" in params else None

    @jit
    def run(params, x):
        def mixer(p, x, segments=None):
            ids = None if segments is None else segments[None]
            return model_state.merge(graphdef, p, {})(x[None], Ctx(segment_ids_BT=ids))[0]

        results = []
        for segments in (None, DOCUMENTS):
            local, far = masks(fields, np.ones(T - 3, int) if segments is None else segments, scores)
            rows = slice(0, len(local))
            assert far.any() or fields.get("globals") == "none"
            results.append(loss_and_grads(lambda p, x, s=segments, r=rows: mixer(p, x[r], s), params, x, probe[rows]))
            results.append(loss_and_grads(lambda p, x, r=rows, m=(local, far): oracle(p, x[r], fields, *m), params, x, probe[rows]))
        return results

    one, one_want, packed, packed_want = run(params, x)
    for what, (got_grads, got), (want_grads, want) in (("one document", one, one_want), ("packed", packed, packed_want)):
        real = (DOCUMENTS > 0)[: len(got)]
        assert_close(what, got[real], want[real], rel=1e-12)
        assert_trees_close(got_grads, want_grads, rel=1e-10)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("length", [1, 7, 64])
def test_pairs_in_closed_form_are_those_of_the_mask(name, length):
    local, far = masks(CASES[name], np.ones(length, int), draw(length))
    assert pairs(LocalGlobal.Config(**CASES[name]), length) == (local.sum(), far.sum())
    assert not (local & far).any()


def test_share_of_pairs_falls_like_one_over_n_but_not_with_a_share_of_global_tokens():
    """Window and 16 tokens: 0.449, 0.125, 0.032 of all causal pairs at 2k, 8k, 32k. With 5 % global tokens the share stays above 5 %."""
    share = lambda c, n: sum(pairs(c, n)) / (n * (n + 1) / 2)  # noqa: E731
    fixed = LocalGlobal.Config(window=511, num_first=16)
    assert np.allclose([share(fixed, n) for n in (2048, 8192, 32768)], [0.449, 0.125, 0.032], atol=1.1e-3)
    routed = LocalGlobal.Config(window=1024, globals="top", top_block=100, top_ratio=0.05)
    assert 0.05 < share(routed, 1_000_000) < 0.053


@pytest.mark.parametrize(
    "name, form, layout",
    [
        pytest.param("top_gate", "ring", "zigzag", marks=pytest.mark.slow),
        *(pytest.param("every_strided_gate", form, "zigzag", marks=pytest.mark.slow) for form in ("ring", "all_gather")),
        pytest.param("top_gate", "ring", "striped", marks=pytest.mark.slow),
        pytest.param("top", "ulysses", "striped", marks=pytest.mark.slow),  # two heads for each tensor shard to exchange
        ("first", "ring", "contiguous"),
    ],
)
def test_a_split_sequence_equals_one_device(name, form, layout, x64):
    graphdef, params = make(CASES[name])
    x, probe = draw(2, T, D, seed=1), draw(2, T, D, seed=2)
    segments = np.stack([DOCUMENTS, np.ones(T, np.int32)])
    probe = probe * (segments > 0)[..., None]

    def run(params, x, segments, probe):
        layout_here = layout if axes.shards("seq") > 1 else "contiguous"
        ctx = Ctx(segment_ids_BT=segments, positions_BT=positions(segments, layout_here), layout=layout_here)
        return loss_and_grads(lambda p, x: model_state.merge(graphdef, p, {})(x, ctx), params, x, probe)

    def positions(segments, layout_here):
        return layouts.to_layout(jnp.broadcast_to(jnp.arange(T), segments.shape), layout_here, 2)

    (want_grads, want_dx), want = jit(run)(params, x, segments, probe)
    with axes.use(mesh.make_mesh({"data": 2, "seq": 2, "tensor": 2}), parallel=Options(attention=form, layout=layout)):
        arrays = [layouts.to_layout(a, layout, 2) for a in (x, segments, probe)]
        (grads, dx), got = jax.jit(run)(params, *arrays)
    real = segments > 0
    assert_close("values", layouts.from_layout(np.asarray(got), layout, 2)[real], np.asarray(want)[real], rel=1e-12)
    assert_trees_close(grads, want_grads, rel=1e-10)
    assert_close("dx", layouts.from_layout(np.asarray(dx), layout, 2), want_dx, rel=1e-10)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"globals": "last"}, r"local_global.globals: expected one of none, first, every, top, got 'last'"),
        ({"stride": 3, "window": 4}, r"stride=3 must divide window=4"),
        ({"every": 0}, r"expected every >= 1, got every=0"),
        ({"globals": "top", "top_ratio": 0.0}, r"expected 0 < top_ratio <= 1, got 0.0"),
        ({"globals": "top", "window": 4, "top_block": 8}, r"5 local tokens does not hold the 8 that compete .* top_block <= 5"),
        ({"globals": "none", "gate": True}, r"gate=True weighs global tokens, but globals='none'"),
        ({"window": -1}, r"expected window >= 0"),
    ],
)
def test_bad_configs_say_what_to_do(fields, message):
    with pytest.raises(ConfigError, match=message):
        LocalGlobal.check(LocalGlobal.Config(num_heads=2, **fields), ENV)


def test_windows_by_depth_are_a_pattern_of_named_mixers():
    """A quarter of the layers each: 256, 512, 1k and all keys; the pairs add up."""
    pattern, mixers = window_stages(8, (256, 512, 1024, None), num_heads=2)
    layers = resolve(ModelConfig(vocab_size=8, d_model=16, num_layers=8, pattern=pattern, mixers=mixers)).layers
    assert [kind.mixer.config.window for kind in layers] == [256, 256, 512, 512, 1024, 1024, None, None]

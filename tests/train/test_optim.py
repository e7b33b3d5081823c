"""One update of a stacked model equals one of the unrolled model, for every optimiser; groups, decay, muP, memory.

The toy: 2 layers with a fused 3-D projection, its output, 2 experts, a depth of norms and biases; an embedding and a head.
"""
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effmodels.config import ConfigError
from effmodels.layers.param import ParamInfo
from effmodels.train import optim
from tests.numerics import assert_close

LAYERS = 2
OUTSIDE = {
    "embed": (ParamInfo(("vocab", "embed"), ("embed",)), (24, 8)),
    "head": (ParamInfo(("embed", "vocab"), ("embed",)), (8, 24)),
    "final_norm.scale": (ParamInfo(("norm",)), (8,)),
}
LAYER = {
    "mixer.wq": (ParamInfo(("embed", "heads", "head_dim"), ("embed",)), (8, 3, 4)),
    "mixer.wo": (ParamInfo(("heads", "head_dim", "embed"), ("heads", "head_dim")), (3, 4, 8)),
    "mixer.bq": (ParamInfo(("heads", "head_dim")), (3, 4)),
    "mlp.up": (ParamInfo(("expert", "embed", "expert_mlp"), ("embed",), ("expert",)), (2, 8, 6)),
    "mlp.router": (ParamInfo(("embed", None), ("embed",)), (8, 2)),
    "norm.scale": (ParamInfo(("norm",)), (8,)),
}


def stacked_and_unrolled(draw):
    """Two dicts of the same random numbers: layers stacked under "s.", or one by one under "0." ..."""
    outside = {p: draw(shape) for p, (_, shape) in OUTSIDE.items()}
    layers = [{p: draw(shape) * np.float32(1 + i) for p, (_, shape) in LAYER.items()} for i in range(LAYERS)]
    stacked = outside | {f"s.{p}": np.stack([layer[p] for layer in layers]) for p in LAYER}
    return stacked, outside | {f"{i}.{p}": x for i, layer in enumerate(layers) for p, x in layer.items()}


INFOS = (
    {p: i for p, (i, _) in OUTSIDE.items()} | {f"s.{p}": i.stacked() for p, (i, _) in LAYER.items()},
    {p: i for p, (i, _) in OUTSIDE.items()} | {f"{n}.{p}": i for n in range(LAYERS) for p, (i, _) in LAYER.items()},
)


def drawer(seed):
    rng = np.random.default_rng(seed)
    return lambda shape: rng.normal(size=shape).astype(np.float32)


def shapes(params):
    return {p: x.shape for p, x in params.items()}


def train(config, infos, params, grads, **kwargs):
    """(params, state) after a step with each of `grads`."""
    tx = optim.make_optimizer(config, infos, shapes(params), 10, **kwargs)

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(tx.init)(params)
    for g in grads:
        params, state = step(params, state, g)
    return params, state


def same_training(config, rel, steps=3, only=("",), **kwargs):
    """Trains both groupings on the same gradients and compares the parameters whose paths end in `only`."""
    def keep(tree):
        return {p: x for p, x in tree.items() if p.endswith(tuple(only))}
    params = [keep(p) for p in stacked_and_unrolled(drawer(0))]
    grads = [stacked_and_unrolled(drawer(1 + i)) for i in range(steps)]
    (got, state), (want, _) = (train(config, keep(INFOS[k]), params[k], [keep(g[k]) for g in grads], **kwargs) for k in (0, 1))
    for path in want:
        layer, _, rest = path.partition(".")
        value = got[path] if path in got else got[f"s.{rest}"][int(layer)]
        assert_close(path, value - (params[1][path]), want[path] - params[1][path], rel=rel)
    return got, state, params[0]


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_stacked_equals_unrolled(name):
    options = {"adafactor": {"min_dim_size_to_factor": 4}, "lars": {"trust_coefficient": 1.0}}.get(name, {})
    config = {"name": name, "lr": 0.02, "schedule": "linear", "weight_decay": 0.1, "clip": 1.0, "options": options}
    # Changes are compared, each rounded to its parameter: 1e-4 of a change of 1e-3 is a few float32 roundings. Muon orthogonalises in five
    # steps that amplify roundings; the global statistics of Prodigy and D-Adaptation are summed in another order.
    got, _, before = same_training(config, 1e-3, only=("wq", "up"))
    assert all(bool(jnp.any(got[p] != before[p])) for p in got)


def test_stacking_matters_without_the_rule():
    """The test above can fail: LAMB's trust ratio over a whole stack is another optimiser."""
    params = stacked_and_unrolled(drawer(0))
    grads = stacked_and_unrolled(drawer(1))
    tx = optax.lamb(0.02)
    (u, _), (v, _) = (tx.update({p: g[p] for p in k}, tx.init({p: x[p] for p in k}), {p: x[p] for p in k})
                      for g, x, k in zip(grads, params, (["s.mlp.up"], ["0.mlp.up"])))
    assert float(jnp.abs(u["s.mlp.up"][0] - v["0.mlp.up"]).max()) > 1e-4


@pytest.mark.parametrize("options", [{}, {"multiply_by_parameter_scale": False, "momentum": 0.9, "dtype_momentum": "bfloat16"}])
def test_adafactor_statistics_are_rows_and_columns(options):
    _, state, _ = same_training({"name": "adafactor", "lr": 0.02, "options": {"min_dim_size_to_factor": 4, **options}}, 1e-3,
                                only=("embed", "wq", "up", "s.norm.scale", "0.norm.scale", "1.norm.scale"))
    factored = state["groups"]["adafactor"][0]
    # [layers, embed] and [layers, heads * head_dim]; experts keep their batch dim; embed [vocab, embed].
    assert factored.v_row["s.mixer.wq"].shape == (2, 8) and factored.v_col["s.mixer.wq"].shape == (2, 12)
    assert {factored.v_row["s.mlp.up"].shape, factored.v_col["s.mlp.up"].shape} == {(2, 2, 8), (2, 2, 6)}
    assert {factored.v_row["embed"].shape, factored.v_col["embed"].shape} == {(24,), (8,)}
    assert factored.v["s.norm.scale"].shape == (2, 8)


def test_adafactor_equals_optax_on_plain_matrices():
    params = {"a.w": drawer(0)((16, 8)), "b": drawer(1)((8,))}
    grads = {p: drawer(2)(x.shape) for p, x in params.items()}
    infos = {"a.w": ParamInfo(("embed", "mlp"), ("embed",)), "b": ParamInfo(("mlp",))}
    config = {"name": "adafactor", "lr": 0.1, "schedule": "constant", "options": {"min_dim_size_to_factor": 4}}
    got, _ = train(config, infos, params, [grads] * 2)
    tx = optax.adafactor(0.1, min_dim_size_to_factor=4)
    state, want = tx.init(params), params
    for _ in range(2):
        updates, state = tx.update(grads, state, want)
        want = optax.apply_updates(want, updates)
    for p in want:
        assert_close(p, got[p], want[p], rel=1e-6)


def test_adamw_equals_optax():
    params, _ = stacked_and_unrolled(drawer(0))
    grads, _ = stacked_and_unrolled(drawer(1))
    config = {"name": "adamw", "lr": 0.01, "schedule": "constant", "b2": 0.95, "eps": 1e-7, "weight_decay": 0.3, "decay_embeddings": False}
    got, _ = train(config, INFOS[0], params, [grads] * 3)
    mask = {p: p not in ("embed", "final_norm.scale", "s.mixer.bq", "s.norm.scale") for p in params}
    tx = optax.adamw(0.01, b2=0.95, eps=1e-7, weight_decay=0.3, mask=mask)
    state, want = tx.init(params), params
    for _ in range(3):
        updates, state = tx.update(grads, state, want)
        want = optax.apply_updates(want, updates)
    for p in want:
        assert_close(p, got[p], want[p], rel=1e-6)


def test_muon_orthogonalises_each_matrix_of_each_expert():
    keep = ("s.mixer.wq", "s.mixer.wo", "s.mlp.up")
    params, grads = ({p: x[p] for p in keep} for x in (stacked_and_unrolled(drawer(i))[0] for i in (0, 1)))
    infos = {p: INFOS[0][p] for p in params}
    config = {"name": "muon", "lr": 1.0, "schedule": "constant", "options": {"ns_steps": 8, "ns_coeffs": (2.0, -1.5, 0.5)}}
    after, _ = train(config, infos, params, [grads])
    update = after["s.mlp.up"] - params["s.mlp.up"]
    # Moonlight's scale: singular values 0.2 sqrt(max(8, 6)); these coefficients converge to 1 (the default ones hover around it).
    assert_close("singular values", jnp.linalg.svd(update, compute_uv=False), jnp.full((2, 2, 6), 0.2 * np.sqrt(8)), rel=0.1)
    q = (after["s.mixer.wq"] - params["s.mixer.wq"]).reshape(2, 8, 12)
    assert_close("rms", jnp.sqrt(jnp.mean(q**2, (1, 2))), jnp.full(2, 0.2 * np.sqrt(12 * 8 / (8 * 12))), rel=0.1)
    o = (after["s.mixer.wo"] - params["s.mixer.wo"]).reshape(2, 12, 8)
    assert_close("o", jnp.einsum("lik,lij->lkj", o, o), jnp.broadcast_to(0.04 * 12 * jnp.eye(8), (2, 8, 8)), rel=0.1)


def test_groups_decay_and_description():
    config = {"name": "muon", "weight_decay": 0.1, "decay_embeddings": False, "options": {"adam_lr_ratio": 0.5}}
    g = optim.groups(config, INFOS[0])
    assert {p for p, n in g.optimizer.items() if n == "muon"} == {"s.mixer.wq", "s.mixer.wo", "s.mlp.up", "s.mlp.router"}
    assert {p for p, on in g.decay.items() if on} == {"s.mixer.wq", "s.mixer.wo", "s.mlp.up", "s.mlp.router", "head"}
    assert g.lr_multiplier["head"] == 0.5 and g.lr_multiplier["s.mlp.up"] == 1
    assert optim.groups(config | {"decay_embeddings": True}, INFOS[0]).decay["embed"]
    params, _ = stacked_and_unrolled(drawer(0))
    text, data = optim.describe(config, INFOS[0], shapes(params))
    assert "muon, decay: 608 parameters in 4 arrays (router, up, wo, wq)" in text
    assert sum(row["parameters"] for row in data["groups"]) == sum(x.size for x in params.values())


def test_mup_scales_hidden_matrices_and_tables():
    params, _ = stacked_and_unrolled(drawer(0))
    grads, _ = stacked_and_unrolled(drawer(1))
    config = {"name": "adamw", "lr": 0.1, "schedule": "constant", "weight_decay": 0.5}
    decay_only = {p: -0.05 * x if optim.groups(config, INFOS[0]).decay[p] else 0 * x for p, x in params.items()}
    plain, _ = train(config, INFOS[0], params, [grads])
    mup, _ = train(config, INFOS[0], params, [grads], mup_width_multiplier=4)
    for p in params:
        hidden = p in ("s.mixer.wq", "s.mixer.wo", "s.mlp.up", "s.mlp.router")
        ratio = 0.25 if hidden else 0.5 if "vocab" in INFOS[0][p].dim_names else 1
        step = [x[p] - params[p] - decay_only[p] for x in (mup, plain)]
        assert_close(p, step[0], ratio * step[1], rel=1e-4)
    same_training({"name": "muon", "lr": 0.02}, 1e-3, only=("embed", "up"), mup_width_multiplier=4)


def test_bfloat16_parameters_keep_float32_statistics():
    params = {p: x.astype(jnp.bfloat16) for p, x in stacked_and_unrolled(drawer(0))[0].items() if p in ("s.mlp.up", "final_norm.scale")}
    infos = {p: INFOS[0][p] for p in params}
    for name, options in (("adamw", {"mu_dtype": "bfloat16"}), ("adafactor", {}), ("muon", {})):
        after, state = train({"name": name, "options": options}, infos, params, [params])
        assert all(x.dtype == jnp.bfloat16 for x in after.values())
        kinds = {str(x.dtype) for x in jax.tree.leaves(state)}
        assert kinds == {"float32", "int32"} | ({"bfloat16"} if options else set())


def abstract_state(name, options):
    params, _ = stacked_and_unrolled(drawer(0))
    tx = optim.make_optimizer({"name": name, "options": options, "weight_decay": 0.1}, INFOS[0], shapes(params), 10)
    abstract = jax.eval_shape(tx.init, params)
    return abstract, optim.state_dim_names(abstract, INFOS[0], shapes(params))


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon", "lamb"])
def test_every_moment_ends_in_its_path_and_has_dim_names(name):
    abstract, names = abstract_state(name, {"min_dim_size_to_factor": 4} if name == "adafactor" else {})
    leaves, tree = jax.tree_util.tree_flatten_with_path(abstract)
    for (keypath, leaf), dims in zip(leaves, tree.flatten_up_to(names)):
        assert len(dims) == leaf.ndim, keypath
        if leaf.size > 3:
            assert keypath[-1].key in INFOS[0], keypath
    if name == "adafactor":
        factored = names["groups"]["adafactor"][0]
        assert factored.v_row["s.mixer.wq"] == ("layers", "embed") and factored.v_col["s.mixer.wq"] == ("layers", "heads")


@pytest.mark.parametrize("name, most", [("adafactor", 1.3), ("muon", 2.6)])
def test_updates_of_a_large_stack_need_little_memory(name, most):
    """Of the size of the parameters: the updates themselves (optax returns them), the temporaries of one layer, and Muon's new momentum."""
    shape = {"s.up": (8, 4, 128, 320), "s.down": (8, 4, 320, 128), "embed": (512, 128)}
    up = ParamInfo(("layers", "expert", "embed", "expert_mlp"), ("embed",), ("layers", "expert"))
    down = ParamInfo(("layers", "expert", "expert_mlp", "embed"), ("expert_mlp",), up.batch_dims)
    infos = {"s.up": up, "s.down": down, "embed": OUTSIDE["embed"][0]}
    params = {p: jax.ShapeDtypeStruct(s, jnp.float32) for p, s in shape.items()}
    tx = optim.make_optimizer({"name": name, "weight_decay": 0.1, "clip": 1.0}, infos, shape, 10, sequential_above=2**20)
    state = jax.eval_shape(tx.init, params)
    size = sum(x.size * 4 for x in params.values())
    if name == "adafactor":
        assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) < 0.02 * size

    def step(params, grads, state):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    memory = jax.jit(step, donate_argnums=(0, 2)).lower(params, params, state).compile().memory_analysis()
    assert memory.temp_size_in_bytes < most * size, memory.temp_size_in_bytes / size


@pytest.mark.parametrize("name", ["adafactor", "muon", "lamb"])
def test_layer_by_layer_equals_all_at_once(name):
    options = {"min_dim_size_to_factor": 4} if name == "adafactor" else {}
    params, grads = ({p: x[p] for p in ("s.mixer.wq", "s.mlp.up", "embed")} for x in (stacked_and_unrolled(drawer(i))[0] for i in (0, 1)))
    infos = {p: INFOS[0][p] for p in params}
    config = {"name": name, "lr": 0.1, "clip": 1.0, "options": options}
    got, got_state = train(config, infos, params, [grads] * 2, sequential_above=0)
    want, want_state = train(config, infos, params, [grads] * 2)
    for p in want:
        assert_close(p, got[p] - params[p], want[p] - params[p], rel=1e-4)
    assert jax.tree.structure(got_state) == jax.tree.structure(want_state)
    assert_close("norm", got_state["grad_norm"], jnp.sqrt(sum(jnp.vdot(g, g) for g in grads.values())), rel=1e-6)


def test_grad_scale_is_a_scaled_gradient():
    params, grads = ({p: x[p] for p in ("s.mlp.up", "final_norm.scale")} for x in (stacked_and_unrolled(drawer(i))[0] for i in (0, 1)))
    tx = optim.make_optimizer({"name": "adafactor", "lr": 0.1, "clip": 0.5}, {p: INFOS[0][p] for p in params}, shapes(params), 10)
    update = jax.jit(tx.update)
    got, got_state = update(grads, tx.init(params), params, grad_scale=0.01)
    want, want_state = update({p: 0.01 * g for p, g in grads.items()}, tx.init(params), params)
    for p in params:
        assert_close(p, got[p], want[p], rel=1e-5)
    assert_close("norm", got_state["grad_norm"], want_state["grad_norm"], rel=1e-6)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_frozen_parameters_stay_and_have_no_state(name):
    params, grads = (stacked_and_unrolled(drawer(i))[0] for i in (0, 1))
    config = {"name": name, "lr": 0.1, "weight_decay": 0.1, "clip": 1.0, "frozen": ("s.mixer.*", "embed")}
    still = {p for p in params if p.startswith("s.mixer.") or p == "embed"}
    tx = optim.make_optimizer(config, INFOS[0], shapes(params), 10)
    state = tx.init(params)
    assert not any(p in str(path) for path, _ in jax.tree_util.tree_leaves_with_path(state) for p in still)
    updates, state = tx.update(grads, state, params)
    # What is left is updated as if there were nothing else.
    rest = {p: params[p] for p in params if p not in still}
    alone = optim.make_optimizer({**config, "frozen": ()}, {p: INFOS[0][p] for p in rest}, shapes(rest), 10)
    want, want_state = alone.update({p: grads[p] for p in rest}, alone.init(rest), rest)
    for p in params:
        assert_close(p, updates[p], want.get(p, jnp.zeros_like(params[p])), rel=1e-6)
    assert_close("norm", state["grad_norm"], want_state["grad_norm"], rel=1e-6)
    assert "frozen: " in optim.describe(config, INFOS[0], shapes(params))[0]


@pytest.mark.parametrize("config, kwargs, message", [
    ({"frozen": ("s.mixers.*",)}, {}, "'s.mixers.*' matches no parameter. Did you mean"),
    ({"frozen": "*"}, {}, "nothing is left to train"),
    ({"name": "adamww"}, {}, "Did you mean 'adamw'"),
    ({"name": "lbfgs"}, {}, "line search evaluates the loss again"),
    ({"learning_rate": 1}, {}, "unknown field 'learning_rate'"),
    ({"name": "adafactor", "options": {"b1": 0.9}}, {}, "adafactor does not take 'b1'"),
    ({"name": "muon", "options": {"n_steps": 3}}, {}, "Did you mean 'ns_steps'"),
    ({"options": {"mu_dtype": "bfloat61"}}, {}, "Did you mean 'bfloat16'"),
    ({"name": "adafactor"}, {"mup_width_multiplier": 2}, "multiply_by_parameter_scale"),
    ({"name": "sgd"}, {"mup_width_multiplier": 2}, "no muP rates are known for 'sgd'"),
    ({"name": "muon", "options": {"consistent_rms": 0.2}}, {"mup_width_multiplier": 2}, "spectral scale"),
])
def test_bad_optimizers(config, kwargs, message):
    params, _ = stacked_and_unrolled(drawer(0))
    with pytest.raises(ConfigError, match=message):
        optim.make_optimizer(config, INFOS[0], shapes(params), 10, **kwargs)


def test_bad_shapes_are_named():
    with pytest.raises(ValueError, match="embed has shape"):
        optim.make_optimizer({}, {"embed": OUTSIDE["embed"][0]}, {"embed": (3,)}, 10)

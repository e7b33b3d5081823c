"""Names of dims to mesh axes: what a spec is, every refusal with its sentence, and rules as part of jit's cache key."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from effmodels.config import ConfigError
from effmodels.layers.param import ParamInfo
from effmodels.parallel import axes, mesh


@pytest.fixture(scope="module")
def devices():
    return mesh.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})


def test_specs_follow_the_rules(devices):
    wq = ("embed", "heads", "head_dim")
    assert axes.spec(wq, mesh=devices) == P("fsdp", "tensor", None)
    assert axes.spec(("batch", "seq", "act_embed"), mesh=devices) == P(("data", "fsdp", "expert"), "seq", None)
    assert axes.spec((None, "norm"), mesh=devices) == P(None, None)
    rules = axes.make_rules({"embed": None, "heads": ["tensor", "fsdp"]})
    assert axes.spec(wq, rules=rules, mesh=devices) == P(None, ("tensor", "fsdp"), None)
    assert hash(rules) == hash(axes.make_rules({"heads": ("tensor", "fsdp"), "embed": None}))
    assert axes.shards("heads", mesh=devices, rules=rules) == 4 and axes.shards("heads") == 1


def test_rules_as_typed_on_a_command_line():
    typed = axes.make_rules({"embed": "none", "heads": "tensor, fsdp", "mlp": "default", "vocab": "tensor", "layers": ""})
    assert typed == axes.make_rules({"embed": None, "layers": None, "heads": ("tensor", "fsdp")}) and hash(typed) is not None


def test_two_dims_that_want_one_axis_are_refused_with_both_rules(devices):
    with pytest.raises(ConfigError) as error:
        axes.spec(("embed", "mlp"), rules=axes.make_rules({"embed": "tensor"}), mesh=devices, array="mixer.w_in")
    for part in ("mixer.w_in", "'tensor'", "rules.embed='tensor'", "rules.mlp='tensor'", "Change one of the two rules"):
        assert part in str(error.value), part
    with pytest.raises(ConfigError, match="wanted by two dims"):
        axes.spec(("heads", "heads"), mesh=devices)


def test_a_priority_says_which_of_two_dims_gets_the_axis(devices):
    rules = axes.make_rules({"embed": "fsdp", "mlp": "tensor,fsdp", "priority": "mlp"})
    assert axes.spec(("embed", "mlp"), rules=rules, mesh=devices) == P(None, ("tensor", "fsdp"))
    assert axes.spec(("mlp", "embed"), rules=rules, mesh=devices) == P(("tensor", "fsdp"), None)
    assert axes.spec(("embed", "heads"), rules=rules, mesh=devices) == P("fsdp", "tensor")
    assert axes.checked_spec((3, 8), ("embed", "mlp"), rules=rules, mesh=devices, array="w_in"), "3 need not divide: fsdp went to mlp"
    assert hash(rules) == hash(axes.make_rules({"embed": "fsdp", "mlp": ("tensor", "fsdp"), "priority": ("mlp",)}))
    with pytest.raises(ConfigError, match="wanted by two dims.* or name the dim that gets it in rules.priority"):
        axes.spec(("embed", "mlp"), rules=axes.make_rules({"mlp": "fsdp", "priority": "heads"}), mesh=devices)
    with pytest.raises(ConfigError, match=r"rules.priority: unknown dim 'mpl'. Did you mean 'mlp'\?"):
        axes.make_rules({"priority": "mpl"})


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: axes.spec(("embed", "head"), mesh=m, array="wq"), r"wq: unknown dim 'head'. Did you mean 'heads'\?"),
        (lambda m: axes.make_rules({"hedas": None}), r"rules: unknown dim 'hedas'. Did you mean 'heads'\?"),
        (lambda m: axes.make_rules({"heads": "tensors"}), r"rules.heads: unknown mesh axis 'tensors'. Did you mean 'tensor'\?"),
        (lambda m: axes.make_rules({"heads": ("tensor", "model")}), r"rules.heads: unknown mesh axis 'model'. Available: data, expert"),
        (
            lambda m: axes.checked_spec((5, 4), ("heads", "embed"), mesh=m, array="w"),
            r"w \('heads', 'embed'\): heads=5 cannot be split over 2 devices \(rules.heads='tensor', mesh .*Use a multiple of 2, another "
            r"mesh, or rules.heads=none",
        ),
        (lambda m: axes.checked_spec((4,), ("heads", "embed"), mesh=m, array="w"), r"w: 1 dims \(4,\) but 2 names"),
        (
            lambda m: axes.parameter_sharding((6, 3), ParamInfo(("embed", "heads")), mesh=m, name="layers.0.wq"),
            r"layers.0.wq \('embed', 'heads'\): heads=3 cannot be split over 2 devices",
        ),
    ],
)
def test_errors_name_the_array_and_the_way_out(devices, call, message):
    with pytest.raises(ConfigError, match=message):
        call(devices)


def test_a_vocabulary_that_does_not_divide_is_stored_whole(devices):
    info = ParamInfo(("vocab", "embed"), ("embed",))
    assert axes.parameter_sharding((62, 8), info, mesh=devices).spec == P("tensor", "fsdp")
    assert axes.parameter_sharding((61, 8), info, mesh=devices).spec == P(None, "fsdp")


def test_shard_places_on_simulated_devices_and_does_nothing_without_a_mesh(devices):
    x = jnp.zeros((4, 4, 8))
    assert axes.shard(x, "batch", "seq", "act_embed") is x
    with axes.use(devices):
        y = jax.jit(lambda x: axes.shard(x, "batch", "seq", "act_mlp"))(x)
        assert y.sharding.shard_shape(y.shape) == (1, 4, 4)
        with pytest.raises(ConfigError, match=r"activation .*batch=3 cannot be split over 4 devices"):
            jax.jit(lambda x: axes.shard(x, "batch", "seq", "act_mlp"))(x[:3])


def test_other_rules_trace_again_and_the_same_rules_do_not(devices):
    """The table is part of jit's cache key: a function compiled under one table never runs under another."""
    traces = []

    @jax.jit
    def f(x):
        traces.append(axes.current_rules()["act_mlp"])
        return axes.shard(x, "batch", "act_mlp")

    x = np.zeros((8, 8), np.float32)
    for overrides in (None, None, {"act_mlp": None}, {"act_mlp": "tensor"}, {"act_mlp": None}):
        with axes.use(devices, overrides):
            f(x)
    assert traces == ["tensor", None]
    f(x)
    assert len(traces) == 3, "without a mesh it is another program"


def test_decoding_rules_split_no_time():
    rules = dict(axes.decode_rules(axes.make_rules({"embed": None})))
    assert rules["seq"] is rules["res_seq"] is rules["kv_seq"] is None and rules["embed"] is None and rules["act_heads"] == "tensor"
    assert "seq" not in rules["tokens"]

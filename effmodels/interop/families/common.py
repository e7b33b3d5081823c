"""What families share: tensors named as in Llama, and the fields of config.json that go with them."""
import dataclasses
import math

from effmodels.interop.errors import InteropError
from effmodels.interop.table import Rule
from effmodels.mixers.attention import Attention

LAYER = "model.layers.{i}."
OURS = "layers.{i}."

TOP = (
    Rule("model.embed_tokens.weight", "embed"),
    Rule("model.norm.weight", "final_norm.scale"),
    Rule("lm_head.weight", "head", "V D -> D V"),
)
NORMS = (
    Rule(LAYER + "input_layernorm.weight", OURS + "norm_mixer.scale"),
    Rule(LAYER + "post_attention_layernorm.weight", OURS + "norm_channel.scale"),
)


def attention(theirs=LAYER + "self_attn.", on=()):
    """q_proj, k_proj, v_proj, o_proj, their biases and norms."""
    ours = OURS + "mixer."
    return (
        *(Rule(f"{theirs}{x}_proj.weight", f"{ours}w{x}", "(N H) D -> D N H", on) for x in "qkv"),
        *(Rule(f"{theirs}{x}_proj.bias", f"{ours}b{x}", "(N H) -> N H", on) for x in "qkv"),
        Rule(f"{theirs}o_proj.weight", f"{ours}wo", "D (N H) -> N H D", on),
        Rule(f"{theirs}o_proj.bias", f"{ours}bo", None, on),
        *(Rule(f"{theirs}{x}_norm.weight", f"{ours}{x}_norm.scale", None, on) for x in "qk"),
    )


def mlp(theirs=LAYER + "mlp.", ours=OURS + "channel.", on=()):
    """gate_proj, up_proj, down_proj and their biases."""
    pairs = (("gate_proj", "in"), ("up_proj", "up"), ("down_proj", "out"))
    return (
        *(Rule(f"{theirs}{a}.weight", f"{ours}w_{b}", "A B -> B A", on) for a, b in pairs),
        *(Rule(f"{theirs}{a}.bias", f"{ours}b_{b}", None, on) for a, b in pairs),
    )


def ahead(rules, layer=LAYER):
    """The rules of a module that predicts further tokens from those of a layer; layer: what its names begin with outside."""
    inside = lambda ours: tuple(map(inside, ours)) if isinstance(ours, tuple) else ours.replace(OURS, "mtp.{m}.layer.")  # noqa: E731
    found = [r for r in rules if "{i}" in r.theirs]
    return tuple(dataclasses.replace(r, theirs=r.theirs.replace(LAYER, layer), ours=inside(r.ours)) for r in found)


def part(resolved, what, cls):
    """The config of the one mixer or channel mixer that all layers share; InteropError when it is of another class or there are several."""
    parts = {getattr(kind, what) for kind in resolved.layers}
    if len(parts) > 1:
        raise InteropError(f"its layers have different {what}s: {', '.join(sorted(p.name for p in parts))}")
    (only,) = parts
    if only.cls is not cls:
        raise InteropError(f"its {what} is {only.cls.__name__}, not {cls.__name__}")
    return only.config


def read_attention(c, theta=10_000.0, kv_heads=None, head_dim=None, fraction=None, rope_default=None, **fields):
    """The fields of an Attention from those of Llama and its kin.

    theta, kv_heads, head_dim, fraction (that rotates, None: all, always), rope_default (a mapping of `rope_parameters`): the family's own
    where the file says nothing.
    """
    heads = c.get("num_attention_heads")
    head_dim = c.get("head_dim", None) or head_dim
    if head_dim is None and c.get("hidden_size") % heads:
        raise InteropError(f"config.json: hidden_size={c.get('hidden_size')} is not divisible by num_attention_heads={heads}.")
    head_dim, rotation = head_dim or c.get("hidden_size") // heads, rope(c, theta, fraction, rope_default)
    check_rotated(head_dim, rotation)
    return {
        "kind": "attention", "num_heads": heads, "num_kv_heads": c.get("num_key_value_heads", kv_heads) or heads, "head_dim": head_dim,
        **rotation, **fields,
    }  # fmt: skip


def check_rotated(head_dim, rotation):
    """InteropError when an odd number of a head's dims would rotate, which their authors' code and others round differently."""
    dims = int(head_dim * rotation["rotary_fraction"])
    if dims % 2:
        part = rotation["rotary_fraction"]
        raise InteropError(f"config.json: partial_rotary_factor={part} rotates {dims} of {head_dim} dims; an even number is expected.")


def write_attention(a, resolved):
    """The inverse of `read_attention`."""
    return {
        "num_attention_heads": a.num_heads, "num_key_value_heads": a.num_kv_heads or a.num_heads,
        "head_dim": a.head_dim or resolved.config.d_model // a.num_heads, **write_rope(a),
    }  # fmt: skip


def rope(c, theta, fraction=None, default=None):
    """rope_theta, rotary_fraction and rope_scaling from `rope_parameters` (transformers 5) or the fields that came before it.

    fraction: of a family in which a part of each head may rotate, its default; None: a family whose whole heads rotate.
    """
    before, now, length = (c.get(n, None) for n in ("rope_scaling", "rope_parameters", "original_max_position_embeddings"))
    given = dict(before or now or default or {})
    outside = {"rope_theta": c.get("rope_theta", theta), "partial_rotary_factor": c.get("partial_rotary_factor", fraction)}
    theta, part = (v if given.get(n) is None else given[n] for n, v in outside.items())
    given = {n: v for n, v in given.items() if n not in outside}
    if any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in (theta, part) if v is not None):
        raise InteropError(f"config.json: rope_theta={theta!r} and partial_rotary_factor={part!r}: numbers are expected.")
    old_kind = given.pop("type", "default")
    kind = given.pop("rope_type", old_kind)
    if kind not in SCALINGS:
        raise InteropError(f"config.json: rope_type {kind!r} is not supported; supported are {', '.join(SCALINGS)}.")
    if fraction is None and part not in (None, 1):
        raise InteropError(f"config.json: partial_rotary_factor={part} is not supported for {c.model_type}; only 1.0 is.")
    found = {"rope_theta": float(theta), "rotary_fraction": float(1.0 if part is None else part)}
    if "original_length" in SCALINGS[kind].values():
        given["original_max_position_embeddings"] = (
            length or given.get("original_max_position_embeddings") or c.get("max_position_embeddings", None)
        )  # fmt: skip
    if kind == "yarn":
        _complete_yarn(c, given)
    scaling = {"kind": kind} | _renamed(kind, given)
    return found if kind == "default" else {**found, "rope_scaling": scaling}


def _complete_yarn(c, given):
    """Puts in the factor and the magnitude where the mapping says them in other words."""
    if given.get("factor") is None:
        given["factor"] = c.get("max_position_embeddings") / given["original_max_position_embeddings"]
    one, both = given.pop("mscale", None), given.pop("mscale_all_dim", None)
    if one and both and given.get("attention_factor") is None:
        given["attention_factor"] = yarn_magnitude(given["factor"], one) / yarn_magnitude(given["factor"], both)


def _renamed(kind, given):
    """What is left of the mapping of a rope_type, under our names; InteropError for a missing factor and for fields of other types."""
    known, given = SCALINGS[kind], {n: v for n, v in given.items() if v is not None}
    for name, value in given.items():
        if name not in known:
            raise InteropError(f"config.json: {name}={value!r} of rope_type {kind!r} is not known; known are {', '.join(known) or 'none'}.")
    if "factor" in known and "factor" not in given:
        raise InteropError(f"config.json: rope_type {kind!r} needs a factor.")
    return {known[name]: value for name, value in given.items()}


# rope_type -> what its fields are called in `layers.positions.RopeScaling`.
SCALINGS = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor", "low_freq_factor": "low_factor", "high_freq_factor": "high_factor",
        "original_max_position_embeddings": "original_length",
    },
    "yarn": {
        "factor": "factor", "beta_fast": "beta_fast", "beta_slow": "beta_slow", "truncate": "truncate",
        "attention_factor": "attention_factor", "original_max_position_embeddings": "original_length",
    },
}  # fmt: skip


def yarn_magnitude(factor, mscale):
    """What YaRN (arXiv:2309.00071) multiplies rotated entries with, for a weight mscale of its logarithm."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def write_rope(a):
    """The inverse of `rope`, in the form of transformers 5."""
    parameters = {"rope_type": "default", "rope_theta": a.rope_theta}
    if a.rope_scaling is not None:
        scaling = dict(a.rope_scaling)
        kind = scaling.pop("kind")
        names = {ours: theirs for theirs, ours in SCALINGS.get(kind, {}).items()}
        unsaid = [n for n, v in scaling.items() if n not in names and (n, v) != ("ramp", "dims")]
        if not names or unsaid:
            raise InteropError(f"its rope_scaling is {kind!r} with {', '.join(unsaid) or 'no counterpart'}")
        parameters |= {"rope_type": kind, **{names[n]: v for n, v in scaling.items() if n in names}}
    if getattr(a, "rotary_fraction", 1.0) != 1.0:
        parameters["partial_rotary_factor"] = a.rotary_fraction
    return {"rope_parameters": parameters}


def read_top(c, norm_eps=1e-6, **fields):
    """The fields of a ModelConfig around the layers; norm_eps: the family's default."""
    return {
        "vocab_size": c.get("vocab_size"), "d_model": c.get("hidden_size"), "num_layers": c.get("num_hidden_layers"),
        "norm": "rmsnorm", "norm_eps": float(c.get("rms_norm_eps", norm_eps)), "tie_embeddings": bool(c.get("tie_word_embeddings", False)),
        **fields,
    }  # fmt: skip


def write_top(m):
    """The inverse of `read_top`."""
    return {
        "vocab_size": m.vocab_size, "hidden_size": m.d_model, "num_hidden_layers": m.num_layers, "rms_norm_eps": m.norm_eps,
        "tie_word_embeddings": m.tie_embeddings,
    }  # fmt: skip


# hidden_act -> our gated activation; the last name of each is the one that is written.
GATED = {
    "swish": "swiglu", "silu": "swiglu", "gelu_new": "geglu", "gelu_fast": "geglu", "gelu_pytorch_tanh": "geglu", "gelu": "geglu_exact",
}  # fmt: skip


def gated(c):
    """The activation of a gated MLP or of experts, from `hidden_act`."""
    return GATED[c.only("hidden_act", "silu", *(n for n in GATED if n != "silu"))]


def write_gated(part):
    """The inverse of `gated`, of a Config with `activation`."""
    names = {ours: theirs for theirs, ours in GATED.items()}
    if part.activation not in names:
        raise InteropError(f"its activation is {part.activation}, not {' or '.join(names)}")
    return {"hidden_act": names[part.activation]}


def window(sliding_window):
    """Keys before the query, of a sliding window that counts the query too."""
    return None if sliding_window is None else sliding_window - 1


def write_window(keys_before):
    """The inverse of `window`."""
    return None if keys_before is None else keys_before + 1


def experts(theirs=LAYER + "mlp.experts.{e}.", ours=OURS + "channel.", names=("gate_proj", "up_proj", "down_proj"), on=("moe",)):
    """The three matrices of every expert, a tensor each."""
    return tuple(Rule(f"{theirs}{a}.weight", ours + b, "A B -> B A", on) for a, b in zip(names, ("w_in", "w_up", "w_out")))


def router(theirs=LAYER + "mlp.gate.weight", on=("moe",)):
    """The router's matrix."""
    return Rule(theirs, OURS + "channel.router", "E D -> D E", on)


def layer_types(c, known, default=None):
    """`layer_types` of config.json, one for each layer; default(number of layers): where it says nothing. InteropError for unknown ones."""
    layers, types = c.get("num_hidden_layers"), c.get("layer_types", None)
    if types is None and default is not None:
        return list(default(layers))
    if types is None or len(types) != layers or any(t not in known for t in types):
        raise InteropError(f"config.json: layer_types must name {layers} layers, each one of {', '.join(known)}; got {types}.")
    return types


def one_type(c, sliding):
    """Checks that `layer_types`, which a family with one kind of layer does not read, says what the family does: all slide, or none."""
    only = "sliding_attention" if sliding else "full_attention"
    other = [t for t in c.get("layer_types", None) or () if t != only]
    if other:
        raise InteropError(f"config.json: layer_types has {other[0]!r}, but every layer of this {c.model_type} is of {only!r}.")


WINDOWED = {"full_attention": "attention", "sliding_attention": "local"}


def windowed(base, types, keys_before):
    """pattern and mixers of layers that attend to all or to a window. base: fields of Attention; types: of `layer_types`."""
    pattern = tuple(WINDOWED[t] for t in types)
    if keys_before is None and "local" in pattern:
        raise InteropError("config.json: layer_types has 'sliding_attention', but the other fields give no window.")
    mixers = {"attention": base, "local": {**base, "window": keys_before}}
    return {"pattern": shortest(pattern), "mixers": {name: mixers[name] for name in dict.fromkeys(pattern)}}


def shortest(names):
    """The shortest period whose repetition gives all layers' names."""
    n = len(names)
    return next(names[:p] for p in range(1, n + 1) if all(names[i] == names[i % p] for i in range(n)))


def write_windowed(resolved):
    """(one Attention.Config without window, layer_types, sliding_window or None); InteropError for layers that differ in more."""
    configs = [layer_config(kind.mixer, Attention) for kind in resolved.layers]
    windows = {c.window for c in configs} - {None}
    plain = {dataclasses.replace(c, window=None) for c in configs}
    if len(plain) > 1 or len(windows) > 1:
        raise InteropError("its attention layers differ in more than having one window or none")
    types = ["full_attention" if c.window is None else "sliding_attention" for c in configs]
    return plain.pop(), types, write_window(next(iter(windows), None))


def layer_config(part_of_layer, cls):
    """The config of one layer's part; InteropError when it is of another class."""
    if part_of_layer.cls is not cls:
        raise InteropError(f"it has a layer of kind {part_of_layer.cls.__name__}, not {cls.__name__}")
    return part_of_layer.config


def read_sparse(c, moe, dense=None, first_dense=0):
    """channel and channels of layers of experts, some of which are dense: the first ones, those of mlp_only_layers, those between steps."""
    step, only = c.get("decoder_sparse_step", 1), c.get("mlp_only_layers", None) or ()
    layers, some = c.get("num_hidden_layers"), moe["num_experts"] > 0 and step > 0
    sparse = [some and i >= first_dense and i not in only and (i + 1) % step == 0 for i in range(layers)]
    names = tuple("moe" if s else "mlp" for s in sparse)
    return {"channel": shortest(names), "channels": {n: moe if n == "moe" else dense for n in dict.fromkeys(names)}}


def write_sparse(resolved, moe, dense):
    """(MoE.Config, MLP.Config or None, layers that are dense); InteropError when experts, or dense layers, differ among themselves."""
    parts = [kind.channel for kind in resolved.layers]
    sparse, plain = {p.config for p in parts if p.cls is moe}, {p.config for p in parts if p.cls is dense}
    other = [p for p in parts if p.cls not in (moe, dense)]
    if other or len(sparse) != 1 or len(plain) > 1:
        raise InteropError("its channel mixers are not one kind of mixture of experts and at most one of dense layers")
    return sparse.pop(), next(iter(plain), None), [i for i, p in enumerate(parts) if p.cls is dense]

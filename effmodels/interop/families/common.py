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


def part(resolved, what, cls):
    """The config of the one mixer or channel mixer that all layers share; InteropError when it is of another class or there are several."""
    parts = {getattr(kind, what) for kind in resolved.layers}
    if len(parts) > 1:
        raise InteropError(f"its layers have different {what}s: {', '.join(sorted(p.name for p in parts))}")
    (only,) = parts
    if only.cls is not cls:
        raise InteropError(f"its {what} is {only.cls.__name__}, not {cls.__name__}")
    return only.config


def read_attention(c, theta=10_000.0, head_dim=None, fraction=1.0, rope_default=None, **fields):
    """The fields of an Attention from those of Llama and its kin.

    theta, head_dim, fraction (that rotates), rope_default (a mapping of `rope_parameters`): the family's own where the file says nothing.
    """
    heads = c.get("num_attention_heads")
    head_dim = c.get("head_dim", None) or head_dim
    if head_dim is None and c.get("hidden_size") % heads:
        raise InteropError(f"config.json: hidden_size={c.get('hidden_size')} is not divisible by num_attention_heads={heads}.")
    return {
        "kind": "attention", "num_heads": heads, "num_kv_heads": c.get("num_key_value_heads", None) or heads,
        "head_dim": head_dim or c.get("hidden_size") // heads, **rope(c, theta, fraction, rope_default), **fields,
    }  # fmt: skip


def write_attention(a, resolved):
    """The inverse of `read_attention`."""
    return {
        "num_attention_heads": a.num_heads, "num_key_value_heads": a.num_kv_heads or a.num_heads,
        "head_dim": a.head_dim or resolved.config.d_model // a.num_heads, **write_rope(a),
    }  # fmt: skip


def rope(c, theta, fraction=1.0, default=None):
    """rope_theta, rotary_fraction and rope_scaling from `rope_parameters` (transformers 5) or the fields that came before it."""
    given = dict(c.get("rope_parameters", None) or c.get("rope_scaling", None) or default or {})
    old_theta, fraction = c.get("rope_theta", theta), c.get("partial_rotary_factor", fraction)
    c.get("rope_scaling", None)
    theta, fraction = given.pop("rope_theta", old_theta), given.pop("partial_rotary_factor", fraction)
    old_kind = given.pop("type", "default")
    kind = given.pop("rope_type", old_kind)
    if kind not in SCALINGS:
        raise InteropError(f"config.json: rope_type {kind!r} is not supported; supported are {', '.join(SCALINGS)}.")
    found = {"rope_theta": float(theta), "rotary_fraction": float(fraction)}
    if kind == "default":
        return found
    scaling = {"kind": kind}
    if "original_length" in SCALINGS[kind].values():
        given.setdefault("original_max_position_embeddings", c.get("max_position_embeddings", None))
    if given.get("factor") is None:
        given["factor"] = c.get("max_position_embeddings") / given["original_max_position_embeddings"]
    one, both = given.pop("mscale", None), given.pop("mscale_all_dim", None)
    if one and both and given.get("attention_factor") is None:
        given["attention_factor"] = yarn_magnitude(given["factor"], one) / yarn_magnitude(given["factor"], both)
    for name, value in given.items():
        if name not in SCALINGS[kind]:
            raise InteropError(f"config.json: {name}={value!r} of rope_type {kind!r} is not known; known are {', '.join(SCALINGS[kind])}.")
        if value is not None:
            scaling[SCALINGS[kind][name]] = value
    return {**found, "rope_scaling": scaling}


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


def windowed(base, types, keys_before):
    """pattern and mixers of layers that attend to all or to a window. base: fields of Attention; types: as `layer_types` of config.json."""
    names = {"full_attention": "attention", "sliding_attention": "local"}
    unknown = [t for t in types if t not in names]
    if unknown:
        raise InteropError(f"config.json: layer_types has {unknown[0]!r}; known are {', '.join(names)}.")
    pattern = tuple(names[t] for t in types)
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
    sparse = [i >= first_dense and i not in only and step > 0 and (i + 1) % step == 0 for i in range(c.get("num_hidden_layers"))]
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

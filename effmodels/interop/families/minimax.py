"""MiniMax-Text-01 (arXiv:2501.08313): lightning attention with a layer of softmax attention now and then, Mixtral's experts.

Two formats of the same tensors: `minimax`, as transformers writes config.json, and `minimax_text_01` (also `minimax_m1`), as the authors
do. Residuals are of the normed input, with scales per kind of layer. `rotary_dim`, which the authors' code reads, is the part that rotates.
"""
import functools
import math

from effmodels.channel.mlp import hidden_size
from effmodels.channel.moe import MoE
from effmodels.interop.errors import InteropError
from effmodels.interop.families import common, llama, mixtral
from effmodels.interop.table import Family, Rule
from effmodels.mixers.attention import Attention
from effmodels.mixers.lightning import Lightning

THEIRS, OURS = common.LAYER + "self_attn.", common.OURS + "mixer."
LINEAR = ("lightning",)
RULES = (
    *common.TOP, *common.NORMS, *common.attention(on=("attention",)), *mixtral.EXPERTS,
    Rule(THEIRS + "qkv_proj.weight", tuple(OURS + x for x in ("wq", "wk", "wv")), "(N [H]) D -> D N H", LINEAR),
    Rule(THEIRS + "output_gate.weight", OURS + "wg", "(N P) D -> D N P", LINEAR),
    Rule(THEIRS + "norm.weight", OURS + "group_norm_scale", "(N P) -> N P", LINEAR),
    Rule(THEIRS + "out_proj.weight", OURS + "wo", "D (N P) -> N P D", LINEAR),
)  # fmt: skip
TYPES = {"full_attention": "attention", "linear_attention": "lightning"}
NUMBERS = {0: "lightning", 1: "attention"}  # the authors' attn_type_list
LIGHTNING_EPS = 1e-6  # of the norm in lightning layers, whatever rms_norm_eps is
# What their scales of the residual are called; {}: alpha or beta, of the stream and of the branch.
SCALES = {"attention": "full_attn_{}_factor", "lightning": "linear_attn_{}_factor", "moe": "mlp_{}_factor"}
AUTHORS_SCALES = {
    "attention": "layernorm_full_attention_{}", "lightning": "layernorm_linear_attention_{}", "moe": "layernorm_mlp_{}",
}  # fmt: skip


def read(c):
    """ModelConfig's fields."""
    c.get("block_size", None)  # how it is computed
    by_layer = lambda layers: ("linear_attention" if i % 2 else "full_attention" for i in range(layers))  # noqa: E731
    names = [TYPES[t] for t in common.layer_types(c, TYPES, by_layer)]
    return _read(c, names, SCALES, {"slopes": "power", "layer_factor": "minimax"}, "input")


def read_authors(c):
    """ModelConfig's fields, from the names of the authors' code."""
    types, layers = c.get("attn_type_list"), c.get("num_hidden_layers")
    if len(types) != layers or any(t not in NUMBERS for t in types):
        raise InteropError(f"config.json: attn_type_list must name {layers} layers, each 0 (linear) or 1 (softmax); got {types}.")
    c.only("shared_intermediate_size", 0, [0])
    c.get("shared_moe_mode", None)  # of shared experts, which there are none of
    position = "input" if c.get("postnorm", False) else "pre"
    return _read(c, [NUMBERS[t] for t in types], AUTHORS_SCALES, {"slopes": "alibi", "layer_factor": "first_is_one"}, position)


def _read(c, names, scale_names, decay, position):
    c.only("hidden_act", "silu")
    size, head_dim = c.get("sliding_window", None), c.get("head_dim", None) or c.get("hidden_size") // c.get("num_attention_heads")
    fraction = _fraction(c.get("rotary_dim"), head_dim) if c.given("rotary_dim") else None
    attention = common.read_attention(c, 1e6, kv_heads=8, fraction=fraction, window=common.window(size))
    lightning = {
        "num_heads": attention["num_heads"], "head_dim": attention["head_dim"], **decay, "qkv_activation": "silu", "qk_norm": False,
        "rotary_fraction": 0.0, "scale": 1.0, "norm_groups": 1, "norm_eps": LIGHTNING_EPS,
    }  # fmt: skip
    scales = {name: tuple(float(c.get(theirs.format(x), 1.0)) for x in ("alpha", "beta")) for name, theirs in scale_names.items()}
    used = {*names, "moe"}
    return common.read_top(
        c, norm_eps=1e-5, pattern=common.shortest(tuple(names)), channel=("moe",), norm_position=position,
        mixers={n: m for n, m in (("attention", attention), ("lightning", lightning)) if n in used},
        channels={"moe": mixtral.read_experts(c, "swiglu")}, residual_scales={n: s for n, s in scales.items() if n in used},
    )  # fmt: skip


def _fraction(dims, head_dim):
    """dims / head_dim, rounded up where a product with head_dim would otherwise be less than dims."""
    fraction = dims / head_dim
    return fraction if int(head_dim * fraction) == dims else math.nextafter(fraction, 1.0)


def write(resolved):
    """config.json's fields."""
    types = {ours: theirs for theirs, ours in TYPES.items()}
    return _write(resolved, SCALES) | {"layer_types": [types[name] for name in _names(resolved)]}


def write_authors(resolved):
    """config.json's fields, under the names of the authors' code."""
    types = {ours: theirs for theirs, ours in NUMBERS.items()}
    fields = _write(resolved, AUTHORS_SCALES) | {"attn_type_list": [types[name] for name in _names(resolved)]}
    rotation = fields.pop("rope_parameters", None)
    if rotation is not None and rotation["rope_type"] != "default":
        raise InteropError(f"its rope_scaling is {rotation['rope_type']!r}, which this format cannot say")
    fields |= {} if rotation is None else {"rope_theta": rotation["rope_theta"]}
    return fields | {"shared_intermediate_size": 0, "postnorm": resolved.config.norm_position == "input"}


def _names(resolved):
    """attention or lightning, of every layer; InteropError for other kinds."""
    kinds = {Attention: "attention", Lightning: "lightning"}
    other = [k.mixer.cls.__name__ for k in resolved.layers if k.mixer.cls not in kinds]
    if other:
        raise InteropError(f"it has a layer of kind {other[0]}, not Attention or Lightning")
    return [kinds[k.mixer.cls] for k in resolved.layers]


def _write(resolved, scale_names):
    experts, scales = common.part(resolved, "channel", MoE), resolved.config.residual_scales
    parts = {name: k.mixer for name, k in zip(_names(resolved), resolved.layers)}
    a = parts.get("attention", parts.get("lightning")).config
    heads = {"num_attention_heads": a.num_heads, "head_dim": a.head_dim or resolved.config.d_model // a.num_heads}
    softmax = {}
    if "attention" in parts:
        softmax = {**common.write_attention(a, resolved), "sliding_window": common.write_window(a.window)}
        if a.rotary_fraction != 1.0:
            softmax["rotary_dim"] = int(a.rotary_fraction * heads["head_dim"])
    parts["moe"] = resolved.layers[0].channel
    factors = {scale_names[name]: scales.get(part.name, (1.0, 1.0)) for name, part in parts.items()}
    return {
        **common.write_top(resolved.config), **heads, **softmax, "num_local_experts": experts.num_experts,
        "num_experts_per_tok": experts.top_k, "intermediate_size": hidden_size(experts, resolved.env), "hidden_act": "silu",
        **{theirs.format(x): v for theirs, pair in factors.items() for x, v in zip(("alpha", "beta"), pair)},
    }  # fmt: skip


BUFFERS = (r".*self_attn\.(slope_rate|query_decay|key_decay|diagonal_decay)",)
IGNORE = (*llama.IGNORE, *BUFFERS)
MINIMAX = Family("minimax", "MiniMaxForCausalLM", RULES, read, write, prefix="model.", ignore=IGNORE)
AUTHORS = functools.partial(Family, rules=RULES, read=read_authors, write=write_authors, prefix="model.", ignore=IGNORE)
MINIMAX_TEXT_01 = AUTHORS("minimax_text_01", "MiniMaxText01ForCausalLM")
MINIMAX_M1 = AUTHORS("minimax_m1", "MiniMaxM1ForCausalLM")

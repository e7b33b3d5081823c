"""MiniMax-Text-01 (arXiv:2501.08313): lightning attention with a layer of softmax attention now and then, Mixtral's experts.

Residuals are of the normed input, with scales per kind of layer. `rotary_dim`, which the authors' code reads, is the part that rotates.
"""
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
SCALES = {"attention": "full_attn", "lightning": "linear_attn", "moe": "mlp"}  # what their fields begin with
LIGHTNING_EPS = 1e-6  # of the norm in lightning layers, whatever rms_norm_eps is


def read(c):
    """ModelConfig's fields."""
    c.get("block_size", None)  # how it is computed
    layers = c.get("num_hidden_layers")
    types = c.get("layer_types", None) or ["linear_attention" if i % 2 else "full_attention" for i in range(layers)]
    unknown = [t for t in types if t not in TYPES]
    if unknown:
        raise InteropError(f"config.json: layer_types has {unknown[0]!r}; known are {', '.join(TYPES)}.")
    names = tuple(TYPES[t] for t in types)
    attention = common.read_attention(c, 1e6, window=common.window(c.get("sliding_window", None)))
    if c.given("rotary_dim"):
        attention["rotary_fraction"] = c.get("rotary_dim") / attention["head_dim"]
    lightning = {
        "num_heads": attention["num_heads"], "head_dim": attention["head_dim"], "slopes": "power", "layer_factor": "minimax",
        "qkv_activation": "silu", "qk_norm": False, "rotary_fraction": 0.0, "scale": 1.0, "norm_groups": 1, "norm_eps": LIGHTNING_EPS,
    }  # fmt: skip
    scales = {name: tuple(float(c.get(f"{theirs}_{x}_factor", 1.0)) for x in ("alpha", "beta")) for name, theirs in SCALES.items()}
    used = {*names, "moe"}
    return common.read_top(
        c, norm_eps=1e-5, pattern=common.shortest(names), channel=("moe",), norm_position="input",
        mixers={n: m for n, m in (("attention", attention), ("lightning", lightning)) if n in used},
        channels={"moe": mixtral.read_experts(c)}, residual_scales={n: s for n, s in scales.items() if n in used},
    )  # fmt: skip


def write(resolved):
    """config.json's fields."""
    experts, scales = common.part(resolved, "channel", MoE), resolved.config.residual_scales
    parts = {cls: next((k.mixer for k in resolved.layers if k.mixer.cls is cls), None) for cls in (Attention, Lightning)}
    other = [k.mixer.cls.__name__ for k in resolved.layers if k.mixer.cls not in parts]
    if other:
        raise InteropError(f"it has a layer of kind {other[0]}, not Attention or Lightning")
    full, linear = parts[Attention], parts[Lightning]
    a = (full or linear).config
    heads = {"num_attention_heads": a.num_heads, "head_dim": a.head_dim or resolved.config.d_model // a.num_heads}
    softmax = {**common.write_attention(a, resolved), "sliding_window": common.write_window(a.window)} if full else {}
    if full and a.rotary_fraction != 1.0:
        softmax["rotary_dim"] = int(a.rotary_fraction * heads["head_dim"])
    named = {"full_attn": full, "linear_attn": linear, "mlp": resolved.layers[0].channel}
    factors = {theirs: scales.get(part.name, (1.0, 1.0)) for theirs, part in named.items() if part}
    return {
        **common.write_top(resolved.config), **heads, **softmax, "num_local_experts": experts.num_experts,
        "num_experts_per_tok": experts.top_k, "intermediate_size": hidden_size(experts, resolved.env), "hidden_act": "silu",
        "layer_types": ["full_attention" if k.mixer.cls is Attention else "linear_attention" for k in resolved.layers],
        **{f"{theirs}_{x}_factor": v for theirs, pair in factors.items() for x, v in zip(("alpha", "beta"), pair)},
    }  # fmt: skip


BUFFERS = (r".*self_attn\.(slope_rate|query_decay|key_decay|diagonal_decay)",)
MINIMAX = Family("minimax", "MiniMaxForCausalLM", RULES, read, write, prefix="model.", ignore=(*llama.IGNORE, *BUFFERS))

"""LFM2-MoE (arXiv:2511.23404): gated short convolutions and some attention; dense first layers, then experts by sigmoid scores."""
from effmodels.channel.mlp import MLP, hidden_size
from effmodels.channel.moe import MoE
from effmodels.interop.errors import InteropError
from effmodels.interop.families import common, llama
from effmodels.interop.table import Family, Rule
from effmodels.mixers.attention import Attention
from effmodels.mixers.short_conv import ShortConv

OURS = common.OURS + "mixer."
CONV, ATTENTION, SPARSE = common.LAYER + "conv.", common.LAYER + "self_attn.", common.LAYER + "feed_forward."
NAMES = {"conv": "short_conv", "full_attention": "attention"}
ON_CONV, ON_ATTENTION = ("short_conv",), ("attention",)
MATRICES = (("w1", "w_in"), ("w3", "w_up"), ("w2", "w_out"))
RULES = (
    Rule("model.embed_tokens.weight", "embed"),
    Rule("model.embedding_norm.weight", "final_norm.scale"),
    Rule("lm_head.weight", "head", "V D -> D V"),
    Rule(common.LAYER + "operator_norm.weight", common.OURS + "norm_mixer.scale"),
    Rule(common.LAYER + "ffn_norm.weight", common.OURS + "norm_channel.scale"),
    Rule(CONV + "in_proj.weight", tuple(OURS + "w" + x for x in "bcx"), "[C] D -> D C", ON_CONV),
    Rule(CONV + "in_proj.bias", tuple(OURS + "b" + x for x in "bcx"), "[C] -> C", ON_CONV),
    Rule(CONV + "conv.weight", OURS + "conv.weight", "C 1 W -> C W", ON_CONV),
    Rule(CONV + "conv.bias", OURS + "conv.bias", None, ON_CONV),
    Rule(CONV + "out_proj.weight", OURS + "wo", "D C -> C D", ON_CONV),
    Rule(CONV + "out_proj.bias", OURS + "bo", None, ON_CONV),
    *(Rule(f"{ATTENTION}{x}_proj.weight", f"{OURS}w{x}", "(N H) D -> D N H", ON_ATTENTION) for x in "qkv"),
    *(Rule(f"{ATTENTION}{x}_layernorm.weight", f"{OURS}{x}_norm.scale", None, ON_ATTENTION) for x in "qk"),
    Rule(ATTENTION + "out_proj.weight", OURS + "wo", "D (N H) -> N H D", ON_ATTENTION),
    *(Rule(f"{SPARSE}{a}.weight", f"{common.OURS}channel.{b}", "A B -> B A", ("mlp",)) for a, b in MATRICES),
    common.router(SPARSE + "gate.weight"),
    *common.experts(SPARSE + "experts.{e}.", names=tuple(a for a, _ in MATRICES)),
    Rule(SPARSE + "expert_bias", common.OURS + "channel.bias", None, ("moe",)),
)
BALANCE_RATE = 1e-3  # of the experts' bias where training goes on
WEIGHTS_EPS = 1e-6  # added to the sum of a token's weights


def read(c):
    """ModelConfig's fields."""
    pattern = tuple(NAMES[t] for t in common.layer_types(c, NAMES))
    mixers = {
        "attention": common.read_attention(c, 1e6, kv_heads=8, qk_norm=True),
        "short_conv": {"conv_width": c.get("conv_L_cache", 3), "bias": bool(c.get("conv_bias", False))},
    }
    moe = {
        "num_experts": c.get("num_experts", 32), "top_k": c.get("num_experts_per_tok", 4), "hidden": c.get("moe_intermediate_size", 1792),
        "activation": "swiglu", "router": "sigmoid", "normalize_weights": bool(c.get("norm_topk_prob", True)), "weights_eps": WEIGHTS_EPS,
        "routed_scaling": float(c.get("routed_scaling_factor", 1.0)),
        "bias_update_rate": BALANCE_RATE if c.get("use_expert_bias", True) else 0.0,
    }  # fmt: skip
    dense = {"hidden": c.get("intermediate_size", 7168), "activation": "swiglu"}
    return common.read_top(
        c, norm_eps=float(c.get("norm_eps", 1e-5)), tie_embeddings=_tied(c), pattern=common.shortest(pattern),
        mixers={name: mixers[name] for name in dict.fromkeys(pattern)},
        **common.read_sparse(c, moe, dense, c.get("num_dense_layers", 2)),
    )  # fmt: skip


def _tied(c):
    tied = c.get("tie_word_embeddings", True)
    return bool(c.get("tie_embedding", tied))


def write(resolved):
    """config.json's fields."""
    m, kinds = resolved.config, [kind.mixer for kind in resolved.layers]
    attention, conv = ({p.config for p in kinds if p.cls is cls} for cls in (Attention, ShortConv))
    if any(p.cls not in (Attention, ShortConv) for p in kinds) or len(conv) > 1 or len(attention) != 1:
        raise InteropError("its mixers are not one kind of attention and at most one of short_conv")
    moe, dense, plain = common.write_sparse(resolved, MoE, MLP)
    if plain != list(range(len(plain))):
        raise InteropError("its dense layers are not the first ones")
    names, width = {Attention: "full_attention", ShortConv: "conv"}, hidden_size(moe, resolved.env)
    conv, top = next(iter(conv), ShortConv.Config()), common.write_top(m)
    top["norm_eps"] = top.pop("rms_norm_eps")
    return {
        **top, **common.write_attention(attention.pop(), resolved),
        "layer_types": [names[p.cls] for p in kinds], "conv_L_cache": conv.conv_width, "conv_bias": conv.bias,
        "num_dense_layers": len(plain), "num_experts": moe.num_experts, "num_experts_per_tok": moe.top_k, "moe_intermediate_size": width,
        "intermediate_size": hidden_size(dense, resolved.env) if dense else width, "norm_topk_prob": moe.normalize_weights,
        "use_expert_bias": moe.bias_update_rate > 0, "routed_scaling_factor": moe.routed_scaling,
    }  # fmt: skip


LFM2_MOE = Family("lfm2_moe", "Lfm2MoeForCausalLM", RULES, read, write, prefix="model.", ignore=llama.IGNORE)

"""Ling and Ring linear 2.0 (arXiv:2510.19338), model_type bailing_moe_linear: of every group of layers the last attends, the others are
lightning; sigmoid routing over groups of experts with a balancing bias, a shared expert, dense first layers."""
from effmodels.channel.mlp import MLP, hidden_size
from effmodels.channel.moe import MoE
from effmodels.interop.errors import InteropError
from effmodels.interop.families import common, llama
from effmodels.interop.table import Family, Rule
from effmodels.mixers.attention import Attention
from effmodels.mixers.lightning import Lightning

THEIRS, OURS, CHANNEL = common.LAYER + "attention.", common.OURS + "mixer.", common.OURS + "channel."
RULES = (
    Rule("model.word_embeddings.weight", "embed"), *common.TOP[1:], *common.NORMS,
    Rule(THEIRS + "query_key_value.weight", tuple(OURS + x for x in ("wq", "wk", "wv")), "([N] H) D -> D N H"),
    Rule(THEIRS + "query_layernorm.weight", OURS + "q_norm.scale"),
    Rule(THEIRS + "key_layernorm.weight", OURS + "k_norm.scale"),
    Rule(THEIRS + "g_proj.weight", OURS + "wg", "(N P) D -> D N P"),
    Rule(THEIRS + "g_norm.weight", OURS + "group_norm_scale", "(N P) -> N P"),
    Rule(THEIRS + "dense.weight", OURS + "wo", "D (N H) -> N H D"),
    *common.mlp(on=("mlp",)), common.router(), *common.experts(), Rule(common.LAYER + "mlp.gate.expert_bias", CHANNEL + "bias"),
    *common.mlp(common.LAYER + "mlp.shared_experts.", CHANNEL + "shared.", on=("moe",)),
)  # fmt: skip
BALANCE_RATE = 1e-3  # where training goes on; Ling 2.0's own


def attends(layers, group):
    """Which layers are of softmax attention: the last of each group, and those of a group that is cut off."""
    return [(i + 1) % group == 0 or i >= layers // group * group for i in range(layers)]


def read(c):
    """ModelConfig's fields."""
    for name, *allowed in (
        ("hidden_act", "silu"), ("use_bias", False), ("use_qkv_bias", False), ("use_rmsnorm", True), ("norm_head", False),
        ("norm_softmax", False), ("rope_traditional", False), ("linear_rope", True), ("use_sliding_window", False),
        ("moe_router_enable_shared_expert", True), ("moe_router_enable_routed_scaling", True), ("topk_method", "noaux_tc"),
    ):  # fmt: skip
        c.only(name, *allowed)
    # Of training, without an effect, or of weights that are refused as unknown tensors.
    for name in ("router_dtype", "embedding_dropout", "output_dropout", "num_nextn_predict_layers", "mtp_loss_scaling_factor",
                 "sliding_window", "max_window_layers"):  # fmt: skip
        c.get(name, None)
    norm = bool(c.get("use_qk_norm", False))
    attention = common.read_attention(c, fraction=1.0, qk_norm=norm)
    lightning = {
        **{n: attention[n] for n in ("num_heads", "head_dim", "rope_theta", "rotary_fraction", "rope_scaling") if n in attention},
        "slopes": "alibi", "layer_factor": "ring", "qk_norm": norm, "norm_groups": c.get("group_norm_size", 1),
        "qkv_activation": "silu" if c.get("linear_silu", False) else "none",
    }  # fmt: skip
    names = ["attention" if a else "lightning" for a in attends(c.get("num_hidden_layers"), c.get("layer_group_size", 1))]
    mixers = {"attention": attention, "lightning": lightning}
    dense = {"hidden": c.get("intermediate_size"), "activation": "swiglu"}
    channels = common.read_sparse(c, _experts(c), dense, c.get("first_k_dense_replace", 0))
    return common.read_top(c, pattern=common.shortest(tuple(names)), mixers={n: mixers[n] for n in dict.fromkeys(names)}, **channels)


def _experts(c):
    top_k, width, shared = c.get("num_experts_per_tok"), c.get("moe_intermediate_size"), c.get("num_shared_experts", 0) or 0
    shared_width = c.get("moe_shared_expert_intermediate_size", None) or width
    groups, top_groups = c.get("n_group", 1) or 1, c.get("topk_group", 1)
    biased = bool(c.get("moe_router_enable_expert_bias", False))
    return {
        "num_experts": c.get("num_experts"), "top_k": top_k, "hidden": width, "activation": "swiglu", "shared_experts": shared,
        "shared_hidden": shared * shared_width if shared else None, "router": c.only("score_function", "softmax", "sigmoid"),
        "normalize_weights": bool(c.get("norm_topk_prob", True)) and top_k > 1, "groups": groups,
        "top_groups": top_groups if groups > 1 else 1, "routed_scaling": float(c.get("routed_scaling_factor", 1.0)),
        "bias_update_rate": BALANCE_RATE if biased else 0.0,
    }  # fmt: skip


def write(resolved):
    """config.json's fields."""
    moe, dense, plain = common.write_sparse(resolved, MoE, MLP)
    if plain != list(range(len(plain))):
        raise InteropError("its dense layers are not the first ones")
    width = hidden_size(moe, resolved.env)
    shared = {"moe_shared_expert_intermediate_size": (moe.shared_hidden or moe.shared_experts * width) // max(moe.shared_experts, 1)}
    return {
        **common.write_top(resolved.config), **_write_mixers(resolved), "num_experts": moe.num_experts, "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": width, "num_shared_experts": moe.shared_experts, **(shared if moe.shared_experts else {}),
        "score_function": moe.router, "norm_topk_prob": moe.normalize_weights, "n_group": moe.groups, "topk_group": moe.top_groups,
        "routed_scaling_factor": moe.routed_scaling, "moe_router_enable_expert_bias": moe.bias_update_rate > 0,
        "first_k_dense_replace": len(plain), "intermediate_size": hidden_size(dense, resolved.env) if dense else width,
        "hidden_act": "silu",
    }  # fmt: skip


def _write_mixers(resolved):
    parts = [k.mixer for k in resolved.layers]
    layers, softmax = len(parts), [p.cls is Attention for p in parts]
    group = next((g for g in range(1, layers + 2) if attends(layers, g) == softmax), None)
    other = [p.cls.__name__ for p in parts if p.cls not in (Attention, Lightning)]
    if other or group is None:
        raise InteropError(f"it has a layer of kind {other[0]}" if other else "its layers of attention are not the last of equal groups")
    a = next(p.config for p in parts if p.cls is Attention)
    linear = next((p.config for p in parts if p.cls is Lightning), None)
    fields = common.write_attention(a, resolved)
    fields |= {"rope_theta": a.rope_theta, "partial_rotary_factor": a.rotary_fraction, "use_qk_norm": a.qk_norm, "layer_group_size": group}
    if linear is not None:
        groups = linear.num_heads if linear.norm_groups is None else linear.norm_groups
        fields |= {"group_norm_size": groups, "linear_silu": linear.qkv_activation == "silu"}
    return fields


IGNORE = (*llama.IGNORE, r".*attention\.slope")
BAILING_LINEAR = Family("bailing_moe_linear", "BailingMoeLinearV2ForCausalLM", RULES, read, write, prefix="model.", ignore=IGNORE)

"""DeepSeek-V2 (arXiv:2405.04434) and V3 (arXiv:2412.19437): latent attention, group-limited routing, shared experts, dense first layers."""
from effmodels.channel.mlp import MLP, hidden_size
from effmodels.channel.moe import MoE
from effmodels.interop.errors import InteropError
from effmodels.interop.families import common, llama
from effmodels.interop.table import Family, Rule
from effmodels.mixers.latent import Latent
from effmodels.models import mtp

THEIRS, OURS = common.LAYER + "self_attn.", common.OURS + "mixer."


RULES = (
    *common.TOP, *common.NORMS,
    Rule(THEIRS + "q_proj.weight", OURS + "wq", "(N H) D -> D N H"),
    Rule(THEIRS + "q_a_proj.weight", OURS + "wq_down", "Q D -> D Q"),
    Rule(THEIRS + "q_a_layernorm.weight", OURS + "q_norm.scale"),
    Rule(THEIRS + "q_b_proj.weight", OURS + "wq_up", "(N H) Q -> Q N H"),
    Rule(THEIRS + "kv_a_proj_with_mqa.weight", OURS + "wkv_down", "C D -> D C"),
    Rule(THEIRS + "kv_a_layernorm.weight", OURS + "kv_norm.scale"),
    Rule(THEIRS + "kv_b_proj.weight", (OURS + "wk_up", OURS + "wv_up"), "(N [H]) R -> R N H"),
    Rule(THEIRS + "o_proj.weight", OURS + "wo", "D (N P) -> N P D"),
    *common.mlp(on=("mlp",)), common.router(), *common.experts(),
    Rule(common.LAYER + "mlp.gate.e_score_correction_bias", common.OURS + "channel.bias"),
    *common.mlp(common.LAYER + "mlp.shared_experts.", common.OURS + "channel.shared.", on=("moe",)),
)  # fmt: skip
# Modules for further tokens are layers behind the last, each with a copy of the table and of the head.
AHEAD = (
    *common.ahead(RULES),
    Rule(common.LAYER + "enorm.weight", "mtp.{m}.norm_embed.scale"),
    Rule(common.LAYER + "hnorm.weight", "mtp.{m}.norm_hidden.scale"),
    Rule(common.LAYER + "eh_proj.weight", "mtp.{m}.w_join", "D I -> I D"),
    Rule(common.LAYER + "shared_head.norm.weight", "mtp.{m}.norm_out.scale"),
)
LATENT_EPS = 1e-6  # of the norms of compressed vectors, whatever rms_norm_eps is
BALANCE_RATE = 1e-3  # where training goes on; V3's own


def read_v2(c):
    """ModelConfig's fields."""
    c.only("norm_topk_prob", False)
    c.only("scoring_func", "softmax")
    limited = c.only("topk_method", "greedy", "group_limited_greedy") == "group_limited_greedy" and c.get("n_group") > 1
    groups = {"groups": c.get("n_group"), "top_groups": c.get("topk_group"), "group_score": "max"} if limited else {}
    c.get("n_group", None), c.get("topk_group", None)
    routing = {"router": "softmax", "normalize_weights": False, "shared_experts": 2, "routed_scaling": 1.0, **groups}
    return _read(c, routing, _latent(c, interleaved=True), first_dense=0)


def read_v3(c):
    """ModelConfig's fields."""
    c.only("scoring_func", "sigmoid")
    c.only("topk_method", "noaux_tc")
    c.get("num_nextn_predict_layers", None)  # see `seen_v3`
    routing = {
        "router": "sigmoid", "normalize_weights": bool(c.get("norm_topk_prob", True)), "groups": c.get("n_group", 8),
        "top_groups": c.get("topk_group", 4), "bias_update_rate": BALANCE_RATE, "shared_experts": 1, "routed_scaling": 2.5,
    }  # fmt: skip
    return _read(c, routing, _latent(c, interleaved=bool(c.get("rope_interleave", True))), first_dense=3)


def seen_v3(config, names):
    """The config with as many modules for further tokens as the files hold: most files declare one and leave it out."""
    depth = sum(name.endswith(".eh_proj.weight") for name in names)
    return config | ({"mtp": {"depth": depth}} if depth else {})


def copies_v3(resolved):
    """{tensor of a module: the tensor of the model that it repeats}."""
    layers = (len(resolved.layers) + k for k in range(mtp.check(resolved.config.mtp).depth))
    head = "model.embed_tokens.weight" if resolved.config.tie_embeddings else "lm_head.weight"
    pairs = (("embed_tokens.weight", "model.embed_tokens.weight"), ("shared_head.head.weight", head))
    return {common.LAYER.format(i=i) + name: original for i in layers for name, original in pairs}


def _read(c, routing, latent, first_dense):
    """The fields of a ModelConfig; routing, first_dense: the family's own where the file says nothing."""
    common.one_type(c, sliding=False)
    c.only("attention_bias", False)
    c.only("mlp_bias", False)
    c.only("moe_layer_freq", 1)
    c.only("num_key_value_heads", c.get("num_attention_heads"), None)
    for name in ("head_dim", "qk_head_dim"):
        c.get(name, None)  # follow from the others
    moe = {
        **routing, "num_experts": c.get("n_routed_experts"), "top_k": c.get("num_experts_per_tok"), "activation": common.gated(c),
        "hidden": c.get("moe_intermediate_size"), "shared_experts": c.get("n_shared_experts", routing["shared_experts"]) or 0,
        "routed_scaling": float(c.get("routed_scaling_factor", routing["routed_scaling"])),
    }  # fmt: skip
    dense = {"hidden": c.get("intermediate_size"), "activation": common.gated(c)}
    layers = common.read_sparse(c, moe, dense, c.get("first_k_dense_replace", first_dense))
    return common.read_top(c, pattern=("latent",), mixers={"latent": latent}, **layers)


def _latent(c, interleaved):
    rope = common.rope(c, 10_000.0)
    del rope["rotary_fraction"]  # of a family whose rotary part rotates as a whole
    given = c.get("rope_scaling", None) or c.get("rope_parameters", None) or {}
    head, rotated = c.get("qk_nope_head_dim", 128), c.get("qk_rope_head_dim", 64)
    fields = {
        "num_heads": c.get("num_attention_heads"), "head_dim": head, "rope_dim": rotated, "value_dim": c.get("v_head_dim", 128),
        "kv_rank": c.get("kv_lora_rank", 512), "q_rank": c.get("q_lora_rank", 1536), "rope_interleaved": interleaved,
        "norm_eps": LATENT_EPS,
    }  # fmt: skip
    if given.get("mscale_all_dim") and "rope_scaling" in rope:
        magnitude = common.yarn_magnitude(rope["rope_scaling"]["factor"], given["mscale_all_dim"])
        fields["scale"] = (head + rotated) ** -0.5 * magnitude * magnitude
    return fields | rope


def write_v2(resolved):
    """config.json's fields."""
    fields, moe = _write(resolved)
    limited = {"n_group": moe.groups, "topk_group": moe.top_groups, "topk_method": "group_limited_greedy"}
    return fields | (limited if moe.groups > 1 else {"topk_method": "greedy"})


def write_v3(resolved):
    """config.json's fields."""
    fields, moe = _write(resolved)
    ahead = mtp.check(resolved.config.mtp)
    if ahead.depth and ahead.form != "sequential":
        raise InteropError(f"its modules for further tokens are {ahead.form}, not sequential")
    fields |= {"n_group": moe.groups, "topk_group": moe.top_groups, "norm_topk_prob": moe.normalize_weights}
    fields["rope_interleave"] = common.part(resolved, "mixer", Latent).rope_interleaved
    return fields | {"num_nextn_predict_layers": ahead.depth}


def _write(resolved):
    """(fields, MoE.Config) that both have in common."""
    moe, dense, plain = common.write_sparse(resolved, MoE, MLP)
    if plain != list(range(len(plain))):
        raise InteropError("its dense layers are not the first ones")
    a, width = common.part(resolved, "mixer", Latent), hidden_size(moe, resolved.env)
    if None in (a.head_dim, a.rope_dim, a.value_dim, a.kv_rank):
        raise InteropError("its latent attention leaves sizes to defaults; set head_dim, rope_dim, value_dim and kv_rank")
    return {
        **common.write_top(resolved.config), "num_attention_heads": a.num_heads, "num_key_value_heads": a.num_heads,
        "qk_nope_head_dim": a.head_dim, "qk_rope_head_dim": a.rope_dim, "v_head_dim": a.value_dim, "kv_lora_rank": a.kv_rank,
        "q_lora_rank": a.q_rank, "n_routed_experts": moe.num_experts, "num_experts_per_tok": moe.top_k, "moe_intermediate_size": width,
        "n_shared_experts": moe.shared_experts, "routed_scaling_factor": moe.routed_scaling, "first_k_dense_replace": len(plain),
        "intermediate_size": hidden_size(dense, resolved.env) if dense else width, **common.write_gated(moe), **_write_rope(a),
    }, moe  # fmt: skip


def _write_rope(a):
    fields = common.write_rope(a)
    if a.scale is not None and a.rope_scaling is not None:
        magnitude = (a.scale * (a.head_dim + a.rope_dim) ** 0.5) ** 0.5
        fields["rope_parameters"]["mscale_all_dim"] = round((magnitude - 1) / (common.yarn_magnitude(a.rope_scaling["factor"], 1) - 1), 9)
    return fields


COMMON = {"prefix": "model.", "ignore": llama.IGNORE}
DEEPSEEK_V2 = Family("deepseek_v2", "DeepseekV2ForCausalLM", RULES, read_v2, write_v2, **COMMON)
DEEPSEEK_V3 = Family(
    "deepseek_v3", "DeepseekV3ForCausalLM", (*RULES, *AHEAD), read_v3, write_v3, seen=seen_v3, copies=copies_v3, **COMMON
)  # fmt: skip

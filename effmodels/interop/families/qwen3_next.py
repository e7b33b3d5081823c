"""Qwen3-Next: three gated delta layers, then one of attention with gated outputs; scales around zero, experts and a gated shared one."""
from effmodels.channel.mlp import MLP, hidden_size
from effmodels.channel.moe import MoE
from effmodels.interop.errors import InteropError
from effmodels.interop.families import common, llama, qwen_moe
from effmodels.interop.table import Family, Rule
from effmodels.mixers.attention import Attention
from effmodels.mixers.gated_delta import GatedDelta
from effmodels.models import mtp

OURS = common.OURS + "mixer."
LINEAR = common.LAYER + "linear_attn."
FULL, DELTA = "attention", "gated_delta"
NAMES = {"full_attention": FULL, "linear_attention": DELTA}


def _gated_attention(theirs=common.LAYER + "self_attn."):
    """Of every head, q_proj holds the query and then the gate."""
    names = [r for r in common.attention(on=(FULL,)) if "q_proj" not in r.theirs]
    return (
        Rule(theirs + "q_proj.weight", (OURS + "wq", OURS + "wg"), "(N [H]) D -> D N H", (FULL,)),
        Rule(theirs + "q_proj.bias", (OURS + "bq", OURS + "bg"), "(N [H]) -> N H", (FULL,)), *names,
    )  # fmt: skip


RULES = (
    *common.TOP, *common.NORMS, *_gated_attention(),
    # Key head by key head: its query and key, then the values and the gates of the r value heads that it serves.
    Rule(
        LINEAR + "in_proj_qkvz.weight", (OURS + "wq", OURS + "wk", OURS + "wv", OURS + "wz"),
        ("(K [H]) D -> D K H", "(K [H]) D -> D K H", "(K [R P]) D -> D (K R) P", "(K [R P]) D -> D (K R) P"), (DELTA,),
    ),
    Rule(LINEAR + "in_proj_ba.weight", (OURS + "wb", OURS + "wa"), "(K [R]) D -> D (K R)", (DELTA,)),
    Rule(
        LINEAR + "conv1d.weight", tuple(f"{OURS}conv_{x}.weight" for x in "qkv"),
        ("[K H] 1 W -> K H W", "[K H] 1 W -> K H W", "[N P] 1 W -> N P W"), (DELTA,),
    ),
    Rule(LINEAR + "dt_bias", OURS + "dt_bias", None, (DELTA,)),
    Rule(LINEAR + "A_log", OURS + "a_log", None, (DELTA,)),
    Rule(LINEAR + "norm.weight", OURS + "norm_scale", None, (DELTA,)),
    Rule(LINEAR + "out_proj.weight", OURS + "wo", "D (N P) -> N P D", (DELTA,)),
    *common.mlp(on=("mlp",)), common.router(), *common.experts(), *qwen_moe.SHARED_EXPERT,
)  # fmt: skip
# The module for further tokens, which is of attention and of experts, and reads the table and the head of the model.
AHEAD = (
    *(r for r in common.ahead(RULES, "mtp.layers.{m}.") if r.on in ((), (FULL,), ("moe",))),
    Rule("mtp.fc.weight", "mtp.{m}.w_join", "D I -> I D"),
    Rule("mtp.pre_fc_norm_embedding.weight", "mtp.{m}.norm_embed.scale"),
    Rule("mtp.pre_fc_norm_hidden.weight", "mtp.{m}.norm_hidden.scale"),
    Rule("mtp.norm.weight", "mtp.{m}.norm_out.scale"),
)


def seen(config, names):
    """The config with the module for further tokens that config.json does not speak of, where the files hold one."""
    if "mtp.fc.weight" not in names:
        return config
    if FULL not in config["mixers"] or "moe" not in config["channels"]:
        raise InteropError("the files hold a module for further tokens (mtp.), which needs a layer of attention and one of experts.")
    return config | {"mtp": {"depth": 1, "mixer": FULL, "channel": "moe"}}


def read(c):
    """ModelConfig's fields."""
    c.only("hidden_act", "silu")
    bias, interval = bool(c.get("attention_bias", False)), c.get("full_attention_interval", 4)
    by_layer = lambda layers: ("linear_attention" if (i + 1) % interval else "full_attention" for i in range(layers))  # noqa: E731
    pattern = tuple(NAMES[t] for t in common.layer_types(c, NAMES, by_layer))
    mixers = {
        FULL: common.read_attention(
            c, kv_heads=2, head_dim=256, fraction=0.25, bias=bias, out_bias=bias, qk_norm=True, output_gate=True
        ),
        DELTA: {
            "num_heads": c.get("linear_num_key_heads", 16), "num_value_heads": c.get("linear_num_value_heads", 32),
            "head_dim": c.get("linear_key_head_dim", 128), "value_dim": c.get("linear_value_head_dim", 128),
            "conv_width": c.get("linear_conv_kernel_dim", 4),
        },
    }  # fmt: skip
    shared = {"shared_experts": 1, "shared_hidden": c.get("shared_expert_intermediate_size", 512), "shared_gate": True}
    moe = {
        "num_experts": c.get("num_experts", 512), "top_k": c.get("num_experts_per_tok", 10), "hidden": c.get("moe_intermediate_size", 512),
        "activation": "swiglu", "router": "softmax", "normalize_weights": bool(c.get("norm_topk_prob", True)), **shared,
    }  # fmt: skip
    dense = {"hidden": c.get("intermediate_size", 5632), "activation": "swiglu"}
    return common.read_top(
        c, norm_offset=1.0, pattern=common.shortest(pattern), mixers={name: mixers[name] for name in dict.fromkeys(pattern)},
        **common.read_sparse(c, moe, dense),
    )  # fmt: skip


def write(resolved):
    """config.json's fields."""
    m, kinds, ahead = resolved.config, [kind.mixer for kind in resolved.layers], mtp.check(resolved.config.mtp)
    if ahead.depth > 1 or ahead.depth and ahead.form != "sequential":
        raise InteropError(f"its modules for further tokens are {ahead.depth} and {ahead.form}; one, sequential, is what files may hold")
    full, delta = ({p.config for p in kinds if p.cls is cls} for cls in (Attention, GatedDelta))
    if any(p.cls not in (Attention, GatedDelta) for p in kinds) or len(full) > 1 or len(delta) > 1:
        raise InteropError("its mixers are not one kind of attention and one of gated_delta")
    full = next(iter(full), Attention.Config(head_dim=256, rotary_fraction=0.25, qk_norm=True, output_gate=True))
    delta = next(iter(delta), GatedDelta.Config(value_dim=128))
    moe, dense, plain = common.write_sparse(resolved, MoE, MLP)
    width, values = hidden_size(moe, resolved.env), delta.num_value_heads or delta.num_heads
    names = {Attention: "full_attention", GatedDelta: "linear_attention"}
    attention = common.write_attention(full, resolved)
    attention["rope_parameters"]["partial_rotary_factor"] = full.rotary_fraction
    return {
        **common.write_top(m), **attention,
        "attention_bias": full.bias, "layer_types": [names[p.cls] for p in kinds], "linear_num_key_heads": delta.num_heads,
        "linear_num_value_heads": values, "linear_key_head_dim": delta.head_dim,
        "linear_value_head_dim": delta.value_dim or max(1, 2 * delta.head_dim * delta.num_heads // values),
        "linear_conv_kernel_dim": delta.conv_width, "num_experts": moe.num_experts, "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": moe.normalize_weights, "moe_intermediate_size": width,
        "shared_expert_intermediate_size": moe.shared_hidden or moe.shared_experts * width,
        "intermediate_size": hidden_size(dense, resolved.env) if dense else width, "mlp_only_layers": plain, "decoder_sparse_step": 1,
        "hidden_act": "silu",
    }  # fmt: skip


def sizes(resolved):
    """Letters of layouts that shapes do not tell: the key heads, which a matrix of values does not name."""
    found = [kind.mixer.config.num_heads for kind in resolved.layers if kind.mixer.cls is GatedDelta]
    return {"K": found[0]} if found else {}


QWEN3_NEXT = Family(
    "qwen3_next", "Qwen3NextForCausalLM", (*RULES, *AHEAD), read, write, prefix="model.", ignore=llama.IGNORE, sizes=sizes, seen=seen
)  # fmt: skip

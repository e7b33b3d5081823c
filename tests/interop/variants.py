"""What a config.json of each family may say besides its defaults: a base model per family and the fields in which variants differ from it.

HONOURED variants have reference logits (`make_variants`), REFUSED ones a part of the sentence that says no. A value of ABSENT takes a field
away. Models have two layers where nothing else is said, and a vocabulary and widths of no round size.
"""
ABSENT = "absent"

LLAMA = {
    "vocab_size": 37, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 20,
}  # fmt: skip
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
LOCAL_EXPERTS = {"num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 12}
LATENT = {
    **LLAMA, "num_key_value_heads": 4, "kv_lora_rank": 14, "q_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 6,
    "v_head_dim": 10, "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 12, "n_group": 4, "topk_group": 2,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 1.5,
}  # fmt: skip
# Sizes of heads for which float32 rounds little in transformers' own qwen3_next (docs/log.md).
DELTA = {
    **LLAMA, **EXPERTS, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 7, "linear_value_head_dim": 6, "shared_expert_intermediate_size": 14,
}  # fmt: skip
BAILING = {
    **LLAMA, "num_hidden_layers": 3, "head_dim": 8, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 12,
    "rope_theta": 600.0, "partial_rotary_factor": 0.5, "group_norm_size": 2, "layer_group_size": 2, "first_k_dense_replace": 1,
    "num_shared_experts": 1, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "norm_topk_prob": True, "linear_silu": False,
    "use_qk_norm": True, "score_function": "sigmoid", "moe_router_enable_expert_bias": True,
}  # fmt: skip
MINIMAX = {**LLAMA, **LOCAL_EXPERTS, "head_dim": 8}
MINIMAX_TEXT_01 = {
    **MINIMAX, "num_hidden_layers": 3, "attn_type_list": [0, 1, 0], "postnorm": True, "rotary_dim": 4, "rope_theta": 600.0,
    "rms_norm_eps": 1e-5, "shared_intermediate_size": 0, "shared_moe_mode": "sigmoid", "sliding_window": None,
    "layernorm_full_attention_alpha": 1.7, "layernorm_full_attention_beta": 0.8, "layernorm_linear_attention_alpha": 1.3,
    "layernorm_linear_attention_beta": 1.1, "layernorm_mlp_alpha": 0.9, "layernorm_mlp_beta": 1.2,
}  # fmt: skip
BASES = {
    "gpt2": {"vocab_size": 37, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16},
    "gpt_neox": {**{k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}, "rotary_pct": 0.5},
    "llama": LLAMA,
    "mistral": {**LLAMA, "head_dim": 8, "sliding_window": None},
    "mixtral": {**LLAMA, **LOCAL_EXPERTS, "head_dim": 8},
    "olmoe": {**LLAMA, "num_experts": 5, "num_experts_per_tok": 2},
    "qwen2": LLAMA,
    "qwen3": {**LLAMA, "head_dim": 8},
    "qwen2_moe": {**LLAMA, **EXPERTS, "shared_expert_intermediate_size": 14},
    "qwen3_moe": {**LLAMA, **EXPERTS, "head_dim": 8},
    "deepseek_v2": {**LATENT, "topk_method": "group_limited_greedy"},
    "deepseek_v3": LATENT,
    "minimax": {**MINIMAX, "block_size": 5},
    "minimax_text_01": MINIMAX_TEXT_01,
    "bailing_moe_linear": BAILING,
    "qwen3_next": DELTA,
    "mamba2": {
        "vocab_size": 37, "hidden_size": 24, "num_hidden_layers": 2, "num_heads": 6, "head_dim": 8, "state_size": 7, "n_groups": 2,
        "chunk_size": 5,
    },
    "gpt_oss": {**LLAMA, **LOCAL_EXPERTS, "head_dim": 8, "sliding_window": 5},
    "lfm2_moe": {**LLAMA, **EXPERTS, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "retnet": {"vocab_size": 37, "hidden_size": 24, "num_hidden_layers": 2, "num_heads": 2, "intermediate_size": 20},
    "torchscale_retnet": {
        "vocab_size": 37, "decoder_embed_dim": 24, "decoder_value_embed_dim": 40, "decoder_retention_heads": 2,
        "decoder_ffn_embed_dim": 20, "decoder_layers": 2, "layernorm_eps": 1e-6, "no_scale_embedding": True, "activation_fn": "gelu",
    },
}  # fmt: skip


def rope(kind, **fields):
    """`rope_parameters` of transformers 5."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 300.0, **fields}}


def scaling(kind, **fields):
    """`rope_scaling`, as files before transformers 5 have it."""
    return {"rope_scaling": {"type": kind, **fields}, "rope_theta": 300.0}


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"factor": 4.0, "beta_fast": 4.0, "beta_slow": 0.5}
LENGTH = {"original_max_position_embeddings": 64}
BASIC_ROPE = {
    "theta": {"rope_theta": 300.0}, "linear": rope("linear", factor=3.0), "linear_old": scaling("linear", factor=3.0),
    "llama3": rope("llama3", **LLAMA3, **LENGTH), "yarn": rope("yarn", **YARN, **LENGTH),
}  # fmt: skip
ROPE = {
    **BASIC_ROPE, "default": rope("default"), "theta_outside": {"rope_parameters": {"rope_type": "default"}, "rope_theta": 300.0},
    "no_scaling": {"rope_scaling": None, "rope_theta": 300.0}, "both": {**scaling("linear", factor=3.0), **rope("linear", factor=5.0)},
    "llama3_old": scaling("llama3", **LLAMA3, **LENGTH), "llama3_length": {**scaling("llama3", **LLAMA3), "max_position_embeddings": 16},
    "yarn_old": scaling("yarn", **YARN, **LENGTH), "yarn_length": {**scaling("yarn", **YARN), "max_position_embeddings": 32},
    "yarn_attention_factor": rope("yarn", **YARN, **LENGTH, attention_factor=1.3),
    "yarn_mscale": rope("yarn", **YARN, **LENGTH, mscale=1.0, mscale_all_dim=0.5),
    "yarn_one_mscale": rope("yarn", **YARN, **LENGTH, mscale=0.707), "yarn_no_truncation": rope("yarn", **YARN, **LENGTH, truncate=False),
    "yarn_no_factor": {**rope("yarn", **YARN | {"factor": None}, **LENGTH), "max_position_embeddings": 192},
    "yarn_nulls": rope("yarn", **YARN | {"beta_fast": None, "beta_slow": None}, **LENGTH, attention_factor=None),
    "yarn_length_outside": {**rope("yarn", **YARN, **LENGTH), "original_max_position_embeddings": 48},
}  # fmt: skip
NO_ROPE = {
    "dynamic": ({**rope("dynamic", factor=2.0), "max_position_embeddings": 8}, "rope_type 'dynamic' is not supported"),
    "longrope": (rope("longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4, **LENGTH), "rope_type 'longrope' is not supported"),
    "proportional": (rope("proportional"), "rope_type 'proportional' is not supported"),
    "by_layer": ({"rope_parameters": {"full_attention": rope("default"), "rope_theta": 1e4}}, "full_attention="),
    "no_factor": (rope("linear"), "'linear' needs a factor"), "factor_of_default": (rope("default", factor=2.0), "factor=2.0 of rope_type"),
    "unknown_field": (rope("linear", factor=2.0, odd=3), "odd=3"), "rope_number": ({"rope_parameters": 3}, "rope_parameters=3"),
    "theta_text": ({"rope_parameters": {"rope_type": "default", "rope_theta": "x"}}, "rope_theta='x'"),
    "mrope": (rope("default", mrope_section=[1, 1, 2]), "mrope_section="),
}  # fmt: skip
NO_PART = {
    "partial": (rope("default", partial_rotary_factor=0.5), "partial_rotary_factor=0.5 is not supported"),
    "partial_old": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
}  # fmt: skip
TOP = {
    "base": {}, "tied": {"tie_word_embeddings": True}, "one_layer": {"num_hidden_layers": 1}, "three_layers": {"num_hidden_layers": 3},
    "eps": {"rms_norm_eps": 1e-2},
}  # fmt: skip
NO_TOP = {
    "null_size": ({"hidden_size": None}, "hidden_size"), "text": ({"num_hidden_layers": "two"}, "num_hidden_layers='two'"),
    "no_layers": ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
}  # fmt: skip
KV_HEADS = {"one_kv_head": {"num_key_value_heads": 1}, "all_kv_heads": {"num_key_value_heads": 4}}
KV_HEADS_NULL = {"kv_heads_null": {"num_key_value_heads": None}}
HEAD_DIM = {"wide_heads": {"head_dim": 14}, "narrow_heads": {"head_dim": 6}}
ACTIVATIONS = {f"act_{name}": {"hidden_act": name} for name in ("swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh")}
NO_ACTIVATION = {f"act_{name}": ({"hidden_act": name}, f"hidden_act='{name}'") for name in ("relu", "tanh", "quick_gelu")}
BIAS = {"attention_bias": {"attention_bias": True}}
SLIDE = {"use_sliding_window": True, "sliding_window": 5}
TYPES = {"one_slides": ["sliding_attention", "full_attention"], "full": ["full_attention"] * 2, "short": ["full_attention"]}
WINDOWS = {
    "window_from": {**SLIDE, "max_window_layers": 1}, "window_everywhere": {**SLIDE, "max_window_layers": 0},
    "window_off": {**SLIDE, "use_sliding_window": False, "max_window_layers": 0},
    "window_types": {**SLIDE, "layer_types": TYPES["one_slides"]},
    "full_types": {**SLIDE, "layer_types": TYPES["full"]},
}  # fmt: skip
NO_WINDOWS = {
    "types_off": ({"sliding_window": 4, "layer_types": TYPES["one_slides"]}, "give no window"),
    "short_types": ({**SLIDE, "layer_types": TYPES["short"]}, "layer_types must name 2 layers"),
    "odd_types": ({"layer_types": ["chunked_attention"] * 2}, "layer_types must name 2 layers, each one of full_attention"),
}  # fmt: skip
ALL_FULL = {"types": ({"layer_types": TYPES["one_slides"]}, "layer_types has 'sliding_attention', but every layer")}
SPARSE = {
    "normalised": {"norm_topk_prob": True}, "not_normalised": {"norm_topk_prob": False}, "one_expert": {"num_experts_per_tok": 1},
    "all_experts": {"num_experts_per_tok": 5},
}  # fmt: skip
STEPS = {
    "dense_layer": {"mlp_only_layers": [1]}, "dense_null": {"mlp_only_layers": None}, "step_two": {"decoder_sparse_step": 2},
    "all_dense": {"mlp_only_layers": [0, 1]}, "no_experts": {"num_experts": 0},
}  # fmt: skip
LIKE_LLAMA = {**TOP, **BASIC_ROPE, **KV_HEADS}
NOT_LIKE_LLAMA = {**NO_TOP, **NO_ROPE, **NO_PART, **NO_ACTIVATION}
FACTORS = ("full_attn_alpha", "full_attn_beta", "linear_attn_alpha", "linear_attn_beta", "mlp_alpha", "mlp_beta")
LINEAR, FULL = "linear_attention", "full_attention"

HONOURED = {
    "gpt2": {
        "base": {}, "untied": {"tie_word_embeddings": False}, "one_layer": {"n_layer": 1}, "three_layers": {"n_layer": 3},
        "inner": {"n_inner": 22}, "eps": {"layer_norm_epsilon": 1e-2}, "exact_gelu": {"activation_function": "gelu"},
        "tanh_gelu": {"activation_function": "gelu_pytorch_tanh"}, "not_scaled": {"scale_attn_weights": False},
        "by_layer": {"scale_attn_by_inverse_layer_idx": True, "n_layer": 3}, "upcast": {"reorder_and_upcast_attn": True},
        "by_layer_alone": {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False}, "two_heads": {"n_head": 2},
        "one_layer_by_layer": {"scale_attn_by_inverse_layer_idx": True, "n_layer": 1},
        "aliases": {"n_embd": ABSENT, "n_layer": ABSENT, "n_head": ABSENT, "n_positions": ABSENT, "hidden_size": 32, "num_hidden_layers": 2,
                    "num_attention_heads": 4, "max_position_embeddings": 16},
    },
    "gpt_neox": {
        **{n: v for n, v in TOP.items() if n != "eps"}, "eps": {"layer_norm_eps": 1e-2}, "serial": {"use_parallel_residual": False},
        "no_bias": {"attention_bias": False}, "whole": {"rotary_pct": 1.0}, "quarter": {"rotary_pct": ABSENT},
        "theta": {"rotary_emb_base": 300}, "said_twice": {"rotary_emb_base": 300, "rope_theta": 300},
        "linear_old": {"rope_scaling": {"type": "linear", "factor": 2.0}, "rotary_emb_base": 500},
        "yarn": rope("yarn", **YARN, **LENGTH), "llama3": rope("llama3", **LLAMA3, **LENGTH), "no_rotation": {"rotary_pct": 0.0},
        "partial": rope("default", partial_rotary_factor=0.25), **{f"act_{a}": {"hidden_act": a} for a in ("gelu_new", "gelu_fast")},
    },
    "llama": {
        **LIKE_LLAMA, **KV_HEADS_NULL, **HEAD_DIM, **BIAS, **ROPE, **ACTIVATIONS, "mlp_bias": {"mlp_bias": True},
        "head_dim_null": {"head_dim": None}, "slices": {"pretraining_tp": 2}, "types": {"layer_types": TYPES["full"]},
        "kv_heads_absent": {"num_key_value_heads": ABSENT},
    },
    "mistral": {
        **LIKE_LLAMA, **HEAD_DIM, "window": {"sliding_window": 5}, "window_of_one": {"sliding_window": 1},
        "window_absent": {"sliding_window": ABSENT}, "act_gelu": {"hidden_act": "gelu"},
    },
    "mixtral": {
        **LIKE_LLAMA, **HEAD_DIM, "window": {"sliding_window": 5}, "one_expert": {"num_experts_per_tok": 1},
        "all_experts": {"num_experts_per_tok": 5}, "jitter": {"router_jitter_noise": 0.1}, "act_gelu": {"hidden_act": "gelu"},
    },
    "olmoe": {**LIKE_LLAMA, **KV_HEADS_NULL, **BIAS, **SPARSE, "act_gelu": {"hidden_act": "gelu"}},
    "qwen2": {**LIKE_LLAMA, **KV_HEADS_NULL, **HEAD_DIM, **WINDOWS, "act_gelu": {"hidden_act": "gelu"},
              "window_null": {**SLIDE, "sliding_window": None, "max_window_layers": 0}},
    "qwen3": {**LIKE_LLAMA, **KV_HEADS_NULL, **HEAD_DIM, **WINDOWS, **BIAS, "head_dim_absent": {"head_dim": ABSENT}},
    "qwen2_moe": {**LIKE_LLAMA, **WINDOWS, **SPARSE, **STEPS, "no_bias": {"qkv_bias": False}, "head_dim": {"head_dim": 6}},
    "qwen3_moe": {
        **LIKE_LLAMA, **HEAD_DIM, **SPARSE, **STEPS, **BIAS, "window": {**SLIDE, "max_window_layers": 1},
        "window_off": WINDOWS["window_off"],
        "head_dim_absent": {"head_dim": ABSENT},
    },
    "deepseek_v2": {
        **TOP, **{n: v for n, v in ROPE.items() if n[0] in "ty"}, "linear": rope("linear", factor=3.0), "greedy": {"topk_method": "greedy"},
        "no_rank": {"q_lora_rank": None}, "all_dense": {"first_k_dense_replace": 2}, "no_dense": {"first_k_dense_replace": 0},
        "shared": {"n_shared_experts": 2}, "shared_absent": {"n_shared_experts": ABSENT}, "unscaled": {"routed_scaling_factor": ABSENT},
        "one_group": {"n_group": 1, "topk_group": 1}, "all_groups": {"n_group": 4, "topk_group": 4}, "act_gelu": {"hidden_act": "gelu"},
        "no_groups": {"n_group": None, "topk_group": None, "topk_method": "greedy"},
    },
    "deepseek_v3": {
        **TOP, **{n: v for n, v in ROPE.items() if n[0] in "ty"}, "linear": rope("linear", factor=3.0), "no_rank": {"q_lora_rank": None},
        "all_dense": {"first_k_dense_replace": 2}, "no_dense": {"first_k_dense_replace": 0}, "shared": {"n_shared_experts": 2},
        "not_normalised": {"norm_topk_prob": False}, "one_group": {"n_group": 1, "topk_group": 1}, "halves": {"rope_interleave": False},
        "all_groups": {"n_group": 4, "topk_group": 4}, "one_expert": {"num_experts_per_tok": 1}, "act_gelu": {"hidden_act": "gelu"},
        "scale_absent": {"routed_scaling_factor": ABSENT}, "no_mtp": {"num_nextn_predict_layers": 0},
    },
    "minimax": {
        **LIKE_LLAMA, **HEAD_DIM, "window": {"sliding_window": 5}, "linear_first": {"layer_types": [LINEAR, FULL]},
        "all_linear": {"layer_types": [LINEAR] * 2}, "all_full": {"layer_types": [FULL] * 2}, "one_expert": {"num_experts_per_tok": 1},
        "factors": {f"{name}_factor": 0.5 + 0.1 * i for i, name in enumerate(FACTORS)}, "block_absent": {"block_size": ABSENT},
        "six_heads": {"num_attention_heads": 6, "head_dim": 4}, "one_linear": {"num_hidden_layers": 1, "layer_types": [LINEAR]},
    },
    "minimax_text_01": {
        "base": {}, "tied": {"tie_word_embeddings": True}, "pre": {"postnorm": False}, "postnorm_absent": {"postnorm": ABSENT},
        "whole_rotation": {"rotary_dim": ABSENT}, "all_linear": {"attn_type_list": [0, 0, 0]}, "all_full": {"attn_type_list": [1, 1, 1]},
        "six_heads": {"num_attention_heads": 6, "head_dim": 4}, "shared_list": {"shared_intermediate_size": [0]},
        "factors_absent": {f"layernorm_{part}_{x}": ABSENT for part in ("full_attention", "linear_attention", "mlp") for x in ("alpha",
            "beta")},
        "head_dim_absent": {"head_dim": ABSENT}, "one_layer": {"num_hidden_layers": 1, "attn_type_list": [0]},
    },
    "bailing_moe_linear": {
        "base": {}, "tied": {"tie_word_embeddings": True}, "groups": {"layer_group_size": 3, "num_hidden_layers": 5},
        "all_full": {"layer_group_size": 1}, "group_of_all": {"layer_group_size": 8}, "silu": {"linear_silu": True},
        "no_qk_norm": {"use_qk_norm": False}, "softmax": {"score_function": "softmax"}, "not_normalised": {"norm_topk_prob": False},
        "no_expert_bias": {"moe_router_enable_expert_bias": False}, "no_shared": {"num_shared_experts": 0},
        "two_shared": {"num_shared_experts": 2}, "no_groups": {"n_group": 1, "topk_group": 1}, "all_dense": {"first_k_dense_replace": 3},
        "no_dense": {"first_k_dense_replace": 0}, "whole_rotation": {"partial_rotary_factor": 1.0}, "theta": {"rope_theta": 1e4},
        "one_norm_group": {"group_norm_size": 1}, "linear": {"rope_scaling": {"type": "linear", "factor": 3.0}}, **KV_HEADS,
        "six_heads": {"num_attention_heads": 6, "head_dim": 6, "partial_rotary_factor": 1.0}, "unscaled": {"routed_scaling_factor": 1.0},
    },
    "qwen3_next": {
        **{n: v for n, v in LIKE_LLAMA.items() if "layer" not in n}, **BIAS, **SPARSE, "all_linear": {"layer_types": [LINEAR] * 2},
        "all_full": {"layer_types": [FULL] * 2}, "interval": {"layer_types": ABSENT, "full_attention_interval": 2},
        "types_absent": {"layer_types": ABSENT, "num_hidden_layers": 4}, "equal_heads": {"linear_num_value_heads": 2},
        "short_conv": {"linear_conv_kernel_dim": 2}, "one_key_head": {"linear_num_key_heads": 1}, "head_dim": {"head_dim": 16},
        "three_layers": {"num_hidden_layers": 3, "layer_types": [LINEAR, FULL, LINEAR]}, "dense_layer": {"mlp_only_layers": [1]},
        "one_layer": {"num_hidden_layers": 1, "layer_types": [FULL]}, "head_dim_absent": {"head_dim": ABSENT},
        "kv_heads_absent": {"num_key_value_heads": ABSENT}, "partial": rope("default", partial_rotary_factor=0.5),
    },
    "mamba2": {
        **{n: v for n, v in TOP.items() if n != "eps"}, "eps": {"layer_norm_epsilon": 1e-2}, "biases": {"use_bias": True},
        "no_conv_bias": {"use_conv_bias": False}, "conv": {"conv_kernel": 2}, "one_group": {"n_groups": 1},
        "groups_of_one": {"n_groups": 6},
        "expand": {"expand": 1, "num_heads": 3, "n_groups": 1}, "limit": {"time_step_limit": [0.2, 1.5]}, "odd_state": {"state_size": 3},
        "limit_below": {"time_step_limit": [0.2, {"__float__": "Infinity"}]}, "residual": {"residual_in_fp32": False},
        "act_swish": {"hidden_act": "swish"}, "norm_before_gate": {"norm_before_gate": True},
    },
    "gpt_oss": {
        **LIKE_LLAMA, **HEAD_DIM, "no_bias": {"attention_bias": False}, "window_of_one": {"sliding_window": 1},
        "limit": {"swiglu_limit": 0.5},
        "alpha": {"swiglu_alpha": 1.1}, "all_full": {"layer_types": [FULL] * 2}, "one_expert": {"num_experts_per_tok": 1},
        "all_experts": {"num_experts_per_tok": 5}, "all_sliding": {"layer_types": ["sliding_attention"] * 2},
    },
    "lfm2_moe": {
        "base": {}, "untied": {"tie_word_embeddings": False}, **BASIC_ROPE, **KV_HEADS, **SPARSE, "eps": {"norm_eps": 1e-2},
        "three_layers": {"num_hidden_layers": 3, "layer_types": ["conv", FULL, "conv"]}, "conv_bias": {"conv_bias": True},
        "one_layer": {"num_hidden_layers": 1, "layer_types": [FULL], "num_dense_layers": 0}, "long_conv": {"conv_L_cache": 5},
        "no_expert_bias": {"use_expert_bias": False}, "no_dense": {"num_dense_layers": 0}, "all_dense": {"num_dense_layers": 2},
        "scaled": {"routed_scaling_factor": 1.7}, "all_conv": {"layer_types": ["conv"] * 2}, "all_full": {"layer_types": [FULL] * 2},
        "untied_old": {"tie_embedding": False}, "tied_old": {"tie_embedding": True, "tie_word_embeddings": False},
        "head_dim": {"head_dim": 6},
    },
    "retnet": {
        **{n: v for n, v in TOP.items() if n != "eps"}, "eps": {"norm_eps": 1e-2}, "sizes": {"expand_k": 0.5, "expand_v": 1.5},
        "four_heads": {"num_heads": 4}, "width": {"intermediate_size": None}, "ratio": {"intermediate_size": None, "hidden_ratio": 20},
    },
    "torchscale_retnet": {
        "base": {}, "shared": {"share_decoder_input_output_embed": True}, "scaled": {"no_scale_embedding": False},
        "swish": {"activation_fn": "swish"}, "eps": {"layernorm_eps": 1e-4}, "one_layer": {"decoder_layers": 1},
        "four_heads": {"decoder_retention_heads": 4}, "default_activation": {"activation_fn": ABSENT},
    },
}  # fmt: skip


def only(**fields):
    """Variants of one field with a value that is refused by its name."""
    return {name: ({name: value}, f"{name}={value!r}") for name, value in fields.items()}


BACK = {"back": ({"n_group": 3}, "groups=3 must divide")}
REFUSED = {
    "gpt2": {
        "act": ({"activation_function": "relu"}, "activation_function='relu'"), "text": ({"n_layer": "two"}, "n_layer='two'"),
    },
    "gpt_neox": {
        **NO_TOP, **{n: v for n, v in NO_ROPE.items() if n != "longrope"}, **NO_ACTIVATION, **only(rope_theta=300.0),
        "odd": ({"rotary_pct": 0.7}, "rotates 5 of 8 dims"), "old": ({"partial_rotary_factor": 0.25}, "partial_rotary_factor=0.25"),
    },
    "llama": {**NOT_LIKE_LLAMA, **ALL_FULL, "odd_heads": ({"num_attention_heads": 5}, "not divisible by num_attention_heads=5")},
    "mistral": {**NOT_LIKE_LLAMA, "types": ({"sliding_window": 5, "layer_types": TYPES["full"]}, "layer_types has 'full_attention'")},
    "mixtral": {**NOT_LIKE_LLAMA, **ALL_FULL},
    "olmoe": {**NOT_LIKE_LLAMA, **ALL_FULL, **only(clip_qkv=0.7)},
    "qwen2": {**NOT_LIKE_LLAMA, **NO_WINDOWS},
    "qwen3": {**NOT_LIKE_LLAMA, **NO_WINDOWS},
    "qwen2_moe": {**NOT_LIKE_LLAMA, **NO_WINDOWS},
    "qwen3_moe": {**NOT_LIKE_LLAMA, **ALL_FULL, "window_types": ({**SLIDE, "layer_types": TYPES["full"]},
        "layer_types has 'full_attention'")},
    "deepseek_v2": {
        **NOT_LIKE_LLAMA, **ALL_FULL, **BACK,
        **only(topk_method="noaux_tc", attention_bias=True, mlp_bias=True, norm_topk_prob=True, scoring_func="sigmoid", moe_layer_freq=2,
               num_key_value_heads=2),
    },
    "deepseek_v3": {
        **NOT_LIKE_LLAMA, **ALL_FULL, **BACK,
        **only(topk_method="greedy", attention_bias=True, scoring_func="softmax", num_key_value_heads=2),
    },
    "minimax": {
        **NOT_LIKE_LLAMA, "odd_part": ({"rotary_dim": 3}, "rotates 3 of 8 dims"),
        "types": ({"layer_types": TYPES["one_slides"]}, "layer_types must name 2 layers, each one of full_attention, linear"),
    },
    "minimax_text_01": {
        **NO_TOP, **NO_ROPE, **NO_ACTIVATION, "short": ({"attn_type_list": [0, 1]}, "attn_type_list must name 3 layers"),
        "types": ({"attn_type_list": [0, 1, 2]}, "each 0 (linear) or 1 (softmax)"), **only(shared_intermediate_size=64),
    },
    "bailing_moe_linear": {
        **NO_TOP, **NO_ROPE, **NO_ACTIVATION,
        **only(use_bias=True, use_qkv_bias=True, norm_head=True, rope_traditional=True, linear_rope=False, use_sliding_window=True,
               topk_method="greedy", score_function="tanh"),
    },
    "qwen3_next": {
        **NO_TOP, **NO_ROPE, **NO_ACTIVATION, "odd": ({"head_dim": 12}, "rotates 3 of 12 dims"), "gelu": ({"hidden_act": "gelu"}, "'gelu'"),
        "types": ({"layer_types": TYPES["one_slides"]}, "layer_types must name 2 layers, each one of full_attention, linear_attention"),
    },
    "mamba2": {**NO_TOP, **NO_ACTIVATION, **only(rms_norm=False), "expand": ({"expand": 3}, "expand=3 times hidden_size=24")},
    "gpt_oss": {
        **NO_TOP, **NO_ROPE, **NO_PART, "no_window": ({"sliding_window": None}, "give no window"),
        "types": ({"layer_types": [LINEAR, FULL]}, "layer_types must name 2 layers, each one of full_attention, sliding_attention"),
    },
    "lfm2_moe": {
        **NO_TOP, **NO_ROPE, **NO_PART, "types": ({"layer_types": ["conv", "mamba"]}, "layer_types must name 2 layers, each one of conv"),
        "types_absent": ({"layer_types": ABSENT}, "layer_types must name 2 layers"),
    },
    "retnet": {
        **NO_TOP, **NO_ACTIVATION,
        **only(feature_map="relu", use_short_conv=True, elementwise_affine=False, num_kv_heads=1, use_output_gate=False),
        "attn": ({"attn": {"layers": [0]}}, "attn="),
    },
    "torchscale_retnet": only(layernorm_embedding=True, moe_freq=2, multiway=True, deepnorm=True, no_output_layer=True,
        activation_fn="relu"),
}  # fmt: skip


def config(family, fields):
    """The object of a config.json: the family's base with these fields."""
    merged = {"model_type": family, **BASES[family], **fields}
    return {name: value for name, value in merged.items() if value is not ABSENT}

"""Small models, one or more per family: the fields of their config.json that differ from the family's defaults."""
SMALL = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 40}
GROUPED = {**SMALL, "num_key_value_heads": 2}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 16
YARN = {"rope_type": "yarn", "rope_theta": 300.0, "factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 3.0, "beta_slow": 0.5}

TINY = {"vocab_size": 61, "n_embd": 24, "n_layer": 3, "n_head": 4}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20}
LATENT = {
    **SMALL, "num_key_value_heads": 4, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 6, "v_head_dim": 10,
    "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "n_group": 4, "topk_group": 2, "n_shared_experts": 2,
    "first_k_dense_replace": 1, "routed_scaling_factor": 1.5,
}  # fmt: skip
DEEPSEEK_YARN = {"rope_type": "yarn", "rope_theta": 300.0, "factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 3.0}
DEEPSEEK_YARN |= {"beta_slow": 0.5, "mscale": 1.0, "mscale_all_dim": 0.7}
TORCHSCALE = {
    "vocab_size": 61, "decoder_embed_dim": 24, "decoder_value_embed_dim": 40, "decoder_retention_heads": 2, "decoder_ffn_embed_dim": 32,
    "decoder_layers": 3, "layernorm_eps": 1e-6, "no_scale_embedding": True, "activation_fn": "swish",
    "share_decoder_input_output_embed": False,
}  # fmt: skip
DELTA_HYBRID = {
    **GROUPED, **EXPERTS, "num_hidden_layers": 4, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 7, "linear_value_head_dim": 6,
    "shared_expert_intermediate_size": 28, "partial_rotary_factor": 0.5,
}  # fmt: skip
MAMBA = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 3, "num_heads": 6, "head_dim": 8, "state_size": 7, "n_groups": 2}
SHORT_CONVS = {
    **GROUPED, **EXPERTS, "num_hidden_layers": 4, "layer_types": ["conv", "conv", "full_attention", "conv"], "num_dense_layers": 1,
}  # fmt: skip

OSS = {**GROUPED, "num_hidden_layers": 4, "head_dim": 8, "num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": 5}
MINIMAX = {**GROUPED, "num_local_experts": 4, "num_hidden_layers": 4, "block_size": 8}
for _part, _alpha, _beta in (("full_attn", 1.7, 0.8), ("linear_attn", 1.3, 1.1), ("mlp", 0.9, 1.2)):
    MINIMAX |= {_part + "_alpha_factor": _alpha, _part + "_beta_factor": _beta}
BAILING = {
    **GROUPED, "num_hidden_layers": 5, "head_dim": 8, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 20,
    "rope_theta": 600.0, "partial_rotary_factor": 0.5, "group_norm_size": 2, "layer_group_size": 3, "first_k_dense_replace": 1,
    "num_shared_experts": 1, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "norm_topk_prob": True, "linear_silu": False,
    "use_qk_norm": True, "score_function": "sigmoid", "moe_router_enable_expert_bias": True,
}  # fmt: skip

CASES = {
    "llama": {"model_type": "llama", **GROUPED, "tie_word_embeddings": True, "head_dim": 10},
    "llama_llama3": {"model_type": "llama", **GROUPED, "hidden_size": 32, "rope_parameters": LLAMA3},
    "llama_yarn": {"model_type": "llama", **GROUPED, "hidden_size": 32, "rope_parameters": YARN},
    "llama_linear": {"model_type": "llama", **GROUPED, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}},
    "llama_biases": {"model_type": "llama", **SMALL, "attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-5},
    "gpt2": {"model_type": "gpt2", **TINY, "n_positions": 32},
    "gpt_neox": {"model_type": "gpt_neox", **SMALL, "hidden_size": 32, "rotary_pct": 0.25},
    "gpt_neox_serial": {"model_type": "gpt_neox", **SMALL, "hidden_size": 32, "use_parallel_residual": False, "rotary_pct": 1.0},
    "mistral": {"model_type": "mistral", **GROUPED, "sliding_window": 5},
    "mixtral": {"model_type": "mixtral", **GROUPED, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 6},
    "qwen2": {"model_type": "qwen2", **GROUPED, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {"model_type": "qwen3", **GROUPED, "head_dim": 10, "tie_word_embeddings": True},
    "qwen2_moe": {"model_type": "qwen2_moe", **GROUPED, **EXPERTS, "shared_expert_intermediate_size": 28, "mlp_only_layers": [0]},
    "qwen3_moe": {"model_type": "qwen3_moe", **GROUPED, **EXPERTS, "norm_topk_prob": True, "head_dim": 8},
    "olmoe": {"model_type": "olmoe", **GROUPED, "num_experts": 6, "num_experts_per_tok": 3},
    "gpt_oss": {
        "model_type": "gpt_oss", **OSS, "swiglu_limit": 0.8, "rope_parameters": YARN | {"truncate": False}, "rms_norm_eps": 1e-6,
    },
    "gpt_oss_full": {
        "model_type": "gpt_oss", **OSS, "layer_types": ["full_attention"] * 4, "attention_bias": False, "tie_word_embeddings": True,
        "swiglu_alpha": 1.1, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "minimax": {"model_type": "minimax", **MINIMAX, "layer_types": ["linear_attention", "linear_attention", "full_attention"] + [
        "linear_attention"]},
    "minimax_window": {
        "model_type": "minimax", **GROUPED, "head_dim": 10, "num_local_experts": 4, "num_experts_per_tok": 3, "sliding_window": 6,
        "block_size": 5, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
    },
    "bailing_moe_linear": {"model_type": "bailing_moe_linear", **BAILING, "rope_scaling": {"type": "linear", "factor": 3.0}},
    "bailing_moe_linear_plain": {
        "model_type": "bailing_moe_linear", **BAILING, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 6,
        "group_norm_size": 3, "layer_group_size": 2, "first_k_dense_replace": 0, "num_shared_experts": 0, "n_group": 1, "topk_group": 1,
        "linear_silu": True, "use_qk_norm": False, "score_function": "softmax", "moe_router_enable_expert_bias": False,
        "tie_word_embeddings": True, "partial_rotary_factor": 1.0, "norm_topk_prob": False, "routed_scaling_factor": 1.0,
    },
    "retnet": {"model_type": "retnet", **{k: v for k, v in SMALL.items() if k != "num_attention_heads"}, "num_heads": 2},
    "torchscale_retnet": {"model_type": "torchscale_retnet", **TORCHSCALE},
    "mamba2": {"model_type": "mamba2", **MAMBA, "chunk_size": 8},
    "mamba2_biases": {
        "model_type": "mamba2", **MAMBA, "use_bias": True, "use_conv_bias": False, "time_step_limit": [0.2, 1.5], "conv_kernel": 3,
        "tie_word_embeddings": True,
    },
    "qwen3_next": {"model_type": "qwen3_next", **DELTA_HYBRID},
    "qwen3_next_biases": {
        "model_type": "qwen3_next", **DELTA_HYBRID, "attention_bias": True, "mlp_only_layers": [1], "norm_topk_prob": False,
        "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 5, "tie_word_embeddings": True,
    },
    "lfm2_moe": {"model_type": "lfm2_moe", **SHORT_CONVS},
    "lfm2_moe_biases": {
        "model_type": "lfm2_moe", **SHORT_CONVS, "conv_bias": True, "conv_L_cache": 4, "use_expert_bias": False, "norm_topk_prob": False,
        "routed_scaling_factor": 1.7, "tie_word_embeddings": False,
    },
    "deepseek_v2": {"model_type": "deepseek_v2", **LATENT, "topk_method": "group_limited_greedy", "q_lora_rank": None},
    "deepseek_v3": {"model_type": "deepseek_v3", **LATENT, "q_lora_rank": 12, "rope_parameters": DEEPSEEK_YARN},
}

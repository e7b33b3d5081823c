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
    "retnet": {"model_type": "retnet", **{k: v for k, v in SMALL.items() if k != "num_attention_heads"}, "num_heads": 2},
    "torchscale_retnet": {"model_type": "torchscale_retnet", **TORCHSCALE},
    "deepseek_v2": {"model_type": "deepseek_v2", **LATENT, "topk_method": "group_limited_greedy", "q_lora_rank": None},
    "deepseek_v3": {"model_type": "deepseek_v3", **LATENT, "q_lora_rank": 12, "rope_parameters": DEEPSEEK_YARN},
}

"""Reading config.json: every field is asked for by name, and what nobody asked for is told."""
from effmodels.interop.errors import InteropError

MISSING = object()
# Fields that say nothing about what the model computes.
HARMLESS = frozenset(
    """architectures auto_map model_type torch_dtype dtype transformers_version _name_or_path name_or_path use_cache id2label label2id
    bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id unk_token_id cls_token_id initializer_range
    output_attentions output_hidden_states output_router_logits return_dict is_encoder_decoder is_decoder add_cross_attention
    cross_attention_hidden_size tie_encoder_decoder chunk_size_feed_forward problem_type task_specific_params torchscript
    use_bfloat16 pruned_heads finetuning_task gradient_checkpointing max_position_embeddings attention_dropout hidden_dropout
    hidden_dropout_prob resid_pdrop embd_pdrop attn_pdrop attention_probs_dropout_prob classifier_dropout router_aux_loss_coef
    router_jitter_noise pretraining_tp aux_loss_alpha seq_aux ep_size vocab_file tokenizer_class prefix unsloth_version
    summary_type summary_use_proj summary_activation summary_first_dropout summary_proj_to_labels""".split()
)
# What a field must be where it is said, whatever the family: sizes (integers from 1), counts (from 0), numbers, lists, objects.
SIZES = frozenset(
    """vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size moe_intermediate_size
    shared_expert_intermediate_size moe_shared_expert_intermediate_size num_local_experts n_routed_experts num_experts_per_tok
    n_group topk_group kv_lora_rank q_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim max_position_embeddings
    n_embd n_layer n_head n_inner n_positions num_heads state_size n_groups conv_kernel conv_L_cache linear_num_key_heads
    linear_num_value_heads linear_key_head_dim linear_value_head_dim linear_conv_kernel_dim full_attention_interval layer_group_size
    group_norm_size rotary_dim decoder_embed_dim decoder_layers decoder_retention_heads decoder_value_embed_dim
    decoder_ffn_embed_dim""".split()
)
COUNTS = frozenset(
    """num_experts first_k_dense_replace num_dense_layers decoder_sparse_step max_window_layers sliding_window n_shared_experts
    num_shared_experts""".split()
)
NUMBERS = frozenset(
    """rms_norm_eps layer_norm_eps layer_norm_epsilon norm_eps layernorm_eps rope_theta rotary_emb_base rotary_pct partial_rotary_factor
    routed_scaling_factor swiglu_alpha swiglu_limit expand expand_k expand_v""".split()
)
LISTS = frozenset("layer_types mlp_only_layers attn_type_list time_step_limit".split())
OBJECTS = frozenset("rope_parameters rope_scaling".split())
# Fields whose null says something besides their default.
NULLABLE = frozenset(
    """num_key_value_heads sliding_window n_group topk_group q_lora_rank n_inner n_shared_experts num_shared_experts
    intermediate_size partial_rotary_factor""".split()
)


def _kind(name, value):
    """(what a field must be, whether this value is that), or None where any value is taken."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    for names, what, fits in (
        (SIZES, "an integer of at least 1", whole and value >= 1), (COUNTS, "an integer of at least 0", whole and value >= 0),
        (NUMBERS, "a number", whole or isinstance(value, float)), (LISTS, "a list", isinstance(value, (list, tuple))),
        (OBJECTS, "an object", isinstance(value, dict)),
    ):  # fmt: skip
        if name in names:
            return what, fits
    return None


class Fields:
    """The fields of one config.json, each read once and checked."""

    def __init__(self, mapping, model_type):
        self.mapping, self.model_type, self.used = mapping, model_type, set()

    def get(self, name, default=MISSING):
        """The value of a field, which is of its kind or null; without a default a missing one, or null, is an error."""
        self.used.add(name)
        if name not in self.mapping and default is not MISSING:
            return default
        value = self.mapping.get(name)
        if value is None and default is MISSING:
            raise InteropError(f"config.json of this {self.model_type} lacks {name!r}.")
        kind = _kind(name, value)
        optional = value is None and (default is None or name in NULLABLE)
        if kind is not None and not kind[1] and not optional:
            raise InteropError(f"config.json: {name}={value!r} of this {self.model_type}: {kind[0]} is expected.")
        return value

    def only(self, name, *allowed):
        """Checks a field of which only some values are supported; the first is what an absent one means."""
        value = self.get(name, allowed[0])
        if value not in allowed:
            choice = " or ".join(map(repr, allowed))
            raise InteropError(f"config.json: {name}={value!r} is not supported for {self.model_type}; only {choice} is.")
        return value

    def given(self, name):
        """Whether a field is there and not null."""
        return self.mapping.get(name) is not None

    def unread(self):
        """Fields that nothing has asked for and that may mean something."""
        known = self.used | HARMLESS
        return {k: v for k, v in self.mapping.items() if k not in known and not k.startswith("_") and v not in (None, False, {}, [])}

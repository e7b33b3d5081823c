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


class Fields:
    """The fields of one config.json, each read once and checked."""

    def __init__(self, mapping, model_type):
        self.mapping, self.model_type, self.used = mapping, model_type, set()

    def get(self, name, default=MISSING):
        """The value of a field; without a default a missing one is an error."""
        self.used.add(name)
        value = self.mapping.get(name, default)
        if value is MISSING:
            raise InteropError(f"config.json of this {self.model_type} lacks {name!r}.")
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

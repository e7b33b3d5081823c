"""What a model costs, exactly and without building it: parameters, FLOPs, bytes, size of the decoding state."""
import dataclasses

import jax.numpy as jnp

from effmodels.models import sharing
from effmodels.models.resolve import resolve


@dataclasses.dataclass(frozen=True)
class ModelCost:
    """Parameters (values), FLOPs per token (a multiply-add is two; matmuls only), bytes. Training counts three forward passes, no remat.

    flops_* are at `seq_len`; decode_flops of one token after seq_len others; decode_state_bytes of one sequence of up to seq_len tokens.
    """

    seq_len: int
    params: int
    active_params: int
    embedding_params: int
    train_flops_per_token: float
    prefill_flops_per_token: float
    dense_prefill_flops_per_token: float
    decode_flops_per_token: float
    param_bytes: int
    decode_state_bytes: int


def cost(config, seq_len):
    """`ModelCost` of a ModelConfig (or its mapping) for sequences of seq_len tokens.

    Weights that layers share count once; adding low-rank matrices to them, once per call and not per token, is in no FLOPs.
    """
    resolved = resolve(config)
    c, env = resolved.config, resolved.env
    state_dtype_bytes = jnp.dtype(c.compute_dtype).itemsize
    parts = [part.cls.cost(part.config, env, seq_len, state_dtype_bytes) for kind in resolved.layers for part in (kind.mixer, kind.channel)]
    norm_size = c.d_model * (2 if c.norm == "layernorm" else 1)
    per_layer = 1 if (c.norm_position, c.residual) == ("post", "parallel") else 4 if c.norm_position == "sandwich" else 2
    norms = norm_size * (1 + c.num_layers * per_layer)
    table = c.vocab_size * c.d_model
    embedding = table * (1 if c.tie_embeddings else 2) + c.learned_positions * c.d_model
    head_flops = 2 * table
    borrowed, added = sharing.saved(resolved.layers, env, sharing.check(c.sharing))
    held = [0 if (name, i // 2) in borrowed else 1 for i, name in enumerate(("mixer", "channel") * c.num_layers)]
    norms += added - norm_size * per_layer * sum(name == "norms" for name, _ in borrowed)
    params = sum(p.params * h for p, h in zip(parts, held)) + norms + embedding
    prefill = sum(p.flops for p in parts) / seq_len + head_flops
    return ModelCost(
        seq_len=seq_len,
        params=params,
        active_params=sum(p.active_params * h for p, h in zip(parts, held)) + norms + embedding,
        embedding_params=embedding,
        train_flops_per_token=3 * prefill,
        prefill_flops_per_token=prefill,
        dense_prefill_flops_per_token=sum(p.dense_flops for p in parts) / seq_len + head_flops,
        decode_flops_per_token=sum(p.decode_flops for p in parts) + head_flops,
        param_bytes=params * jnp.dtype(c.param_dtype).itemsize,
        decode_state_bytes=sum(p.state_bytes for p in parts) + 4,  # the row's length, int32
    )

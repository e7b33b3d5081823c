"""What a model costs, exactly and without building it: parameters, FLOPs, bytes, size of the decoding state."""
import dataclasses

import jax.numpy as jnp

from effmodels.models import mtp, sharing
from effmodels.models.resolve import resolve
from effmodels.multimodal.base import Work


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

    Modules that predict further tokens count as parameters and in training, not in decoding. Weights that layers share count once; adding
    low-rank matrices to them, once per call and not per token, is in no FLOPs. Every place for an image is taken.
    """
    resolved = resolve(config)
    c, env = resolved.config, resolved.env
    state_dtype_bytes = jnp.dtype(c.compute_dtype).itemsize
    parts = [part.cls.cost(part.config, env, seq_len, state_dtype_bytes) for kind in resolved.layers for part in (kind.mixer, kind.channel)]
    norm_size = c.d_model * (2 if c.norm == "layernorm" else 1)
    per_layer = [_norms(kind, c) for kind in resolved.layers]
    norms = norm_size * (1 + sum(per_layer))
    table = c.vocab_size * c.d_model
    embedding = table * (1 if c.tie_embeddings else 2) + c.learned_positions * c.d_model
    head_flops = 2 * table
    borrowed, added = sharing.saved(resolved.layers, env, sharing.check(c.sharing))
    held = [0 if (name, i // 2) in borrowed else 1 for i, name in enumerate(("mixer", "channel") * c.num_layers)]
    norms += added - norm_size * sum(per_layer[i] for name, i in borrowed if name == "norms")
    ahead_params, ahead_active, ahead_flops = _ahead(resolved, seq_len, norm_size, head_flops)
    media = Work(0, 0.0) if resolved.media is None else resolved.media.work(c.d_model)
    params = sum(p.params * h for p, h in zip(parts, held)) + norms + embedding + ahead_params + media.params
    images = media.flops / seq_len + media.flops_per_token
    prefill = sum(p.flops for p in parts) / seq_len + head_flops + images
    return ModelCost(
        seq_len=seq_len,
        params=params,
        active_params=sum(p.active_params * h for p, h in zip(parts, held)) + norms + embedding + ahead_active + media.params,
        embedding_params=embedding,
        train_flops_per_token=3 * (prefill + ahead_flops),
        prefill_flops_per_token=prefill,
        dense_prefill_flops_per_token=sum(p.dense_flops for p in parts) / seq_len + head_flops + images,
        decode_flops_per_token=sum(p.decode_flops for p in parts) + head_flops + media.flops_per_token,
        param_bytes=params * jnp.dtype(c.param_dtype).itemsize,
        # The row's length, int32; of every image that is kept its index and its document.
        decode_state_bytes=sum(p.state_bytes for p in parts) + 4 + media.kept_values * state_dtype_bytes + media.kept_images * 8,
    )


def _norms(kind, config):
    """How many norms a layer has."""
    if kind.channel.cls.absent:
        return 2 if config.norm_position == "sandwich" else 1
    return 1 if (config.norm_position, config.residual) == ("post", "parallel") else 4 if config.norm_position == "sandwich" else 2


def _ahead(resolved, seq_len, norm_size, head_flops):
    """(parameters, active ones, FLOPs per token of training's forward pass) of the modules that predict further tokens."""
    c, ahead = resolved.config, mtp.check(resolved.config.mtp)
    if not ahead.depth:
        return 0, 0, 0.0
    kind, sequential = resolved.ahead, ahead.form == "sequential"
    parts = [part.cls.cost(part.config, resolved.env, seq_len) for part in (kind.mixer, kind.channel)]
    join = 2 * c.d_model**2 * sequential
    own = norm_size * (_norms(kind, c) + (3 if sequential else 1)) + join
    return (
        ahead.depth * (own + sum(p.params for p in parts)), ahead.depth * (own + sum(p.active_params for p in parts)),
        ahead.depth * (sum(p.flops for p in parts) / seq_len + 2 * join + head_flops),
    )  # fmt: skip

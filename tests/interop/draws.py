"""Weights of a tensor from its name alone, so that a reference keeps logits and no weights. RandomState's streams are frozen by numpy."""
import zlib

import numpy as np

ZERO_CENTRED = ("qwen3_next",)  # their norms multiply with one plus the weight, but for the one inside of a linear layer


def weights(name, shape, model_type=None):
    """float32 values of a size that keeps activations near one: matrices 1/sqrt(their last dim), norms near one, the rest small."""
    draw = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) < 2:
        zero = model_type in ZERO_CENTRED and "linear_attn" not in name and not name.endswith("dt_bias")
        base = 0.0 if zero else 1.0 if "norm" in name or "ln_" in name or name.endswith((".D", "dt_bias")) else 0.0
        return (base + 0.1 * draw).astype(np.float32) if name.endswith(("weight", "bias", "sinks")) or base else draw.astype(np.float32)
    if any(part in name for part in ("embed_tokens", "embed_in", "wte", "embeddings")):
        return draw.astype(np.float32)
    if "retention.q_proj" in name:
        draw = draw / 8  # so that sums of rows stay below one, where torchscale's parallel form divides by nothing
    return (draw / np.sqrt(shape[-1])).astype(np.float32)

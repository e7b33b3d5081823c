"""The Vision Transformer. Letters: B images, P patches, C values of a patch, E width, R layers."""
import dataclasses

import jax
from flax import nnx

from effmodels.config import ConfigError
from effmodels.layers.context import Ctx
from effmodels.layers.linear import dot
from effmodels.layers.norms import LayerNorm
from effmodels.layers.param import param, zeros
from effmodels.multimodal.base import Encoder, Work
from effmodels.multimodal.layers import Attention, feed_forward, feed_forward_count
from effmodels.parallel import stack
from effmodels.parallel.axes import shard


class ViT(Encoder):
    """Patch embedding, learned positions, pre-norm layers that see the whole image, a norm (arXiv:2010.11929); no class token."""

    @dataclasses.dataclass(frozen=True)
    class Config:
        image_size: int = 224  # pixels of a side
        patch: int = 16  # likewise
        channels: int = 3
        mean: tuple = (0.5,)  # of pixels in [0, 1], one number or one per channel: x -> (x - mean) / std
        std: tuple = (0.5,)
        width: int = 768
        num_layers: int = 12
        num_heads: int = 12
        hidden: int | None = None  # of the feed-forward layers; None: 4 width
        norm_eps: float = 1e-6

        @property
        def tokens(self):
            """Activations per frame."""
            return (self.image_size // self.patch) ** 2

        @property
        def patch_shape(self):
            """(patches of a frame, values of a patch)."""
            return self.tokens, self.patch**2 * self.channels

    @classmethod
    def check(cls, config):
        for field in ("image_size", "patch", "channels", "width", "num_layers", "num_heads"):
            if getattr(config, field) < 1:
                raise ConfigError(f"vit: expected {field} >= 1, got {getattr(config, field)}.")
        if config.image_size % config.patch:
            near = max(1, round(config.image_size / config.patch)) * config.patch
            raise ConfigError(f"vit: image_size={config.image_size} is not a multiple of patch={config.patch}; nearest: {near}.")
        if config.width % config.num_heads:
            valid = [n for n in range(1, config.width + 1) if config.width % n == 0 and config.width // n >= 8]
            raise ConfigError(f"vit: width={config.width} is not divisible by num_heads={config.num_heads}; valid: {valid}.")
        for field in ("mean", "std"):
            if len(getattr(config, field)) not in (1, config.channels):
                raise ConfigError(f"vit: expected {field} to have 1 or {config.channels} numbers, got {getattr(config, field)}.")

    def __init__(self, config, env, *, rngs):
        E, (P, C) = config.width, config.patch_shape
        self.embed = param(jax.random.normal, rngs.params(), (C, E), (None, "embed"), in_dims=(None,), dtype=env.param_dtype)
        self.bias = param(zeros, rngs.params(), (E,), ("norm",), in_dims=(), dtype=env.param_dtype)
        self.positions = param(jax.random.normal, rngs.params(), (P, E), (None, "embed"), in_dims=("embed",), dtype=env.param_dtype)
        keys = jax.random.split(rngs.params(), config.num_layers)
        self.layers = stack.stack(lambda key: Layer(config, env, rngs=nnx.Rngs(key)), keys)
        self.norm = LayerNorm(E, rngs=rngs, eps=config.norm_eps, param_dtype=env.param_dtype)

    def __call__(self, x_BPC, remat="none"):
        x_BPE = dot("BPC,CE->BPE", x_BPC, self.embed)
        x_BPE = shard(x_BPE + self.bias[...].astype(x_BPE.dtype) + self.positions[...].astype(x_BPE.dtype), "batch", None, "act_embed")
        x_BPE, _ = stack.scan(lambda layer, x, _: (layer(x), None), self.layers, x_BPE, remat=remat)
        return self.norm(x_BPE)

    @classmethod
    def work(cls, config):
        E, R, (P, C), hidden = config.width, config.num_layers, config.patch_shape, config.hidden or 4 * config.width
        matrices = 4 * E**2 + 2 * E * hidden
        layer = Attention.count(E, config.num_heads, E // config.num_heads, True) + feed_forward_count(E, hidden, True) + 4 * E
        return Work(R * layer + C * E + E + P * E + 2 * E, 2 * P * (C * E + R * matrices) + R * 4 * P * P * E)


class Layer(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config, env, *, rngs):
        E = config.width
        self.norm_attention, self.norm_mlp = (
            LayerNorm(E, rngs=rngs, eps=config.norm_eps, param_dtype=env.param_dtype) for _ in range(2)
        )
        self.attention = Attention(E, config.num_heads, E // config.num_heads, env, rngs=rngs, bias=True)
        self.mlp = feed_forward(E, config.hidden or 4 * E, "gelu_exact", env, rngs=rngs, bias=True)

    def __call__(self, x_BPE):
        h_BPE = self.norm_attention(x_BPE)
        x_BPE = x_BPE + self.attention(h_BPE, h_BPE)
        return x_BPE + self.mlp(self.norm_mlp(x_BPE), Ctx())[0]

"""The Perceiver resampler. Letters: B images, F frames, P activations of a frame, Z their width, M latents, E width, R layers."""
import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from effmodels.config import ConfigError
from effmodels.layers.context import Ctx
from effmodels.layers.linear import dot
from effmodels.layers.norms import LayerNorm
from effmodels.layers.param import param
from effmodels.multimodal.base import Resampler, Work
from effmodels.multimodal.layers import Attention, feed_forward, feed_forward_count
from effmodels.parallel import stack


class Perceiver(Resampler):
    """M learned latents attend to the activations of all frames and to themselves, layer by layer (Flamingo, arXiv:2204.14198, 3.1.1).

    Every frame has a learned embedding of its time; activations of another width are projected first.
    """

    @dataclasses.dataclass(frozen=True)
    class Config:
        latents: int = 64
        width: int = 1536
        num_layers: int = 6
        num_heads: int = 16
        head_dim: int = 128
        hidden: int | None = None  # of the feed-forward layers; None: 4 width
        max_frames: int = 8  # embeddings of time
        norm_eps: float = 1e-6

        @property
        def tokens(self):
            """Entries per image."""
            return self.latents

    @classmethod
    def check(cls, config):
        for field in ("latents", "width", "num_layers", "num_heads", "head_dim", "max_frames"):
            if getattr(config, field) < 1:
                raise ConfigError(f"perceiver: expected {field} >= 1, got {getattr(config, field)}.")

    def __init__(self, config, env, width, *, rngs):
        """width: of the activations."""
        self.config, E = config, config.width
        draw = (jax.random.normal, (None, "embed"), env.param_dtype)
        self.latents = param(draw[0], rngs.params(), (config.latents, E), draw[1], in_dims=("embed",), dtype=draw[2])
        self.times = param(draw[0], rngs.params(), (config.max_frames, E), draw[1], in_dims=("embed",), dtype=draw[2])
        if width != E:
            self.project = param(draw[0], rngs.params(), (width, E), draw[1], in_dims=(None,), dtype=draw[2])
        keys = jax.random.split(rngs.params(), config.num_layers)
        self.layers = stack.stack(lambda key: Layer(config, env, rngs=nnx.Rngs(key)), keys)
        self.norm = LayerNorm(E, rngs=rngs, eps=config.norm_eps, param_dtype=env.param_dtype)

    def __call__(self, x_BFPZ, remat="none"):
        B, F, P, Z = x_BFPZ.shape
        if F > self.config.max_frames:
            raise ValueError(f"perceiver: {F} frames, but max_frames={self.config.max_frames} embeddings of time.")
        x_BSE = x_BFPZ.reshape(B, F * P, Z)
        x_BSE = dot("BSZ,ZE->BSE", x_BSE, self.project) if Z != self.config.width else x_BSE
        x_BSE = x_BSE + jnp.repeat(self.times[...][:F], P, axis=0).astype(x_BSE.dtype)
        y_BME = jnp.broadcast_to(self.latents[...].astype(x_BSE.dtype), (B, *self.latents.shape))
        y_BME, _ = stack.scan(lambda layer, y, _: (layer(y, x_BSE), None), self.layers, y_BME, remat=remat)
        return self.norm(y_BME)

    @classmethod
    def work(cls, config, frames, patches, width):
        E, M, R, S, hidden = config.width, config.latents, config.num_layers, frames * patches, config.hidden or 4 * config.width
        inner = config.num_heads * config.head_dim
        layer = Attention.count(E, config.num_heads, config.head_dim, False) + feed_forward_count(E, hidden, False) + 6 * E
        project = width * E if width != E else 0
        flops = R * (4 * M * E * inner + 4 * (S + M) * E * inner + 4 * M * (S + M) * inner + 4 * M * E * hidden)
        return Work(R * layer + project + (M + config.max_frames) * E + 2 * E, flops + 2 * S * project)


class Layer(nnx.Module):
    """y + attention(norm(y), [norm(x); norm(y)]), then y + mlp(norm(y)), for latents y and activations x."""

    def __init__(self, config, env, *, rngs):
        E = config.width
        self.norm_media, self.norm_latents, self.norm_mlp = (
            LayerNorm(E, rngs=rngs, eps=config.norm_eps, param_dtype=env.param_dtype) for _ in range(3)
        )
        self.attention = Attention(E, config.num_heads, config.head_dim, env, rngs=rngs, bias=False)
        self.mlp = feed_forward(E, config.hidden or 4 * E, "relu2", env, rngs=rngs, bias=False)

    def __call__(self, y_BME, x_BSE):
        h_BME = self.norm_latents(y_BME)
        y_BME = y_BME + self.attention(h_BME, jnp.concatenate([self.norm_media(x_BSE), h_BME], axis=1))
        return y_BME + self.mlp(self.norm_mlp(y_BME), Ctx())[0]

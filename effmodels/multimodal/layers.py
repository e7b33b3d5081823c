"""What encoders and resamplers are made of: attention without order, and feed-forward layers of any width.

Letters: B rows, T queries, S keys, E width of queries, Z width of keys, N heads, H head dim.
"""
import functools

import jax
from flax import nnx

from effmodels.channel.mlp import MLP
from effmodels.layers.linear import dot
from effmodels.layers.param import param, zeros
from effmodels.mixers.base import Env
from effmodels.parallel import ops
from effmodels.parallel.axes import shard


class Attention(nnx.Module):
    """y = softmax(q k^T / sqrt(H)) v W_o, every query sees every key (arXiv:1706.03762)."""

    def __init__(self, width, num_heads, head_dim, env, *, rngs, bias):
        E, N, H = width, num_heads, head_dim
        self.implementation, self.bias = env.implementation, bias
        make = functools.partial(param, jax.random.normal, dtype=env.param_dtype)
        for name in ("q", "k", "v"):
            setattr(self, "w" + name, make(rngs.params(), (E, N, H), ("embed", "heads", "head_dim"), in_dims=("embed",)))
        self.wo = make(rngs.params(), (N, H, E), ("heads", "head_dim", "embed"), in_dims=("heads", "head_dim"))
        if bias:
            for name in ("q", "k", "v"):
                vector = param(zeros, rngs.params(), (N, H), ("heads", "head_dim"), in_dims=(), dtype=env.param_dtype)
                setattr(self, "b" + name, vector)
            self.bo = param(zeros, rngs.params(), (E,), ("norm",), in_dims=(), dtype=env.param_dtype)

    def __call__(self, x_BTE, z_BSE):
        """[B, T, E] of queries from x and keys and values from z."""
        q_BTNH, k_BSNH, v_BSNH = (
            self._plus(shard(dot("BTE,ENH->BTNH", a, getattr(self, "w" + name)), "batch", None, "act_heads", None), name)
            for a, name in ((x_BTE, "q"), (z_BSE, "k"), (z_BSE, "v"))
        )
        y_BTNH = ops.attention(q_BTNH, k_BSNH, v_BSNH, is_causal=False, implementation=self.implementation)
        return shard(self._plus(dot("BTNH,NHE->BTE", y_BTNH, self.wo), "o"), "batch", None, "act_embed")

    def _plus(self, y, name):
        return y + getattr(self, "b" + name)[...].astype(y.dtype) if self.bias else y

    @staticmethod
    def count(width, num_heads, head_dim, bias):
        """Parameters."""
        inner = num_heads * head_dim
        return 4 * width * inner + (3 * inner + width) * bias


def feed_forward(width, hidden, activation, env, *, rngs, bias):
    """An MLP of this width; call it with a Ctx."""
    return MLP(MLP.Config(hidden=hidden, activation=activation, bias=bias), Env(d_model=width, param_dtype=env.param_dtype), rngs=rngs)


def feed_forward_count(width, hidden, bias):
    """Parameters of a `feed_forward` whose activation has one input."""
    return 2 * width * hidden + (hidden + width) * bias

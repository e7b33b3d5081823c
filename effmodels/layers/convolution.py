"""Short causal convolution of every channel by itself (and swish), over the tokens of one document; over split rows too, and to decode.

Letters: B batch, T time, C channels (any number of dims), W taps, w = W - 1 tokens before.
"""
import jax
import jax.numpy as jnp
from flax import nnx

from effmodels.layers.param import param, zeros
from effmodels.parallel import halo, ops, options
from effmodels.parallel.axes import shards


class ShortConvolution(nnx.Module):
    """y_t = swish(sum over i < W of weight_i x_{t - w + i} (+ bias)): the last tap is the token itself. swish=False: the sum alone.

    A tap outside of the document, or on padding, is zero. Computed in float32 (float64 stays), returned in x's dtype.
    """

    def __init__(self, shape, dims, act_dims, *, rngs, width=4, bias=False, swish=True, param_dtype=jnp.float32):
        """shape: of the channels; dims, act_dims: their names in the parameter and in an activation."""
        self.width, self.shape, self.act_dims, self.swish = width, tuple(shape), tuple(act_dims), swish
        # No input dim: a tap is no linear map between features, which an optimiser of matrices would take it for.
        self.weight = param(_uniform, rngs.params(), (*shape, width), (*dims, None), in_dims=(), dtype=param_dtype)
        if bias:
            self.bias = param(zeros, rngs.params(), shape, dims, in_dims=(), dtype=param_dtype)

    def __call__(self, x_BTC, segment_ids=None):
        """The convolution of whole rows [B, T, *shape]; over a split row the ends of stretches go to their neighbours."""
        split, w = shards("seq") > 1, self.width - 1

        def local(x, weight, bias=None, segments=None):
            if not split:
                return self._rows(x, weight, bias, segments)
            layout, axis = options.current().layout, ops.seq_axes()
            extended = []
            for a in (x, segments):
                if a is not None:
                    a = halo.stretches(a, layout)
                    a = jnp.concatenate([halo.before(a, w, axis=axis), a], axis=2)
                    a = a.reshape(-1, *a.shape[2:])
                extended.append(a)
            return self._rows(extended[0], weight, bias, extended[1], before=w).reshape(x.shape)

        rows = ("batch", "seq", *self.act_dims)
        arrays = {"x": (x_BTC, rows), "weight": (self.weight[...], (*self.act_dims, None)), "segments": (segment_ids, ("batch", "seq"))}
        arrays["bias"] = (self.bias[...] if hasattr(self, "bias") else None, self.act_dims)
        return ops.run_sharded(local, arrays, rows)

    def init_state(self, batch, dtype):
        """The inputs before the first token, [B, w, *shape]."""
        return jnp.zeros((batch, self.width - 1, *self.shape), dtype)

    def prefill(self, x_BTC, last_BwC, valid_BT=None):
        """(y_BTC, last_BwC) after T more tokens; invalid ones are no taps, and y is unspecified there."""
        w, rank_BT = self.width - 1, None
        if valid_BT is not None:  # valid tokens first: a tap is so many valid tokens before, wherever they are in the chunk
            rank_BT = jnp.maximum(jnp.cumsum(valid_BT, axis=1) - 1, 0)
            x_BTC = _take(x_BTC, jnp.argsort(~valid_BT, axis=1, stable=True))
        full = jnp.concatenate([last_BwC.astype(x_BTC.dtype), x_BTC], axis=1)
        y_BTC = self._rows(full, self.weight[...], self.bias[...] if hasattr(self, "bias") else None, None, before=w)
        if valid_BT is None:
            return y_BTC, full[:, x_BTC.shape[1] :].astype(last_BwC.dtype)
        ends_Bw = jnp.sum(valid_BT, axis=1, dtype=jnp.int32)[:, None] + jnp.arange(w, dtype=jnp.int32)
        return _take(y_BTC, rank_BT), _take(full, ends_Bw).astype(last_BwC.dtype)

    def _rows(self, x_BTC, weight, bias, segments, before=0):
        """Rows whose first `before` tokens are only looked at; without them zeros come before."""
        w, wide = self.width - 1, jnp.promote_types(x_BTC.dtype, jnp.float32)
        T = x_BTC.shape[1] - before

        def shifted(a, back):
            if not before:
                return a if back == 0 else jnp.pad(a[:, : max(T - back, 0)], [(0, 0), (min(back, T), 0)] + [(0, 0)] * (a.ndim - 2))
            return jax.lax.slice_in_dim(a, w - back, w - back + T, axis=1)

        y, joined = 0.0, None if segments is None else shifted(segments, 0) != 0
        for back in range(self.width):
            tap = shifted(x_BTC, back).astype(wide)
            if segments is not None:
                there, here = shifted(segments, back), shifted(segments, 0)
                tap = jnp.where((joined & (there == here)).reshape(there.shape + (1,) * (tap.ndim - 2)), tap, 0)
                joined &= (there == here) | (there == 0)
            y = y + tap * weight[..., w - back].astype(wide)
        y = y if bias is None else y + bias.astype(wide)
        return (jax.nn.silu(y) if self.swish else y).astype(x_BTC.dtype)


def _take(x_BTC, index_BS):
    return jnp.take_along_axis(x_BTC, index_BS.reshape(index_BS.shape + (1,) * (x_BTC.ndim - 2)), axis=1)


def _uniform(key, shape, dtype):
    """Uniform with variance 1 / (3 W), the fan-in being the taps."""
    bound = shape[-1] ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)

"""What is measured: op, direction and shape, and the work that any implementation has to do.

B batch, T time, N heads, K kv heads, H head dim, P value dim; M rows, D in, F out, E experts; V vocab.
"""
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

BACKWARD_WORK = {"flash_attention": 2.5, "retention": 2.5, "grouped_matmul": 2.0, "linear_cross_entropy": 2.0}


@dataclasses.dataclass(frozen=True)
class Case:
    op: str
    direction: str  # "forward", or "backward": the gradient, and the forward pass that it needs
    shape: tuple  # of (letter or option, value)
    dtype: str = "bfloat16"

    @property
    def name(self):
        return f"{self.op} {self.direction} " + " ".join(f"{k}={v}" for k, v in self.shape)

    def flops(self):
        """Of the forward pass, or of forward and backward, as useful: the masked half of causal scores is not counted."""
        forward = _FLOPS[self.op](**dict(self.shape))
        return forward * (1 + BACKWARD_WORK[self.op] if self.direction == "backward" else 1)

    def bytes(self):
        """Every operand and result through memory once (backward: operands twice, cotangents and gradients once)."""
        once = sum(math.prod(x.shape) * x.dtype.itemsize for x in (*self.arguments(), self.result()))
        return once * (2 if self.direction == "backward" else 1)

    def arguments(self):
        """ShapeDtypeStructs of the operands, differentiable ones first."""
        return _ARGUMENTS[self.op](jnp.dtype(self.dtype), **dict(self.shape))

    def result(self):
        """ShapeDtypeStruct of the forward pass' result."""
        return _RESULTS[self.op](jnp.dtype(self.dtype), **dict(self.shape))


def _attention_flops(B, T, N, H, P=None, causal=1, window=None, **_):
    keys = T if not causal else (T + 1) / 2
    if window is not None:
        keys = min(window + 1, T) - min(window, T) * (min(window, T) + 1) / 2 / T
    return 2 * B * T * N * keys * (H + (P or H))


def _retention_flops(B, T, N, H, P=None, chunk=256, **_):
    P = P or H
    return 2 * B * T * N * (chunk / 2 * (H + P) + 2 * H * P)


_FLOPS = {
    "flash_attention": _attention_flops,
    "retention": _retention_flops,
    "grouped_matmul": lambda M, D, F, **_: 2 * M * D * F,
    "linear_cross_entropy": lambda T, D, V, **_: 2 * T * D * V,
}


def cases(op, direction=None):
    """The shapes that are published: each with both directions."""
    shapes = {
        "flash_attention": [
            dict(B=1, T=4096, N=16, H=128, causal=1),
            dict(B=1, T=16384, N=16, H=128, causal=1),
            dict(B=1, T=8192, N=16, H=128, causal=0),
            dict(B=1, T=16384, N=8, H=256, causal=1),
            dict(B=1, T=16384, N=32, H=64, causal=1),
            dict(B=1, T=32768, N=32, K=8, H=128, causal=1, window=4096),
        ],
        "retention": [dict(B=1, T=8192, N=96, H=128), dict(B=2, T=4096, N=16, H=256, P=512)],
        "grouped_matmul": [dict(M=8192, D=2048, F=8192, E=8), dict(M=8192, D=2048, F=8192, E=8, ragged=1)],
        "linear_cross_entropy": [dict(T=8192, D=2048, V=32768)],
    }
    directions = [direction] if direction else ["forward", "backward"]
    return [Case(op, d, tuple(s.items())) for s in shapes[op] for d in directions]


def group_sizes(M, E, ragged=0, **_):
    """Equal groups, or uneven ones that border inside tiles, one of them empty, and a few rows of no group."""
    if not ragged:
        return np.full(E, M // E, np.int32)
    weights = np.array([0 if e == 1 else 1 + (5 * e) % 7 for e in range(E)])
    return ((M - 37) * weights // weights.sum()).astype(np.int32)


def _attention_arguments(dtype, B, T, N, H, K=None, P=None, **_):
    kv = (B, T, K or N)
    return [jax.ShapeDtypeStruct(s, dtype) for s in ((B, T, N, H), (*kv, H), (*kv, P or H))]


def _retention_arguments(dtype, B, T, N, H, P=None, **_):
    x = [jax.ShapeDtypeStruct((B, T, N, size), dtype) for size in (H, H, P or H)]
    return [*x, jax.ShapeDtypeStruct((N,), jnp.float32)]


def _grouped_arguments(dtype, M, D, F, E, **_):
    return [jax.ShapeDtypeStruct((M, D), dtype), jax.ShapeDtypeStruct((E, D, F), dtype), jax.ShapeDtypeStruct((E,), jnp.int32)]


def _cross_entropy_arguments(dtype, T, D, V, **_):
    return [jax.ShapeDtypeStruct((T, D), dtype), jax.ShapeDtypeStruct((D, V), dtype), jax.ShapeDtypeStruct((T,), jnp.int32)]


_ARGUMENTS = {
    "flash_attention": _attention_arguments, "retention": _retention_arguments,
    "grouped_matmul": _grouped_arguments, "linear_cross_entropy": _cross_entropy_arguments,
}  # fmt: skip


_RESULTS = {
    "flash_attention": lambda dtype, B, T, N, H, P=None, **_: jax.ShapeDtypeStruct((B, T, N, P or H), dtype),
    "retention": lambda dtype, B, T, N, H, P=None, **_: jax.ShapeDtypeStruct((B, T, N, P or H), dtype),
    "grouped_matmul": lambda dtype, M, F, **_: jax.ShapeDtypeStruct((M, F), dtype),
    "linear_cross_entropy": lambda dtype, T, **_: jax.ShapeDtypeStruct((T,), jnp.float32),
}

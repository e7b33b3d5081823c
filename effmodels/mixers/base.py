"""The contract of a token mixer: a training form, a state, prefill, one step, and an exact cost. Letters: B batch, T time, D model."""
import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx


@dataclasses.dataclass(frozen=True)
class Env:
    """What a layer may know of the model around it."""

    d_model: int
    num_layers: int = 1
    norm_eps: float = 1e-6
    norm_offset: float = 0.0
    param_dtype: str = "float32"
    implementation: str | None = None
    mup_base_width: int | None = None


@dataclasses.dataclass(frozen=True)
class Cost:
    """Exact accounting of one layer. FLOPs are forward, a multiply-add is two, matmuls only.

    params / active_params: all, and those one token uses. flops: per sequence of `seq_len` tokens, useful ones (visible pairs only).
    dense_flops: what a program without masks and groups executes: every pair (of a chunk), every row against every expert; checked against
    the compiler. decode_flops: one token after `seq_len` others.
    state_bytes: per sequence, able to hold `seq_len` tokens.
    """

    params: int
    flops: float
    dense_flops: float
    decode_flops: float
    state_bytes: int = 0
    active_params: int | None = None

    def __post_init__(self):
        if self.active_params is None:
            object.__setattr__(self, "active_params", self.params)

    def plus_matrix(self, params, seq_len):
        """The cost with one more matrix that every token is multiplied with."""
        once, row = 2 * params, 2 * params * seq_len
        return dataclasses.replace(
            self, params=self.params + params, active_params=self.active_params + params, flops=self.flops + row,
            dense_flops=self.dense_flops + row, decode_flops=self.decode_flops + once,
        )  # fmt: skip


class TokenMixer(nnx.Module):
    """Base of all token mixers; a subclass has a frozen dataclass `Config`, and `__init__(self, config, env, *, rngs)`.

    `__call__` mixes whole rows. `prefill` and `step` carry a state (a registered dataclass) and must agree with `__call__`: invalid tokens
    write nothing, neither decay nor add to the state, and do not count. ctx.index_BT is the number of valid tokens before each one.
    """

    Config: Any = None
    neighbours_only = False  # True: over a split sequence a shard sends its last tokens on, and no state goes all the way
    layouts = ("contiguous",)  # orders of a split sequence (`parallel.layouts`) under which the mixer is right

    @classmethod
    def check(cls, config, env):
        """Raises ConfigError when the config does not fit the model; called before anything is built."""

    @classmethod
    def fills(cls, config, max_len):
        """Whether a state made for max_len tokens holds no more; False for a recurrent state and a whole ring, which never fill."""
        return True

    @classmethod
    def rolls_back(cls, config):
        """Whether the last tokens of a state are forgotten by counting them out: what they wrote is seen by no other token before the
        next ones overwrite it."""
        return False

    def __call__(self, x_BTD, ctx):
        raise NotImplementedError

    def init_state(self, batch, max_len, dtype):
        """The empty state of `batch` sequences of up to `max_len` tokens."""
        raise NotImplementedError

    def prefill(self, x_BTD, ctx, state, valid_BT=None):
        """(y_BTD, state) after T more tokens, any T, callable again; rows of y at invalid tokens are unspecified."""
        raise NotImplementedError

    def step(self, x_BD, ctx, state, active_B=None):
        """(y_BD, state) after one more token; by default a prefill of one."""
        valid_BT = None if active_B is None else active_B[:, None]
        y_BTD, state = self.prefill(x_BD[:, None], ctx, state, valid_BT)
        return y_BTD[:, 0], state

    @classmethod
    def cost(cls, config, env, seq_len, dtype_bytes=2):
        """The `Cost` of one layer."""
        raise NotImplementedError


def visible_pairs(length, window=None):
    """Number of (query, key) pairs of a causal row: key <= query, and at most `window` keys before it."""
    if window is None or window >= length - 1:
        return length * (length + 1) // 2
    return (window + 1) * (window + 2) // 2 + (length - window - 1) * (window + 1)


def all_valid(x_BTD, valid_BT):
    """valid_BT, or all true."""
    return jnp.ones(x_BTD.shape[:2], bool) if valid_BT is None else valid_BT

"""Sizes of the TPU kernels of retention, and what is computed beside them per token: log decays inside chunks and their gradient.

B batch, T time, N heads, n chunks, C tokens of a chunk. A block of tokens, one step of the grid, is K chunks; b counts (batch, head) pairs.
"""
import math
from typing import NamedTuple

import jax.numpy as jnp

from pallas_kernels import tpu

LOG2E = math.log2(math.e)
LEAST = -104.0  # exp() of less is zero in float32, and a sum over -inf tokens would be nan where it meets zero
_RESET = -300.0  # power of two in place of a decay where a new segment starts: nothing passes, and no mask is needed
CHUNK = 128  # the least matrix work at head dim 128, and the fewest decay factors per token
BLOCK = 1024  # tokens of a grid step, where they fit
_KEY_DIM, _VALUE_DIM = 256, 512  # largest sizes of one state on chip; larger ones are cut into several calls
# Rows of the decay array, in powers of two. From key s to query t: (COARSE_t - COARSE_s) + (FINE_READ_t - FINE_s).
COARSE, FINE, FINE_READ, WRITE, TOTAL, FINE_TOTAL, ROWS = 0, 1, 2, 3, 4, 5, 8
PADDING, REAL, STARTS = 0, 1, 2  # kinds of tokens: padding neither decays nor writes; one that starts a segment forgets what was before


class Plan(NamedTuple):
    """What a kernel is compiled for. Hashable."""
    rows: int  # (batch, group of heads) pairs: the arrays are [rows, T, lanes]
    time: int
    together: int  # heads of a group: several narrow ones share the 128 lanes of a register
    groups: int  # of heads: a constant decay is that of row % groups
    H: int
    P: int
    C: int  # tokens of a chunk
    K: int  # chunks of a block
    U: int  # rows side by side in one step of the grid: more than one if each is a single short block
    scale: float
    by_token: bool  # decay given per token, or made so by segments

    @property
    def block(self):
        return self.C * self.K

    @property
    def blocks(self):
        return -(-self.time // self.block)

    @property
    def key_lanes(self):
        return self.together * self.H

    @property
    def value_lanes(self):
        return self.together * self.P

    @property
    def log2_scale(self):
        return math.log2(self.scale) if self.scale else -math.inf

    def valid(self, block, chunk):
        """Tokens of a chunk that exist."""
        return min(max(self.time - (block * self.K + chunk) * self.C, 0), self.C)


def chunk_tokens(T, chunk_size):
    """Tokens of a chunk: the caller's number rounded up to a multiple of 128 and at most 512; a power of two from 16 for short inputs."""
    C = min(tpu.round_up(chunk_size or CHUNK, 128), 512)
    return C if T > 64 else max(16, 1 << (T - 1).bit_length())


def sizes(T, rows, groups, key_lanes, value_lanes, itemsize, chunk_size, together=1):
    """(C, K, U) of a Plan, so that the backward kernel fits: seven blocks of tokens and four states, twice, and what is kept by chunk.

    A float32 block is smaller: its matrix work is six times as much, and the code of unrolled chunks takes long to compile.
    """
    C = chunk_tokens(T, chunk_size if together <= 2 else min(chunk_size or CHUNK, 256))  # each head has tables of C x C
    state, room = 4 * key_lanes * value_lanes, 0.7 * tpu.chip().vmem
    largest = BLOCK if itemsize == 2 else BLOCK // 4 if key_lanes + value_lanes <= 256 else BLOCK // 8

    def fits(K, U):
        tokens = itemsize * K * C * (4 * key_lanes + 3 * value_lanes)
        tables = 4 * C * (2 * together * C + 2 * key_lanes + 4 * 128)
        return U * (8 * state + K * state * itemsize // 4 + 2 * tokens + tables) <= room

    K = min(max([k for k in (8, 4, 2, 1) if k * C <= largest and fits(k, 1)], default=1), -(-T // C))
    if K * C < T:
        return C, K, 1
    side = 16 if C <= 64 else max(8 // K, 1)
    return C, K, max(u for u in (1, 2, 4, 8, 16) if u == 1 or (u <= side and groups % u == 0 and 4 * u <= rows and fits(K, u)))


def parts(H, P):
    """How many calls share a state that is too large for the chip: (along H, along P)."""
    return -(-H // _KEY_DIM), -(-P // _VALUE_DIM)


def heads_together(N, H, P):
    """How many heads share the lanes of a register: most of it would be padding if each had its own."""
    return max(G for G in range(1, 9) if N % G == 0 and (G == 1 or G * max(H, P) <= 128))


def decay_rows(log_decay, kind_BT, plan):
    """The decay array [rows, heads together, ROWS, tokens] of log decays [N] or [B,T,N] and kinds of tokens [B,T] or None.

    Sums are taken inside chunks and in two parts: the coarse one counts whole multiples of a power of two, exactly, so a strong decay
    beside weak ones costs them no digits.
    """
    C, (B, T) = plan.C, kind_BT.shape if kind_BT is not None else log_decay.shape[:2]
    N, tokens = log_decay.shape[-1], plan.blocks * plan.block
    g_BTN = jnp.broadcast_to(log_decay * LOG2E, (B, T, N))
    real = True
    if kind_BT is not None:
        kind_BT1 = kind_BT[..., None]
        g_BTN = jnp.where(kind_BT1 == REAL, g_BTN, jnp.where(kind_BT1 == STARTS, _RESET, 0.0))
        real = jnp.pad(kind_BT != PADDING, ((0, 0), (0, tokens - T))).reshape(B, 1, -1, C)
    g_BNnC = jnp.pad(g_BTN.swapaxes(1, 2), ((0, 0), (0, 0), (0, tokens - T))).reshape(B, N, -1, C)
    unit = 2.0 ** (math.ceil(math.log2(-_RESET * C)) - 24)
    coarse = jnp.round(g_BNnC / unit) * unit
    up_to = jnp.tril(jnp.ones((C, C), jnp.float32))
    coarse, fine = (jnp.einsum("bnks,ts->bnkt", x, up_to, precision="highest") for x in (coarse, g_BNnC - coarse))
    read = coarse + fine
    rows = {
        COARSE: coarse,
        FINE: jnp.where(real, fine, jnp.inf),
        FINE_READ: jnp.where(real, fine + plan.log2_scale, -jnp.inf),
        WRITE: jnp.where(real, (coarse[..., -1:] - coarse) + (fine[..., -1:] - fine), -jnp.inf),
        TOTAL: jnp.broadcast_to(coarse[..., -1:], read.shape),
        FINE_TOTAL: jnp.broadcast_to(fine[..., -1:], read.shape),
    }
    rows = [rows.get(r, jnp.zeros_like(read)).reshape(B * N, tokens) for r in range(ROWS)]
    return jnp.stack(rows, axis=1).reshape(plan.rows, plan.together, ROWS, tokens)


def decay_gradient(rows, log_decay, kind_BT, plan):
    """d log_decay, in its shape, from what the backward kernel writes: one number for a head, or three rows [..., >= 3, tokens].

    dg_t sums w(u, s) over all u >= t > s: e_u = (pairs that u reads) - (pairs that u wrote) + (u reads the state before the chunk),
    f_s = (s reaches the state after the chunk), z = (the state before reaches the state after), each inside its own chunk.
    """
    N, T, C = log_decay.shape[-1], plan.time, plan.C
    B = plan.rows // plan.groups
    if not plan.by_token:
        return rows[..., 0, 0].reshape(B, N).sum(0)
    pad = -T % C
    rows = rows.reshape(-1, *rows.shape[-2:])
    e, f, z = (jnp.pad(rows[:, i, :T], ((0, 0), (0, pad))).reshape(B, N, -1, C) for i in range(3))
    from_here = jnp.triu(jnp.ones((C, C), jnp.float32))
    later = jnp.einsum("bnku,tu->bnkt", e, from_here, precision="highest")
    earlier = jnp.einsum("bnks,ts->bnkt", f, 1.0 - from_here, precision="highest")
    dg_BTN = (later + earlier + z).reshape(B, N, -1)[..., :T].swapaxes(1, 2)
    if kind_BT is not None:
        dg_BTN = jnp.where(kind_BT[..., None] == REAL, dg_BTN, 0.0)
    return dg_BTN if log_decay.ndim == 3 else dg_BTN.sum((0, 1))

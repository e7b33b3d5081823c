"""Digests of arrays that tell a flipped bit from the array that was saved, whatever mesh or grouping holds it.

digest(w) = sum_i w_i r(i) mod 2^64 over the elements' bit patterns w_i in row-major order, r(i) odd and pseudo-random. An odd factor
makes every change of a single element visible for certain, and of several but for about one chance in 2^32. A sum needs no order, so
the shards of an array add up on their devices; a stacked array gives one digest per layer. No defence against a forger.
"""
import concurrent.futures
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

_BLOCK = 1 << 16
_A, _B = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93


def digests(arrays, stacked):
    """(name -> uint64 digest, or [L] of them; name -> number of values that are not finite, likewise).

    arrays: name -> jax.Array; stacked: names whose first dim is of layers. On CPU it reads the arrays where they are, on other devices it
    reduces them there; both give the same numbers.
    """
    on_host = {n for n, x in arrays.items() if x.is_fully_addressable and all(d.platform == "cpu" for d in x.sharding.device_set)}
    found = {}
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        jobs = {n: pool.submit(host_digest, arrays[n], n in stacked) for n in on_host}
        rest = {n: x for n, x in arrays.items() if n not in on_host}
        if rest:
            with jax.enable_x64(True):
                found = jax.device_get(_device_digests(rest, tuple(sorted(n for n in rest if n in stacked))))
        found |= {n: job.result() for n, job in jobs.items()}
    return {n: found[n][0] for n in arrays}, {n: found[n][1] for n in arrays}


def host_digest(x, stacked):
    """(digest, non-finite count) of one array by numpy, block by block and without a copy of it."""
    x = np.asarray(x)
    if not stacked:
        return _digest_of_one(x)
    pairs = [_digest_of_one(layer) for layer in x]
    return np.array([d for d, _ in pairs], np.uint64), np.array([n for _, n in pairs], np.uint32)


def device_digest(x, stacked):
    """The same by jax, to be traced with 64-bit types enabled."""
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint64)
    core = x.shape[1:] if stacked else x.shape
    index, stride = jnp.zeros(core, jnp.uint64), 1
    for d in reversed(range(len(core))):
        index += jax.lax.broadcasted_iota(jnp.uint64, core, d) * np.uint64(stride)
        stride *= core[d]
    factor = _mix(index % np.uint64(_BLOCK), _A, jnp) * _mix(index // np.uint64(_BLOCK), _B, jnp)
    dims = tuple(range(1 if stacked else 0, x.ndim))
    is_float = jnp.issubdtype(x.dtype, jnp.inexact)
    bad = jnp.sum(~jnp.isfinite(x), dims, dtype=jnp.uint32) if is_float else jnp.zeros(x.shape[: 1 if stacked else 0], jnp.uint32)
    return jnp.sum(words * factor, dims, dtype=jnp.uint64), bad


@functools.partial(jax.jit, static_argnums=1)
def _device_digests(arrays, stacked):
    return {n: device_digest(x, n in stacked) for n, x in arrays.items()}


def _digest_of_one(x):
    x = np.ascontiguousarray(x)
    words = x.reshape(-1).view(f"uint{8 * x.dtype.itemsize}")
    values = x.reshape(-1) if jnp.issubdtype(x.dtype, jnp.inexact) else None
    low, total, bad = _low_factors(), 0, 0
    for b in range(math.ceil(words.size / _BLOCK)):
        block = words[b * _BLOCK:(b + 1) * _BLOCK]
        part = int(np.einsum("i,i->", block, low[:block.size], dtype=np.uint64, casting="safe"))
        total += part * int(_mix(np.array([b], np.uint64), _B, np)[0])
        if values is not None:
            finite = np.isfinite(values[b * _BLOCK:(b + 1) * _BLOCK])
            bad += finite.size - int(np.count_nonzero(finite))
    return np.uint64(total % (1 << 64)), np.uint32(bad)


@functools.cache
def _low_factors():
    return _mix(np.arange(_BLOCK, dtype=np.uint64), _A, np)


def _mix(i, constant, xp):
    """An odd pseudo-random 64-bit number for each index (a multiply-xorshift hash)."""
    z = (i + xp.uint64(1)) * xp.uint64(constant)
    z = (z ^ (z >> xp.uint64(32))) * xp.uint64(_B)
    return z ^ (z >> xp.uint64(29)) | xp.uint64(1)

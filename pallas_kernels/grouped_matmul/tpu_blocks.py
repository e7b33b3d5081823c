"""Sizes of the blocks of the TPU kernels, from what fits the memory of the chip.

A grid step should be a few thousand cycles of matmul (its own cost is a few hundred) and need less memory traffic than that: blocks of
512 x 1024 x 1024, half of it where the matrix units are four times as fast for the same memory (doubled rows and columns there).
"""
import numpy as np

from pallas_kernels.tpu import LANES, chip, round_up

SUB = 128  # rows of a sub-tile: a matrix unit takes as long to load its 128 rows of weights as to multiply 128 rows by them


def split(size, most, parts=1):
    """The block of a dim: at most `most`, a multiple of the matrix unit, the number of blocks a multiple of `parts` where it can be."""
    unit = chip().mxu if size > chip().mxu else LANES
    number = round_up(-(-size // most), parts) if size >= parts * unit else 1
    return min(size, round_up(-(-size // number), unit))


def row_blocks(M, C, O, x_bytes, w_bytes):
    """(rows, contracted, out) of a step of the rows kernel: all of the contraction if that leaves 256 rows and 512 columns."""
    most = _most(x_bytes)
    whole = [(most[0] // a, C, most[2] // b) for a in (1, 2) for b in (1, 2)]
    for blocks in [*(blocks for blocks in whole if np.prod(blocks) <= np.prod(most)), *_shrinking(most)]:
        rows, c, o = _rows(M, blocks[0]), split(C, blocks[1]), split(O, blocks[2], chip().cores)
        converted = c * o * x_bytes if w_bytes < x_bytes else 0
        if 2 * (rows * c * x_bytes + c * o * w_bytes + rows * o * x_bytes) + rows * o * 4 + converted <= _budget():
            return rows, c, o
    raise AssertionError("the smallest blocks fit every chip")


def matrix_blocks(M, K, N, x_bytes, w_bytes):
    """(rows, K, N) of a step of the matrices kernel. w_bytes: of all that is read or written per element of rhs."""
    most = _most(x_bytes)
    for blocks in _shrinking((most[1], min(most[0], 512), most[2])):
        k, rows, n = split(K, blocks[0]), _rows(M, blocks[1]), split(N, blocks[2], chip().cores)
        if 2 * (rows * (k + n) * x_bytes + k * n * w_bytes) + 4 * k * n <= _budget():
            return rows, k, n
    raise AssertionError("the smallest blocks fit every chip")


def vmem_limit():
    """For the compiler, whose default is 16 MiB on every chip; None where that is all there is."""
    return None if chip().vmem <= 2**24 else chip().vmem * 7 // 8


def _most(x_bytes):
    if x_bytes == 4:  # six passes of the matrix units, and a program six times as long
        return 256, 512, 512
    return (1024, 1024, 2048) if chip().mxu == 256 else (512, 1024, 1024)


def _budget():
    return chip().vmem * 12 // 16  # the rest is for what the compiler spills


def _rows(M, most):
    if M <= SUB:
        return round_up(M, 16)
    return min(most, round_up(M, SUB))


def _shrinking(blocks):
    """The blocks, then with the second halved, then the last, then all of them, and so on."""
    a, b, c = blocks
    while a >= LANES:
        yield a, b, c
        yield a, b // 2, c
        yield a, b // 2, c // 2
        a, b, c = a // 2, b // 2, c // 2

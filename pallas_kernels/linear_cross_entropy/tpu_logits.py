"""The two TPU kernels of the linear cross entropy: both make the logits tile by tile, neither writes them.

  statistics   logsumexp and label logit of every token, in one pass over the vocabulary (online softmax)
  dlogits      the gradient of the logits of some columns of the vocabulary, from the logsumexp of the first pass

Grid (tokens, vocabulary, model): token blocks are split over the cores of a chip. What is kept per token is kept per token and lane: the
maximum and the sum of lane l run over the columns l, l + 128, ...; only the last step looks across lanes. So the hot loop has no
reduction across lanes and no broadcast: per 1,024 logits a maximum, an exponential, a sum, and a compare and select for the label.

T tokens, D model, V vocab, J columns of one call of dlogits; L lanes.
"""
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu import LANES, chip, precision, round_up

_LEAST = float(jnp.finfo(jnp.float32).min)  # instead of -inf, whose difference with itself is nan
SLICE = 256  # columns multiplied at a time: the matrix units work on one slice while the vector unit is at the one before


def blocks(T, D, V, item_bytes, out_bytes=0):
    """(tokens, model, vocab) of a grid step: the first of a list that fits.

    Large, so that the weights, which every block of tokens reads again, take less time than the matmul; but the program of a step grows
    with them, six times as fast in float32, which takes six passes of the matrix units.
    """
    if item_bytes == 4:
        shapes = [(256, D if D <= 1024 else 512, 256), (256, 256, 256)]
    else:
        first = [(1024, D, 256), (1024, 2048, 256)] if chip().mxu == 256 else [(512, D, 512)]
        shapes = [*first, (512, 1024, 512 if D % LANES else 1024), (512, 1024, 512), (256, 512, 256)]
    for tokens, d, v in shapes:
        tokens, d, v = min(tokens, round_up(T, LANES)), _equal_parts(D, d), _vocab_block(V, v)
        used = 2 * (tokens * d + d * v) * item_bytes + tokens * v * (4 + 2 * out_bytes) + 6 * tokens * LANES * 4
        if d * tokens <= 2**21 and used <= chip().vmem * 12 // 16:
            return tokens, d, v
    raise AssertionError("the smallest blocks fit every chip")


def _vocab_block(V, most):
    """`most`, or near it what divides V, which saves the masks of the last block and a chunk of its own for it."""
    for block in (most, most * 5 // 4, most * 3 // 4, most // 2):
        if V % block == 0 and block % LANES == 0 and block >= 256:
            return block
    return min(most, round_up(V, LANES))


def _equal_parts(D, most):
    return D if D <= most else min(D, round_up(-(-D // -(-D // most)), LANES))


def statistics(x_TD, w, labels_T, soft_cap, w_layout, *, interpret):
    """(logsumexp [T], logit of the label [T]) float32."""
    (T, D), V = x_TD.shape, w.shape[w_layout.index("V")]
    bt, bd, bv = blocks(T, D, V, x_TD.dtype.itemsize)
    row = pl.BlockSpec((1, bt), lambda t, v, d: (0, t))
    kernel = functools.partial(_statistics_kernel, D=D, V=V, soft_cap=soft_cap, w_layout=w_layout)
    padded = round_up(T, bt)
    lse, label_logit = pl.pallas_call(
        kernel,
        grid=(padded // bt, pl.cdiv(V, bv), pl.cdiv(D, bd)),
        in_specs=[pl.BlockSpec((bt, bd), lambda t, v, d: (t, d)), _w_spec(w_layout, bd, bv, lambda t, v, d: (d, v)), row],
        out_specs=[row, row],
        out_shape=[jax.ShapeDtypeStruct((1, padded), jnp.float32)] * 2,
        scratch_shapes=[pltpu.VMEM((bt, bv) if D > bd else (8, LANES), jnp.float32), pltpu.VMEM((bt, LANES), jnp.int32),
                        *[pltpu.VMEM((bt, LANES), jnp.float32)] * 3],
        compiler_params=_compiler_params(),
        cost_estimate=pl.CostEstimate(flops=2 * T * D * V, transcendentals=T * V, bytes_accessed=padded // bt * w.nbytes + x_TD.nbytes),
        interpret=interpret,
        name="linear_cross_entropy",
    )(x_TD, w, _padded(_inside(labels_T, V), padded))
    return lse[0, :T], label_logit[0, :T]


def dlogits(x_TD, w, labels_T, lse_T, dlse_T, dlabel_T, first, J, soft_cap, w_layout, *, interpret):
    """d logits [T,J] in the dtype of x, of the columns [first, first + J) of the vocabulary. first: traced, a multiple of the vocab block.

    J must be a multiple of the vocab block, or end at V.
    """
    (T, D), V = x_TD.shape, w.shape[w_layout.index("V")]
    bt, bd, bv = blocks(T, D, V, x_TD.dtype.itemsize, x_TD.dtype.itemsize)
    padded, last = round_up(T, bt), pl.cdiv(V, bv) - 1
    row = pl.BlockSpec((1, bt), lambda t, v, d, first: (0, t))
    kernel = functools.partial(_dlogits_kernel, D=D, V=V, soft_cap=soft_cap, w_layout=w_layout)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=(padded // bt, pl.cdiv(J, bv), pl.cdiv(D, bd)),
            in_specs=[pl.BlockSpec((bt, bd), lambda t, v, d, first: (t, d)),
                      _w_spec(w_layout, bd, bv, lambda t, v, d, first: (d, jnp.minimum(first[0] + v, last))), row, row, row, row],
            out_specs=pl.BlockSpec((bt, bv), lambda t, v, d, first: (t, v)),
            scratch_shapes=[pltpu.VMEM((bt, bv) if D > bd else (8, LANES), jnp.float32), pltpu.VMEM((bt, LANES), jnp.int32),
                            *[pltpu.VMEM((bt, LANES), jnp.float32)] * 3]),
        out_shape=jax.ShapeDtypeStruct((T, J), x_TD.dtype),
        compiler_params=_compiler_params(),
        cost_estimate=pl.CostEstimate(flops=2 * T * D * J, transcendentals=T * J,
                                      bytes_accessed=padded // bt * D * J * w.dtype.itemsize + x_TD.nbytes + T * J * x_TD.dtype.itemsize),
        interpret=interpret,
        name="linear_cross_entropy_dlogits",
    )((first // bv).astype(jnp.int32).reshape(1), x_TD, w, _padded(_inside(labels_T, V), padded),
      *(_padded(x.astype(jnp.float32), padded) for x in (lse_T, dlse_T, dlabel_T)))


def _w_spec(w_layout, bd, bv, index):
    if w_layout == "DV":
        return pl.BlockSpec((bd, bv), index)
    return pl.BlockSpec((bv, bd), lambda *grid: index(*grid)[::-1])


def _compiler_params():
    return pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary"),
                                vmem_limit_bytes=None if chip().vmem <= 2**24 else chip().vmem * 7 // 8)


def _inside(labels_T, V):
    """Labels outside the vocabulary become -1, which no column equals."""
    return jnp.where((labels_T >= 0) & (labels_T < V), labels_T, -1).astype(jnp.int32)


def _padded(x_T, length):
    return jnp.pad(x_T, (0, length - x_T.shape[0]))[None]


# Kernels.


def _over_slices(x_ref, w_ref, acc_ref, D, w_layout, use):
    """Adds this step's part of the model dim to the logits; on the last step calls use(first column, logits [bt, columns]) per slice."""
    d, steps = pl.program_id(2), pl.num_programs(2)
    bd, bv = x_ref.shape[1], w_ref.shape[w_layout.index("V")]

    def part(columns, left):
        x, w = x_ref[...], w_ref[:, columns] if w_layout == "DV" else w_ref[columns, :]
        if left < bd:  # what lies past the arrays may be nan, on both sides
            axis = w_layout.index("D")
            x = jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) < left, x, 0)
            w = jnp.where(jax.lax.broadcasted_iota(jnp.int32, w.shape, axis) < left, w, 0)
        dims = (((1,), (w_layout.index("D"),)), ((), ()))
        return jax.lax.dot_general(x, w, dims, precision=precision(x.dtype), preferred_element_type=jnp.float32)

    slices = [slice(c, min(c + SLICE, bv)) for c in range(0, bv, SLICE)]
    if D <= bd:
        for columns in slices:
            use(columns.start, part(columns, D))
        return

    @pl.when(d < steps - 1)
    def _():
        for columns in slices:
            acc_ref[:, columns] = jnp.where(d == 0, 0.0, acc_ref[:, columns]) + part(columns, bd)

    @pl.when(d == steps - 1)
    def _():
        for columns in slices:
            use(columns.start, acc_ref[:, columns] + part(columns, D - D // bd * bd if D % bd else bd))


def _by_lanes(logits):
    """[(offset, [bt, L])] of the groups of 128 columns."""
    return [(c, logits[:, c : c + LANES]) for c in range(0, logits.shape[1], LANES)]


def _to_rows(x_ref):
    """[1, bt] as [bt, L]: each value in every lane of its row."""
    return jnp.broadcast_to(x_ref[...], (LANES, x_ref.shape[1])).T


def _ahead(labels_ref):
    """label - lane: equals the number of the first column of a group of 128 exactly in the label's lane."""
    rows = _to_rows(labels_ref)
    return rows - jax.lax.broadcasted_iota(jnp.int32, rows.shape, 1)


def _in_vocabulary(shape, column, V):
    return jax.lax.broadcasted_iota(jnp.int32, shape, 1) < V - column


def _statistics_kernel(x_ref, w_ref, labels_ref, lse_ref, label_logit_ref, acc_ref, ahead_ref, max_ref, sum_ref, label_ref, *, D, V,
                       soft_cap, w_layout):
    v, d = pl.program_id(1), pl.program_id(2)
    bv = w_ref.shape[w_layout.index("V")]

    @pl.when((v == 0) & (d == 0))
    def _():
        ahead_ref[...] = _ahead(labels_ref)
        max_ref[...] = jnp.full_like(max_ref, _LEAST)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        label_ref[...] = jnp.zeros_like(label_ref)

    def use(first, logits):
        if soft_cap is not None:
            logits = soft_cap * jnp.tanh(logits / soft_cap)
        groups = [(v * bv + first + c, x) for c, x in _by_lanes(logits)]
        if V % bv:
            groups = [(c, jnp.where(_in_vocabulary(x.shape, c, V), x, -jnp.inf)) for c, x in groups]
        before = max_ref[...]
        top = functools.reduce(jnp.maximum, [x for _, x in groups], before)
        max_ref[...] = top
        sum_ref[...] = sum_ref[...] * jnp.exp(before - top) + sum(jnp.exp(x - top) for _, x in groups)
        label_ref[...] += sum(jnp.where(ahead_ref[...] == c, x, 0.0) for c, x in groups)

    _over_slices(x_ref, w_ref, acc_ref, D, w_layout, use)

    @pl.when((v == pl.num_programs(1) - 1) & (d == pl.num_programs(2) - 1))
    def _():
        max_LT = max_ref[...].T
        top = max_LT.max(0, keepdims=True)
        lse_ref[...] = top + jnp.log((sum_ref[...].T * jnp.exp(max_LT - top)).sum(0, keepdims=True))
        label_logit_ref[...] = label_ref[...].T.sum(0, keepdims=True)


def _dlogits_kernel(first_ref, x_ref, w_ref, labels_ref, lse_ref, dlse_ref, dlabel_ref, out_ref, acc_ref, ahead_ref, *stats_refs, D, V,
                    soft_cap, w_layout):
    v, d = pl.program_id(1), pl.program_id(2)
    bv = w_ref.shape[w_layout.index("V")]
    vocab_block = first_ref[0] + v

    @pl.when((v == 0) & (d == 0))
    def _():
        ahead_ref[...] = _ahead(labels_ref)
        for to_ref, from_ref in zip(stats_refs, (lse_ref, dlse_ref, dlabel_ref)):
            to_ref[...] = _to_rows(from_ref)

    def use(first, logits):
        lse, dlse, dlabel = (ref[...] for ref in stats_refs)
        for c, x in _by_lanes(logits):
            if soft_cap is not None:
                t = jnp.tanh(x / soft_cap)
                x = soft_cap * t
            column = vocab_block * bv + first + c
            dx = dlse * jnp.exp(x - lse) + jnp.where(ahead_ref[...] == column, dlabel, 0.0)
            if soft_cap is not None:
                dx = dx * (1.0 - t * t)
            if V % bv:
                dx = jnp.where(_in_vocabulary(dx.shape, column, V), dx, 0.0)
            out_ref[:, first + c : first + c + LANES] = dx.astype(out_ref.dtype)

    _over_slices(x_ref, w_ref, acc_ref, D, w_layout, use)

"""The one GPU kernel of retention: a scan over chunks whose state never leaves the chip. Forward and all gradients are calls of it.

B batch, T time, N heads, H head dim of x and y, P dim of z and out, C tokens of a chunk, n chunks; `gpu_plan` says how they are shared out.

  out_r = scale sum_c pair(r, c) (x_r y_c) z_c + reads_r x_r S,     S <- keeps S + sum_c writes_c y_c^T z_c

with r and c of one chunk, c <= r (forward) or c >= r (back in time). A computing warpgroup owns 64 columns of z of one head: it holds
their state, transposed to [64, H], in float32 registers, walks over all chunks in order and writes its 64 columns of each. The
warpgroups of a block share a ring of tiles that one more keeps full by TMA, and nothing else: what one waits for (a product, an
exponential), the other hides. Per chunk there are two batches of wgmma: x y^T and x S, then pair z and z^T y.
The operands of wgmma are 16-bit: the state is rounded for the read (x S), never for the sum over time.
"""
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import gpu
from pallas_kernels.retention import gpu_plan
from pallas_kernels.retention.gpu_plan import TABLE_ROWS, TILE, C

PAIR_ROW, PAIR_COLUMN, READS, WRITES, KEEPS = range(TABLE_ROWS)  # of a chunk's table: two exponents of 2, then factors


def scan(x, y, z, table, initial, *, scale, reverse, interpret, joined=None):
    """(out [B,T,N,P] in the dtype of x, final state [B,N,H,P] float32, None).

    With `joined` = (w [B,T,N,P], None) the last is a pair: out_t w_t of every token before out is rounded, [B,N,n,C] float32, and the
    rounded state before each chunk, for a second scan, back in time and of the same dims: joined = (w, states). Its pair ends with, [B,N,n]
    float32, the product of those states with its own state after (in time: before) the same chunk, summed over H and P.

    Args:
      x, y: [B,T,N,H]; z: [B,T,N,P], same 16-bit dtype, T a multiple of 8, H and P of 64.
      table: float32 [1,N,2,5,C] for a decay that is the same in every chunk (of whole chunks, of the last one), or [B,N,n,5,C].
      initial: float32 [B,N,H,P] or None for zeros; with `reverse` it is what comes after the last token.
    """
    (B, T, N, H), P = x.shape, z.shape[-1]
    plan = gpu_plan.plan(B, T, N, H, P, joined is not None)
    static = (plan, scale, reverse, interpret)
    if plan.slices == 1:
        return _call(static, x, y, z, table, initial, joined)
    # Too few heads for the chip: the slices of a sequence run side by side, each from the state that those before it leave.
    s = plan.slices
    cut = lambda a: a.reshape(B * s, T // s, N, -1)  # noqa: E731
    x, y, z, joined = cut(x), cut(y), cut(z), None if joined is None else (cut(joined[0]), joined[1])
    if table.shape[2] == 2:  # a slice has at least 8 chunks
        kept = table[:, None, :, 0, KEEPS, 0] ** (T // s // C)
    else:
        table = table.reshape(B, N, s, -1, TABLE_ROWS, C).swapaxes(1, 2)
        kept = table[..., KEEPS, 0].prod(-1)
        table = table.reshape(B * s, N, -1, TABLE_ROWS, C)
    _, alone, _ = _call(static, None, y, z, table, None)
    before = _before(alone.reshape(B, s, N, H, P), jnp.broadcast_to(kept, (B, s, N)), initial, reverse)
    out, final, extra = _call(static, x, y, z, table, before.reshape(B * s, N, H, P), joined)
    if joined is not None:
        whole = lambda a: a.reshape(B, s, N, -1, *a.shape[3:]).swapaxes(1, 2).reshape(B, N, -1, *a.shape[3:])  # noqa: E731
        extra = (whole(extra[0]), extra[1] if joined[1] is None else whole(extra[1]))
    return out.reshape(B, T, N, P), final.reshape(B, s, N, H, P)[:, 0 if reverse else -1], extra


def _before(alone, kept, initial, reverse):
    """The state that each slice starts from: alone [B,slices,N,H,P] from zero, kept [B,slices,N] how much of an earlier one passes."""

    def step(state, one):
        alone_BNHP, kept_BN = one
        return kept_BN[..., None, None] * state + alone_BNHP, state

    start = jnp.zeros_like(alone[:, 0]) if initial is None else initial
    return lax.scan(step, start, (alone.swapaxes(0, 1), kept.swapaxes(0, 1)), reverse=reverse)[1].swapaxes(0, 1)


def _call(static, x, y, z, table, initial, joined=None):
    """The kernel on whole sequences: (out, final state, extra). Without x there is no out, and the states are all that is computed."""
    plgpu = gpu.mosaic()
    (W, heads, stages, _), _, _, interpret = static
    (B, T, N, H), P = y.shape, z.shape[-1]
    tiles, n, reads = P // TILE, -(-T // C), x is not None
    side, columns = gpu.smem((stages, heads, C, H), z.dtype), gpu.smem((W, C, TILE), z.dtype)
    w, states = (None, None) if joined is None else joined
    keeps, joins = joined is not None and states is None, states is not None
    operands = dict(x=x, y=y, z=z, table=table, w=w, states=states, initial=None if initial is None else _tiled(initial))
    slots = dict(x=side if reads else None, y=side, z=gpu.smem((stages, W, C, TILE), z.dtype),
                 table=plgpu.SMEM((stages, heads, TABLE_ROWS, C), jnp.float32),
                 w=None if w is None else gpu.smem((stages, W, C, TILE), z.dtype),
                 states=gpu.smem((stages, W, TILE, H), z.dtype) if joins else None)
    own = dict(weighted=columns, state=gpu.smem((W, TILE, H), z.dtype) if reads else None, out=columns if reads else None)
    out_type = dict(out=jax.ShapeDtypeStruct((B, T, N, P), z.dtype) if reads else None,
                    final=jax.ShapeDtypeStruct((B, N, tiles, TILE, H), jnp.float32),
                    states=jax.ShapeDtypeStruct((B, N, n, tiles, TILE, H), z.dtype) if keeps else None,
                    rows=None if w is None else jax.ShapeDtypeStruct((B, N, n, tiles, C), jnp.float32),
                    joined=jax.ShapeDtypeStruct((B, N, n, tiles, TILE), jnp.float32) if joins else None)
    kernel = plgpu.kernel(
        functools.partial(_body, static, n), out_type=[out_type],
        scratch_types=[slots, plgpu.Barrier(num_arrivals=(2 + reads) * heads + (1 + joins + (w is not None)) * W, num_barriers=stages),
                       plgpu.Barrier(num_arrivals=W, num_barriers=stages), own],
        grid=(B, N // heads, tiles * heads // W), grid_names=("batch", "head", "tile"), num_threads=W + 1, thread_name="wg",
        kernel_name="retention_scan", compiler_params=gpu.compiler_params(), interpret=gpu.interpretation(interpret),
    )
    (made,) = kernel(operands)
    extra = None if w is None else (made["rows"].sum(3), made["joined"].sum((3, 4)) if joins else made["states"])
    return made["out"], made["final"].reshape(B, N, P, H).swapaxes(2, 3), extra


def _tiled(state_BNHP):
    B, N, H, P = state_BNHP.shape
    return state_BNHP.astype(jnp.float32).swapaxes(2, 3).reshape(B, N, P // TILE, TILE, H)


def _body(static, n, gmem, made, slots, full, empty, own):
    (W, _, _, _), _, _, _ = static
    wg = lax.axis_index("wg")
    pl.when(wg == W)(lambda: _copy(static, n, gmem, slots, full, empty))
    pl.when(wg < W)(lambda: _compute(static, n, gmem, made, slots, full, empty, own))


def _tokens(n, i, reverse):
    """(the chunk of step i, its tokens)."""
    chunk = n - 1 - i if reverse else i
    return chunk, pl.ds(chunk * C, C)


def _place(plan, w):
    """(head, column tile) of computing warpgroup w of this block."""
    head, tile = lax.axis_index("head"), lax.axis_index("tile")
    return (head, tile * plan.warpgroups + w) if plan.heads == 1 else (head * plan.heads + w, tile)


def _copy(static, n, gmem, slots, full, empty):
    """The warpgroup that keeps the ring full."""
    plgpu = gpu.mosaic()
    plan, _, reverse, _ = static
    if plan.warpgroups > 1:
        plgpu.set_max_registers(gpu.COPY_REGISTERS, action="decrease")
    batch, table = lax.axis_index("batch"), gmem["table"]

    @pl.loop(0, n)
    def _(i):
        slot = lax.rem(i, jnp.int32(plan.stages))

        @pl.when(i >= plan.stages)
        def _():
            plgpu.barrier_wait(empty.at[slot])

        chunk, tokens = _tokens(n, i, reverse)
        kind = chunk if table.shape[2] == n else jnp.where(chunk == n - 1, 1, 0)
        copy = lambda source, name, *at: plgpu.copy_gmem_to_smem(source, slots[name].at[slot, *at], full.at[slot])  # noqa: E731
        for u in range(plan.heads):
            head, _ = _place(plan, u)
            copy(table.at[batch if table.shape[0] > 1 else 0, head, kind], "table", u)
            for name in ("x", "y"):
                if gmem[name] is not None:
                    copy(gmem[name].at[batch, tokens, head], name, u)
        for w in range(plan.warpgroups):
            head, tile = _place(plan, w)
            for name in ("z", "w"):
                if gmem[name] is not None:
                    copy(gmem[name].at[batch, tokens, head, pl.ds(tile * TILE, TILE)], name, w)
            if gmem["states"] is not None:
                copy(gmem["states"].at[batch, head, chunk, tile], "states", w)


def _compute(static, n, gmem, made, slots, full, empty, own):
    """A warpgroup that multiplies: the state of its columns through all chunks."""
    plgpu = gpu.mosaic()
    plan, scale, reverse, interpret = static
    if plan.warpgroups > 1:
        plgpu.set_max_registers(gpu.COMPUTE_REGISTERS, action="increase")
    batch, wg = lax.axis_index("batch"), lax.axis_index("wg")
    head, tile = _place(plan, wg)
    u = lax.rem(wg, jnp.int32(plan.heads))
    own = {name: None if ref is None else ref.at[wg] for name, ref in own.items()}
    if gmem["initial"] is None:
        state = gpu.zeros((TILE, gmem["y"].shape[-1]))
    else:
        state = plgpu.load(gmem["initial"].at[batch, head, tile], layout=plgpu.Layout.WGMMA, optimized=False)

    def step(i, state):
        slot = lax.rem(i, jnp.int32(plan.stages))
        plgpu.barrier_wait(full.at[slot])
        of_warpgroup = ("z", "w", "states")
        chunk = {name: None if ref is None else ref.at[slot, wg if name in of_warpgroup else u] for name, ref in slots.items()}
        at = (batch, head, _tokens(n, i, reverse)[0], tile)
        if made["states"] is not None:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        keep = lambda: None if made["states"] is None else plgpu.copy_smem_to_gmem(own["state"], made["states"].at[at])  # noqa: E731
        out, state = _chunk(chunk, state, own, keep, scale, reverse, interpret)
        if made["rows"] is not None:
            w = plgpu.load(chunk["w"], layout=plgpu.Layout.WGMMA).astype(jnp.float32)
            gpu.store(made["rows"].at[at], (out * w).sum(1))
        if made["joined"] is not None:
            other = plgpu.load(chunk["states"], layout=plgpu.Layout.WGMMA).astype(jnp.float32)
            gpu.store(made["joined"].at[at], (state * other).sum(1))
        if out is not None:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the chunk before has left
            own["out"][...] = out.astype(own["out"].dtype)
        plgpu.commit_smem()
        plgpu.barrier_arrive(empty.at[slot])  # behind the fence: the table was read by loads, and TMA will write it
        if out is not None:
            target = made["out"].at[batch, _tokens(n, i, reverse)[1], head, pl.ds(tile * TILE, TILE)]
            plgpu.copy_smem_to_gmem(own["out"], target)
        return state

    state = lax.fori_loop(0, n, step, state)
    gpu.store(made["final"].at[batch, head, tile], state)
    plgpu.wait_smem_to_gmem(0)


def _chunk(chunk, state, own, keep, scale, reverse, interpret):
    """(out of one chunk [C, TILE] or None, the state after it), float32 in registers. `chunk` are its tiles in shared memory."""
    plgpu = gpu.mosaic()
    x, y, z, table = (chunk[name] for name in ("x", "y", "z", "table"))
    dtype = z.dtype
    z_CP = plgpu.load(z, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
    own["weighted"][...] = (z_CP * gpu.rows(gpu.load_rows(table.at[WRITES]), z_CP.shape)).astype(dtype)
    keeps = table[KEEPS, 0]
    if x is None:
        plgpu.commit_smem()
        return None, *_products(interpret, (state * keeps, own["weighted"].transpose((1, 0)), y))
    own["state"][...] = state.astype(dtype)
    plgpu.commit_smem()
    keep()
    zeros = gpu.zeros((C, C))
    narrow = state.shape[1] <= 128  # else registers hold neither x nor two products beside the state
    left = plgpu.load(x, layout=plgpu.Layout.WGMMA) if narrow else x
    inside, read = (zeros, left, y.transpose((1, 0))), (zeros, left, own["state"].transpose((1, 0)))
    scores_CC, *read_CP = _products(interpret, inside, read) if narrow else _products(interpret, inside)
    exponent_CC = gpu.rows(gpu.load_rows(table.at[PAIR_ROW]), (C, C)) - gpu.columns(gpu.load_columns(table.at[PAIR_COLUMN]), (C, C))
    row, column = gpu.iota((C, C), 0), gpu.iota((C, C), 1)
    seen = column >= row if reverse else row >= column
    pair_CC = jnp.where(seen, jnp.exp2(exponent_CC) * scale, 0.0)  # an unseen pair's power may be inf; it is not used
    scores_CC = (scores_CC * pair_CC).astype(dtype)
    (read_CP,) = read_CP or _products(interpret, read)
    read_CP = read_CP * gpu.rows(gpu.load_rows(table.at[READS]), read_CP.shape)
    return _products(interpret, (read_CP, scores_CC, z), (state * keeps, own["weighted"].transpose((1, 0)), y))


def _products(interpret, *products):
    """acc + a @ b for each (acc, a, b), issued together and awaited once. `a` is in shared memory or in registers, `b` in shared memory.

    The interpreter of jax 0.12 has no accumulator that starts from a value and no operand in registers: there the values are multiplied.
    """
    plgpu = gpu.mosaic()
    if interpret is not False:
        value = lambda a: a if isinstance(a, jax.Array) else a[...]  # noqa: E731
        return tuple(acc + jnp.dot(value(a), value(b), preferred_element_type=jnp.float32) for acc, a, b in products)

    def multiply(accs):
        for acc_ref, (_, a, b) in zip(accs, products, strict=True):
            plgpu.wgmma(acc_ref, a, b)

    return pl.run_state(multiply)(tuple(plgpu.ACC.init(acc) for acc, _, _ in products))

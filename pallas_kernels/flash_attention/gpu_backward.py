"""Backward attention on Hopper in two kernels, so that every sum has one order: dq by tiles of queries, dk and dv by tiles of keys.

B batch, T query, S key, N heads, K kv heads, H head dim, P value dim. Probabilities are made again from the saved logsumexp
(FlashAttention-2, arXiv:2307.08691, algorithm 2). Tiles of the second kernel are transposed (keys are rows), so that both its
accumulating products take their left operand from registers. All query heads of a kv head are summed in the accumulator.
Above H + P = 256 two accumulators of one warpgroup do not fit its registers: dk and dv then have a kernel each, which makes the scores
twice (8 products where the pair of kernels has 7) and spills less.
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import gpu
from pallas_kernels.flash_attention import gpu_plan as plan
from pallas_kernels.flash_attention.gpu_forward import soft_cap

OWN_ROWS = plan.WARPGROUP_ROWS  # of the side whose gradient a warpgroup accumulates
TILE = gpu.COMPUTE * OWN_ROWS
_RESERVED = 4 * 1024  # shared memory for row statistics and barriers


def step_rows(H, P):
    """Rows of the other side per step: two float32 tiles of 64 x this, next to the accumulators, in 240 registers a thread."""
    return 128 if H + P <= 128 else 64


def backward(spec, interpret, q_BTNH, k_BSKH, v_BSKP, do_BTNP, lse_BNT, delta_BNT, ids_of, T, S):
    """(dq, dk, dv) in the inputs' dtype. T and S are the true lengths; the arrays are padded as in `gpu_forward.forward`."""
    rows = step_rows(q_BTNH.shape[3], v_BSKP.shape[3])
    # Rows that saw nothing, and rows past T, get a probability of exp2(score - inf) = 0 everywhere.
    lse2_BNT = jnp.where(lse_BNT == -jnp.inf, jnp.inf, lse_BNT * gpu.LOG2E)
    stats = gpu.pad_axis(lse2_BNT, 2, TILE, jnp.inf), gpu.pad_axis(delta_BNT, 2, TILE)
    arrays = q_BTNH, k_BSKH, v_BSKP, do_BTNP, *stats
    shape = plan.Shape(T, S, TILE, rows)
    dq = _query_gradient(spec, interpret, arrays, ids_of(shape), shape)
    shape = plan.Shape(T, S, rows, TILE)
    ids = ids_of(shape)
    if q_BTNH.shape[3] + v_BSKP.shape[3] <= 256:
        dk, dv = _key_gradients(spec, interpret, arrays, ids, shape, ("dk", "dv"))
    else:
        (dk,), (dv,) = (_key_gradients(spec, interpret, arrays, ids, shape, (want,)) for want in ("dk", "dv"))
    return dq, dk, dv


@dataclasses.dataclass(frozen=True)
class Stages:
    late: int  # slots of the operand that a step needs from its first product to its last
    early: int


def stages(free, late, early):
    """As many slots as fit `free` bytes, up to 3 of each; the spare one goes to the late operand."""
    n = min(3, free // (late + early))
    if n < 1:
        raise ValueError(f"flash_attention[pallas_gpu]: {late + early} bytes of operands per step do not fit {free} bytes.")
    return Stages(min(3, n + ((free - n * (late + early)) >= late)), n)


def _probabilities(spec, lse, see, s):
    """(probabilities, derivative of the soft cap or None) of a tile of products; lse is spread over it."""
    slope = None
    if spec.soft_cap is None:
        s = s * (spec.scale * gpu.LOG2E)
    else:
        s, slope = soft_cap(s, spec)
    p = jnp.exp2(s - lse)
    return (p if see is None else jnp.where(see, p, 0.0)), slope


def _score_gradient(p, dp, delta, slope, dtype):
    """Without the scale, which is applied to the sum."""
    ds = p * (dp - delta)
    return (ds if slope is None else ds * slope).astype(dtype)


def _query_gradient(spec, interpret, arrays, ids, shape):
    plgpu = gpu.mosaic()
    q_BTNH, k_BSKH, v_BSKP = arrays[:3]
    B, _, N, H = q_BTNH.shape
    P, dtype = v_BSKP.shape[3], q_BTNH.dtype
    tiles = -(-shape.T // TILE)
    inputs = [*arrays, *(() if ids is None else (*ids, *plan.visits(ids, TILE, shape.k_rows)))]
    slots = stages(gpu.SMEM - _RESERVED - TILE * (H + P) * 2, shape.k_rows * H * 2, shape.k_rows * P * 2)
    tile_shape = (OWN_ROWS, shape.k_rows)

    def body(*refs):
        q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, *rest = refs[: len(inputs)]
        dq_ref, q_smem, do_smem, k_scratch, v_scratch, own_barrier = refs[len(inputs) :]
        k_ring, v_ring = gpu.Ring(*k_scratch, slots.late), gpu.Ring(*v_scratch, slots.early)
        b, n, tile, wg = (lax.axis_index(name) for name in ("batch", "heads", "tiles", "wg"))
        tile = tiles - 1 - tile if spec.is_causal else tile  # the longest rows of a causal mask first
        steps = plan.Steps(tile, shape, spec, b, rest[2:], of_keys=False)

        @pl.when(wg == gpu.COPIER)
        def _copy():
            plan.copy_keys(steps, shape, b, plan.div(n, N // k_BSKH.shape[2]), (k_ring, v_ring), (k_ref, v_ref))

        @pl.when(wg < gpu.COMPUTE)
        def _compute():
            plgpu.set_max_registers(gpu.COMPUTE_REGISTERS, action="increase")
            first = tile * TILE + wg * OWN_ROWS
            own = (b, pl.ds(first, OWN_ROWS), n)
            q, do = q_smem.at[wg], do_smem.at[wg]
            plgpu.copy_gmem_to_smem(q_ref.at[own], q, own_barrier.at[wg])
            plgpu.copy_gmem_to_smem(do_ref.at[own], do, own_barrier.at[wg])
            lse, delta = (gpu.load_rows(ref.at[b, n, pl.ds(first, OWN_ROWS)], shared=False) for ref in (lse_ref, delta_ref))
            see = plan.mask(spec, shape, first, b, rest[:2], of_keys=False)
            plgpu.barrier_wait(own_barrier.at[wg])

            def one_step(step, dq, masked):
                k, v = k_ring.wait(step), v_ring.wait(step)
                q, do = gpu.per_step(wg, q_smem, do_smem)
                again = functools.partial(_probabilities, spec, gpu.rows(lse, tile_shape), see(steps.block(step)) if masked else None)
                (p, slope), dp = gpu.two_products(tile_shape, (q, k.transpose((1, 0))), (do, v.transpose((1, 0))), again)
                v_ring.release(step)
                ds = _score_gradient(p, dp, gpu.rows(delta, tile_shape), slope, dtype)
                (dq,) = gpu.accumulate(interpret, (dq, ds, k))
                k_ring.release(step)
                return dq

            dq = lax.fori_loop(0, steps.masked, lambda i, dq: one_step(i, dq, True), gpu.zeros((OWN_ROWS, H)))
            dq = lax.fori_loop(steps.masked, steps.total, lambda i, dq: one_step(i, dq, False), dq)
            q[...] = (dq * spec.scale).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q, dq_ref.at[own])
            plgpu.wait_smem_to_gmem(0)

    scratch = (
        gpu.smem((gpu.COMPUTE, OWN_ROWS, H), dtype), gpu.smem((gpu.COMPUTE, OWN_ROWS, P), dtype),
        gpu.ring_scratch(slots.late, ((shape.k_rows, H), dtype)), gpu.ring_scratch(slots.early, ((shape.k_rows, P), dtype)),
        plgpu.Barrier(num_arrivals=2, num_barriers=gpu.COMPUTE),
    )
    out_type, grid = jax.ShapeDtypeStruct(q_BTNH.shape, dtype), {"heads": N, "tiles": tiles, "batch": B}
    return gpu.launch("flash_attention_dq", body, grid, out_type, scratch, interpret, reduction_scratch_bytes=0)(*inputs)


def _key_step(spec, interpret, sums, own, q_slots, do_slots, see, want_dk):
    """`sums` (of dk, dv, or one of them) with what one block of queries adds. The tiles are transposed: keys are rows."""
    (k, v), (q, lse) = own, q_slots
    do, *delta = do_slots if want_dk else (do_slots,)
    tile = (OWN_ROWS, q.shape[0])
    again = functools.partial(_probabilities, spec, gpu.columns(gpu.load_columns(lse), tile), see)
    scores = (k, q.transpose((1, 0)))
    if not want_dk:
        p, _ = again(gpu.product(*scores, tile))
        return gpu.accumulate(interpret, (*sums, p.astype(q.dtype), do))
    (p, slope), dp = gpu.two_products(tile, scores, (v, do.transpose((1, 0))), again)
    ds = _score_gradient(p, dp, gpu.columns(gpu.load_columns(delta[0]), tile), slope, q.dtype)
    operands = [(ds, q), (p.astype(q.dtype), do)]
    return gpu.accumulate(interpret, *((x, *pair) for x, pair in zip(sums, operands)))


def _key_gradients(spec, interpret, arrays, ids, shape, wanted):
    """The gradients named in `wanted`: "dk", "dv" or both."""
    plgpu = gpu.mosaic()
    q_BTNH, k_BSKH, v_BSKP = arrays[:3]
    B, _, N, H = q_BTNH.shape
    K, P, dtype = k_BSKH.shape[2], v_BSKP.shape[3], q_BTNH.dtype
    tiles, G = -(-shape.S // TILE), N // K
    want_dk = "dk" in wanted
    inputs = [*arrays, *(() if ids is None else (*ids, *plan.visits(ids, shape.q_rows, TILE, of_keys=True)))]
    own_v = want_dk or H != P  # the values, or a place to put dv where it does not fit that of the keys
    slots = stages(gpu.SMEM - _RESERVED - TILE * (H + P * own_v) * 2, shape.q_rows * H * 2, shape.q_rows * P * 2)

    def body(*refs):
        q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, *rest = refs[: len(inputs)]
        out_refs, scratch = refs[len(inputs) : len(inputs) + len(wanted)], refs[len(inputs) + len(wanted) :]
        k_smem, v_smem, q_scratch, do_scratch, own_barrier = scratch
        q_ring, do_ring = gpu.Ring(*q_scratch, slots.late), gpu.Ring(*do_scratch, slots.early)
        b, kv, tile, wg = (lax.axis_index(name) for name in ("batch", "kv_heads", "tiles", "wg"))
        steps = plan.Steps(tile, shape, spec, b, rest[2:], of_keys=True)

        @pl.when(wg == gpu.COPIER)
        def _copy():
            plgpu.set_max_registers(gpu.COPY_REGISTERS, action="decrease")

            @pl.loop(0, G * steps.total)
            def _(step):
                g = plan.div(step, steps.total)
                place, n = pl.ds(steps.block(step - g * steps.total) * shape.q_rows, shape.q_rows), kv * G + g
                q_ring.fill(step, q_ref.at[b, place, n], lse_ref.at[b, n, place])
                do_ring.fill(step, do_ref.at[b, place, n], *((delta_ref.at[b, n, place],) if want_dk else ()))

        @pl.when(wg < gpu.COMPUTE)
        def _compute():
            plgpu.set_max_registers(gpu.COMPUTE_REGISTERS, action="increase")
            first = tile * TILE + wg * OWN_ROWS
            own = (b, pl.ds(first, OWN_ROWS), kv)
            k, v = k_smem.at[wg], v_smem.at[wg] if own_v else None
            plgpu.copy_gmem_to_smem(k_ref.at[own], k, own_barrier.at[wg])
            if want_dk:
                plgpu.copy_gmem_to_smem(v_ref.at[own], v, own_barrier.at[wg])
            see = plan.mask(spec, shape, first, b, rest[:2], of_keys=True)
            plgpu.barrier_wait(own_barrier.at[wg])

            def one_step(i, sums, masked, g):
                step = g * steps.total + i
                own = gpu.per_step(wg, k_smem, v_smem)
                slots = q_ring.wait(step), do_ring.wait(step)
                sums = _key_step(spec, interpret, sums, own, *slots, see(steps.block(i)) if masked else None, want_dk)
                do_ring.release(step)
                q_ring.release(step)
                return sums

            def one_head(g, sums):
                sums = lax.fori_loop(0, steps.masked, lambda i, x: one_step(i, x, True, g), sums)
                return lax.fori_loop(steps.masked, steps.total, lambda i, x: one_step(i, x, False, g), sums)

            sums = [gpu.zeros((OWN_ROWS, {"dk": H, "dv": P}[name])) for name in wanted]
            # A loop of one turn is unrolled with a Python number for its index, which the lowering of jax 0.12 does not take.
            sums = one_head(jnp.int32(0), sums) if G == 1 else lax.fori_loop(0, G, one_head, sums)
            for name, x, out_ref in zip(wanted, sums, out_refs, strict=True):
                place = v if name == "dv" and own_v else k
                place[...] = (x * spec.scale if name == "dk" else x).astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(place, out_ref.at[own])
            plgpu.wait_smem_to_gmem(0)

    vector = ((shape.q_rows,), jnp.float32)
    out_type = tuple(jax.ShapeDtypeStruct({"dk": k_BSKH, "dv": v_BSKP}[name].shape, dtype) for name in wanted)
    scratch = (
        gpu.smem((gpu.COMPUTE, OWN_ROWS, H), dtype), gpu.smem((gpu.COMPUTE, OWN_ROWS, P), dtype) if own_v else None,
        gpu.ring_scratch(slots.late, ((shape.q_rows, H), dtype), vector),
        gpu.ring_scratch(slots.early, ((shape.q_rows, P), dtype), *((vector,) if want_dk else ())),
        plgpu.Barrier(num_arrivals=1 + want_dk, num_barriers=gpu.COMPUTE),
    )
    name, grid = "_".join(("flash_attention", *wanted)), {"kv_heads": K, "tiles": tiles, "batch": B}
    return gpu.launch(name, body, grid, out_type, scratch, interpret, reduction_scratch_bytes=0)(*inputs)

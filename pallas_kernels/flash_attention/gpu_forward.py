"""Forward attention on Hopper: one block holds 128 queries of one head (64 per computing warpgroup), the third warpgroup copies K and V.

B batch, T query, S key, N heads, K kv heads, H head dim, P value dim. Online softmax in base 2 (FlashAttention-2, arXiv:2307.08691,
algorithm 1); the two computing warpgroups take turns on the tensor cores, one multiplies while the other exponentiates
(FlashAttention-3, arXiv:2407.08608, section 3.1).
"""
import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import gpu
from pallas_kernels.flash_attention import gpu_plan as plan

Q_ROWS = plan.WARPGROUP_ROWS


@dataclasses.dataclass(frozen=True)
class Blocks:
    k_rows: int
    stages: int


def blocks(H, P, T, S):
    """Keys per step and slots of K and V: what shared memory and 240 registers a thread hold."""
    # Per thread: scores k_rows / 2 and half as many for bf16 probabilities, output P / 2.
    k_rows = 128 if H + P <= 256 else 64
    itemsize, reserved = 2, 6 * 1024
    q = gpu.COMPUTE * Q_ROWS * (H if H == P else H + P) * itemsize
    stages = (gpu.SMEM - reserved - q) // (k_rows * (H + P) * itemsize)
    return Blocks(k_rows, max(2, min(4, stages, -(-S // k_rows))))


def forward(spec, interpret, q_BTNH, k_BSKH, v_BSKP, ids, sinks_N, shape, block):
    """(out [B,T,N,P], lse [B,N,T padded] in base 2). T and S are multiples of 8, H and P of 64; shape has the true lengths."""
    plgpu = gpu.mosaic()
    B, T, N, H = q_BTNH.shape
    P, dtype = v_BSKP.shape[3], q_BTNH.dtype
    tiles = -(-shape.T // shape.q_rows)
    inputs = [q_BTNH, k_BSKH, v_BSKP]
    if sinks_N is not None:
        inputs.append(sinks_N.astype(jnp.float32) * gpu.LOG2E)
    if ids is not None:
        inputs += [*ids, *plan.visits(ids, shape.q_rows, shape.k_rows)]

    def body(*refs):
        refs, scratch = refs[: len(inputs) + 2], refs[len(inputs) + 2 :]
        q_ref, k_ref, v_ref, *rest, out_ref, lse_ref = refs
        sink_ref = rest.pop(0) if sinks_N is not None else None
        b, n, tile = lax.axis_index("batch"), lax.axis_index("heads"), lax.axis_index("tiles")
        tile = tiles - 1 - tile if spec.is_causal else tile  # the longest rows of a causal mask first
        steps = plan.Steps(tile, shape, spec, b, rest[2:], of_keys=False)
        q_smem, out_smem, lse_smem, k_scratch, v_scratch, q_barrier, turns = scratch
        out_smem = q_smem if out_smem is None else out_smem
        k_ring, v_ring = gpu.Ring(*k_scratch, block.stages), gpu.Ring(*v_scratch, block.stages)
        wg = lax.axis_index("wg")

        @pl.when(wg == gpu.COPIER)
        def _copy():
            plan.copy_keys(steps, shape, b, plan.div(n, N // k_BSKH.shape[2]), (k_ring, v_ring), (k_ref, v_ref))

        @pl.when(wg < gpu.COMPUTE)
        def _compute():
            plgpu.set_max_registers(gpu.COMPUTE_REGISTERS, action="increase")
            first = tile * shape.q_rows + wg * Q_ROWS
            rows = (b, pl.ds(first, Q_ROWS), n)
            plgpu.copy_gmem_to_smem(q_ref.at[rows], q_smem.at[wg], q_barrier.at[wg])
            plgpu.barrier_wait(q_barrier.at[wg])
            see = plan.mask(spec, shape, first, b, rest[:2], of_keys=False)
            out, m, l = _attend_rows(spec, interpret, q_smem.at[wg], k_ring, v_ring, steps, see, P, turns, wg)
            out, lse = _finish(out, m, l, None if sink_ref is None else sink_ref[n])
            out_smem[wg] = out.astype(dtype)
            lse_smem[wg] = lse
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem.at[wg], out_ref.at[rows])
            plgpu.copy_smem_to_gmem(lse_smem.at[wg], lse_ref.at[b, n, pl.ds(first, Q_ROWS)])
            plgpu.wait_smem_to_gmem(0)

    out_smem = None if H == P else gpu.smem((gpu.COMPUTE, Q_ROWS, P), dtype)
    out_type = jax.ShapeDtypeStruct((B, T, N, P), dtype), jax.ShapeDtypeStruct((B, N, tiles * shape.q_rows), jnp.float32)
    scratch = (
        gpu.smem((gpu.COMPUTE, Q_ROWS, H), dtype), out_smem, plgpu.SMEM((gpu.COMPUTE, Q_ROWS), jnp.float32),
        gpu.ring_scratch(block.stages, ((shape.k_rows, H), dtype)), gpu.ring_scratch(block.stages, ((shape.k_rows, P), dtype)),
        plgpu.Barrier(num_barriers=gpu.COMPUTE), plgpu.Barrier(num_arrivals=gpu.COMPUTE),
    )
    grid = {"heads": N, "tiles": tiles, "batch": B}
    return gpu.launch("flash_attention_forward", body, grid, out_type, scratch, interpret)(*inputs)


def _attend_rows(spec, interpret, q, k_ring, v_ring, steps, see, P, turns, wg):
    """(unnormalised output, row maximum in base 2, row sum) of one warpgroup's queries."""
    tile = (Q_ROWS, k_ring.slots[0].shape[1])
    factor = spec.scale * gpu.LOG2E

    def turn():
        gpu.mosaic().barrier_arrive(turns)
        gpu.mosaic().barrier_wait(turns)

    def one_step(step, carry, masked):
        out, m, l = carry
        s = gpu.product(q, k_ring.wait(step).transpose((1, 0)), tile, before_wait=turn)
        k_ring.release(step)
        c = factor
        if spec.soft_cap is not None or factor <= 0:  # a maximum may only be scaled by what keeps the order
            s, c = (s * factor if spec.soft_cap is None else soft_cap(s, spec)[0]), 1.0
        if masked:
            s = jnp.where(see(steps.block(step)), s, -jnp.inf)
        m_new = jnp.maximum(m, s.max(axis=1) * c)
        # A row that has seen nothing has maximum -inf: subtracting 0 instead keeps exp2(-inf) = 0 and makes no NaN.
        base = jnp.where(m_new == -jnp.inf, 0.0, m_new) if masked else m_new
        keep = jnp.exp2(m - base)
        p = jnp.exp2(s * c - gpu.rows(base, tile))
        out = out * gpu.rows(keep, out.shape)
        l = l * keep + p.sum(axis=1)
        p16 = p.astype(q.dtype)
        out, l, m_new, p16 = lax.optimization_barrier((out, l, m_new, p16))
        gpu.mosaic().barrier_arrive(turns)  # this warpgroup's softmax is done
        v = v_ring.wait(step)
        gpu.mosaic().barrier_wait(turns)  # until the other one has issued its scores
        (out,) = gpu.accumulate(interpret, (out, p16, v))
        v_ring.release(step)
        return out, m_new, l

    carry = gpu.zeros((Q_ROWS, P)), gpu.full((Q_ROWS,), -jnp.inf), gpu.zeros((Q_ROWS,))
    pl.when(wg == 1)(turn)
    carry = lax.fori_loop(0, steps.masked, lambda i, c: one_step(i, c, True), carry)
    carry = lax.fori_loop(steps.masked, steps.total, lambda i, c: one_step(i, c, False), carry)
    pl.when(wg == 0)(turn)
    return carry


def soft_cap(s, spec):
    """(capped scores in base 2, derivative of the cap). tanh by exp2: its own approximation is off by 2^-11."""
    e = jnp.exp2(s * (2 * spec.scale * gpu.LOG2E / spec.soft_cap))
    t = 1.0 - 2.0 / (e + 1.0)
    return t * (spec.soft_cap * gpu.LOG2E), 1.0 - t * t


def _finish(out, m, l, sink):
    """(output, logsumexp in base 2), the sink included; a row that saw nothing is 0 and -inf."""
    seen = l > 0
    if sink is not None:
        top = jnp.maximum(jnp.where(seen, m, -jnp.inf), sink)
        keep = jnp.exp2(m - top)
        out, l, m = out * gpu.rows(keep, out.shape), l * keep + jnp.exp2(sink - top), top
    l = jnp.where(seen, l, 1.0)
    lse = jnp.where(seen, m + jnp.log(l) * gpu.LOG2E, -jnp.inf)
    return out * gpu.rows(1.0 / l, out.shape), lse

"""What attention over a split sequence costs: the bytes that travel, the memory that is held, and, on a TPU, what hides the transfers.

Letters: B batch, T time, c tokens of one shard, N heads, K kv heads, H head dim, n shards of time.
"""
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effmodels.parallel import axes, ops, ring
from effmodels.parallel.options import Options
from effmodels.plan import hlo, topology
from tests.contract.cases import jit
from tests.parallel.test_ring import Q, shards

OTHERS = r"(all-gather|all-to-all|all-reduce|reduce-scatter)[\w-]*\("


def travelled(text):
    """Bytes that one device sends by collective-permute, loops counted as often as they run."""
    module = hlo.parse(text)

    def total(name):
        count = 0
        for i in module.computations[name]:
            if i.opcode == "collective-permute":
                dtype, shape = hlo.shape(i.type)
                count += int(np.prod(shape)) * {"f32": 4, "s32": 4}[dtype]
            elif i.opcode == "while":
                count += hlo.trip_count(module, i) * total(hlo.called(i, "body"))
            elif i.opcode in ("call", "conditional"):
                count += sum(total(n) for n in ([hlo.called(i, "to_apply")] if i.opcode == "call" else hlo.branches(i)))
        return count

    return total(module.entry)


def compiled(n, c, backward=True, N=4, K=2, H=16, layout="zigzag", **options):
    """Forward, or forward and backward, of a ring over n shards of c tokens."""
    local = functools.partial(ring.attend, axis=("seq",), layout=layout, implementation="xla", **options)
    f = jax.shard_map(local, mesh=shards(n), in_specs=(Q, Q, Q), out_specs=Q, check_vma=False)
    arrays = [jax.ShapeDtypeStruct((1, n * c, heads, H), jnp.float32, sharding=jax.NamedSharding(shards(n), Q)) for heads in (N, K, K)]
    both = lambda q, k, v: jax.vjp(f, q, k, v)[1](q)  # noqa: E731
    return jit(both if backward else f).lower(*arrays).compile()


@pytest.mark.parametrize("n, layout, window", [(4, "zigzag", None), (8, "contiguous", None), (8, "contiguous", 16), (8, "zigzag", 8)])
def test_bytes_that_travel(n, layout, window):
    """Each of the other shifts: K and V once forward, once backward, and their gradients; nothing else, and nobody gathers."""
    c, K, H = 16, 2, 16
    forward, both = (compiled(n, c, backward, K=K, H=H, layout=layout, local_window_size=window).as_text() for backward in (False, True))
    hops = {None: n - 1, 16: 1, 8: 2}[window]
    pair = 2 * c * K * H * 4
    assert travelled(forward) == hops * pair
    assert travelled(both) == hops * 3 * pair
    assert not re.search(OTHERS, both)


@pytest.mark.parametrize("sizes", [(2, 8), pytest.param((1, 2, 4, 8), marks=pytest.mark.slow)], ids=str)
def test_memory_of_a_device_stays_flat_as_the_ring_grows(sizes):
    """At fixed tokens of a shard, the context grows with the devices and a device's memory does not."""
    temp = {n: compiled(n, 512).memory_analysis().temp_size_in_bytes for n in sizes}
    assert max(temp.values()) <= 1.1 * temp[2], temp
    assert 1 not in temp or temp[2] <= 2.25 * temp[1], temp  # keys and their gradients that are on their way, and sums in float32


@pytest.mark.parametrize("n", [2, 8])
def test_what_the_backward_pass_keeps(n):
    """q, k, v, the output and its logsumexp: no block."""
    T, N, K, H = 32, 4, 2, 8
    local = functools.partial(ring.attend, axis=("seq",), layout="contiguous", implementation="xla")
    f = jax.shard_map(local, mesh=shards(n), in_specs=(Q, Q, Q), out_specs=Q, check_vma=False)
    arrays = [jax.ShapeDtypeStruct((1, T, heads, H), jnp.float32) for heads in (N, K, K)]
    kept = jax.tree.leaves(jax.eval_shape(lambda *a: jax.vjp(f, *a)[1], *arrays))
    assert sum(x.size for x in kept) == 2 * T * N * H + 2 * T * K * H + T * N


# Compiled for a TPU.


def on_four_chips(layout, backward, T=8192, N=8, H=128):
    chips = topology.mesh("v4", seq=4)
    local = functools.partial(ring.attend, axis=("seq",), layout=layout)
    f = jax.shard_map(local, mesh=chips, in_specs=(Q, Q, Q), out_specs=Q, check_vma=False)
    loss = lambda *a: f(*a).astype(jnp.float32).sum()  # noqa: E731
    shape = jax.ShapeDtypeStruct((1, T, N, H), jnp.bfloat16, sharding=jax.NamedSharding(chips, Q))
    with jax.set_mesh(chips):
        return jax.jit(jax.grad(loss, (0, 1, 2)) if backward else f).lower(shape, shape, shape).compile().as_text()


@pytest.mark.aot
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_what_travels_does_so_beside_a_kernel(layout, backward):
    """Between every start and its done, in the order of execution, stands a kernel; only the forward pass's last one has no company."""
    text = on_four_chips(layout, backward)
    assert not re.search(OTHERS, text)
    kernels = accompanied = starts = 0
    # Keys and values as they are; their gradients, which are sums, in float32.
    sent = re.findall(r"= \((\w+)\[[^=]*\) collective-permute-start\(", text)
    assert set(sent) == ({"bf16", "f32"} if backward else {"bf16"})
    for body in hlo.parse(text).computations.values():
        at = {i.name: place for place, i in enumerate(body)}
        own = [at[i.name] for i in body if i.is_kernel]
        pairs = [(at[i.operands[0]], at[i.name]) for i in body if i.opcode == "collective-permute-done"]
        for start, done in pairs:
            assert any(start < place < done for place in own), f"nothing hides {body[start].name}"
        kernels, starts = kernels + len(own), starts + len(pairs)
        accompanied += sum(any(start < place < done for start, done in pairs) for place in own)
    assert starts >= (10 if backward else 4) and kernels - accompanied <= 1, (kernels, accompanied, starts)


@pytest.mark.aot
@pytest.mark.parametrize("form, collective", [("ring", "collective-permute-start"), ("ulysses", "all-to-all")])
def test_beside_data_and_tensor_compiled_for_chips(form, collective):
    B, T, N, K, H = 4, 400, 4, 2, 64

    def loss(x, w):
        @jax.checkpoint
        def layer(x, w):
            q = (x * w).reshape(B, T, N, H)
            y = ops.attention(q, q[:, :, :K], q[:, :, K:], segment_ids=jnp.ones((B, T), jnp.int32), local_window_size=100)
            return x + y.reshape(x.shape), None

        return jax.lax.scan(layer, x, w)[0].astype(jnp.float32).sum()

    with axes.use(topology.mesh("v4", data=2, seq=2, tensor=2), None, Options(layout="zigzag", attention=form)) as chips:
        here = [jax.NamedSharding(chips, axes.spec(dims, mesh=chips)) for dims in (("batch", "seq", "act_heads"), (None, "act_heads"))]
        shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=x) for s, x in zip(((B, T, N * H), (3, N * H)), here)]
        text = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).compile().as_text()
    assert text.count("tpu_custom_call") >= 2 and collective in text
    assert form != "ring" or not re.search(r"all-gather[\w-]*\(", text)

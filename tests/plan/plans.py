"""Plans made by hand, for the tests of what people read: a large one, one that does not fit, and the odd ones."""
import dataclasses

from effmodels.plan.records import Memory, Operation, Plan

GIB = 2**30


def memory(**gib):
    """A `Memory` of a v4 chip from its parts in GiB."""
    return Memory(int(30.75 * GIB), **{"parameters": 0, **{name: int(size * GIB) for name, size in gib.items()}})


def op(name, kind, calls, seconds, basis="cost model", **fields):
    return Operation(name, kind, calls, seconds, basis, **fields)


def wire(name, axis, calls, seconds, exposed, num_bytes, **fields):
    fields = {"basis": "wire model", "layer": "mlp", **fields}
    return op(f"{name}.5", "collective", calls, seconds, exposed=exposed, bytes=num_bytes, axes=(axis,), collective=name, **fields)


def block(phase, factor, scale=1.0):
    """A decoder's layer, 80 times."""
    in_mlp = dict(layer="mlp", source="effmodels/layers/mlp.py:31", phase=phase)
    in_attention = dict(layer="attention", phase=phase)
    matmul = factor * scale
    return [
        wire("all-gather", "fsdp", 80, 4e-3, 0.4e-3, 188e6, phase=phase),
        op("fusion.norm", "memory", 80, factor * 0.8e-3, bytes=6e8, layer="norm", phase=phase),
        op("fusion.qkv", "matmul", 80, matmul * 4.5e-3, flops=factor * 1.1e12, bytes=1.1e9, **in_attention),
        op("flash_attention", "kernel", 80, factor * 1.2e-3, "schedule", flops=factor * 1.3e11, bytes=1e8, **in_attention),
        op("fusion.mlp", "matmul", 80, matmul * 9e-3, flops=factor * 2.2e12, bytes=1.1e9, **in_mlp),
        wire("all-reduce", "tensor", 80, 2.1e-3, 2.1e-3, 59e6, phase=phase, source="effmodels/layers/linear.py:88"),
    ]


def operations(scale=1.0):
    """Embedding, layers forward, loss, layers again and backward, the update. scale: of the matmuls' seconds."""
    return (
        op("gather.embed", "memory", 1, 3e-3, layer="embed", phase="forward", bytes=1e9),
        *block("forward", 1, scale),
        op("linear_cross_entropy", "kernel", 1, 60e-3, "kernel table", flops=1.3e13, layer="loss", phase="forward"),
        *block("recomputed", 1, scale),
        *block("backward", 2, scale),
        wire("reduce-scatter", "fsdp", 80, 5e-3, 0.0, 188e6, phase="backward"),
        op("fusion.adam", "memory", 1, 11e-3, layer="optimizer", phase="update", bytes=1.2e10, source="effmodels/train/optim.py:140"),
    )


def large(**fields):
    """65 billion parameters on 1,024 chips, as compiled; its figures are invented."""
    plan = Plan(
        config="configs/dense_65b.py", what="train", topology="v4:8x8x16", slices=1, chip="v4", chips=1024,
        mesh={"data": 1, "fsdp": 128, "seq": 1, "tensor": 8}, method="compiled", tokens=2**21, steps=667_572,
        model_flops=8.45e17, executed_flops=1.1e18,
        memory=memory(parameters=0.24, optimizer=0.48, batch=0.001, gradients=0.31, activations=2.6, temporaries=2.1, program=0.12),
        operations=operations(), host_save_bytes=int(3.1e9), checkpoint_bytes=int(783e9), input_bytes_per_second=1.58e6,
        notes=("The wire model knows bandwidth only, no latency.", "Host transfers are not priced."),
        versions={"jax": "0.10.2", "libtpu": "0.0.42.1"}, compile_seconds=131.0, peak_flops=275e12, bandwidth=1.228e12, band=(1.05, 1.2),
    )  # fmt: skip
    return dataclasses.replace(plan, **fields)


def too_large():
    """The compiler gave up; the categories are the closed form's."""
    return large(
        topology="v4:4x4x4", chips=64, mesh={"data": 1, "fsdp": 64}, operations=(),
        memory=memory(parameters=3.8, optimizer=7.6, batch=0.004, gradients=4.1, activations=11.2, temporaries=7.4, program=0.12),
        out_of_memory="RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (34.22G) exceeds available HBM (30.75G). HLO module: jit_train_step.",
        largest=(("optimizer: float32[80, 8192, 344] mu", 5 * GIB), ("kept for the backward pass: bf16[80,14,2048,8192]", 3 * GIB)),
    )  # fmt: skip


def memory_only():
    return large(method="memory", operations=(), band=(), compile_seconds=21.0)


def fast():
    """The closed form has one operation per term, and no phases."""
    terms = (
        op("matmuls", "matmul", 1, 4.2, "closed form", flops=1.05e15),
        op("attention", "kernel", 1, 0.4, "closed form", flops=3e13, layer="attention"),
        wire("all-gather", "fsdp", 240, 4e-3, 0.6e-3, 1.9e8, basis="closed form", layer=""),
        op("optimizer", "memory", 1, 0.011, "closed form", layer="optimizer"),
    )
    return large(method="fast", operations=terms, notes=("Attention is taken as causal.",), band=(), versions={}, compile_seconds=0.0)


def cpu():
    """Eight simulated devices: nobody knows what memory they may use, and nothing is calibrated."""
    parts = dict(
        parameters=5_200_000, optimizer=10_400_000, batch=65_536, gradients=5_200_000, activations=41_000_000, temporaries=12_000_000
    )
    return large(
        config="configs/quickstart.py", topology="cpu:8", chip="cpu", chips=8, mesh={"data": 8}, tokens=8192, steps=1000,
        model_flops=3e9, executed_flops=3e9, memory=Memory(0, **parts), host_save_bytes=0, checkpoint_bytes=15_600_000,
        input_bytes_per_second=4e5, peak_flops=4e10, bandwidth=8e9, band=(), notes=(), versions={"jax": "0.10.2"},
        operations=(
            op("dot.3", "matmul", 2, 0.011, flops=2e8, layer="mlp", phase="forward"),
            op("fusion.9", "memory", 4, 0.002, bytes=3e6, phase="backward"),
        ),
    )  # fmt: skip


def decode():
    """One token for each of 64 sequences: the time is that of reading parameters and state."""
    return large(
        config="configs/retnet_6p7b.py", what="decode", topology="v4:2x2x1", chips=4, mesh={"tensor": 4}, tokens=64, steps=0,
        model_flops=8.6e11, executed_flops=8.6e11, host_save_bytes=0, checkpoint_bytes=0, input_bytes_per_second=0.0,
        memory=memory(parameters=3.2, batch=0.001, activations=2.8, temporaries=0.2, program=0.05),
        operations=(
            op("fusion.weights", "matmul", 48, 180e-6, flops=1.5e9, bytes=2e8, layer="mlp"),
            op("fusion.state", "memory", 48, 55e-6, bytes=6e7, layer="retention"),
            wire("all-reduce", "tensor", 96, 12e-6, 12e-6, 4e6),
        ),
    )  # fmt: skip


ALL = (large, too_large, memory_only, fast, cpu, decode)

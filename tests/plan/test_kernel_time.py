"""The efficiencies of kernels are those of the recorded schedules and of the kernels' own cost estimates."""
import collections
import json
import pathlib
import re

import pytest

from effmodels.plan import chips, hlo, topology
from effmodels.plan.compiled import kernel_time
from effmodels.plan.schedule import instrument

ROWS = pathlib.Path(__file__).parents[2] / "docs/benchmarks/v4_schedule.json"
FLOPS_PER_CYCLE = 275e12 / 1050e6


def estimates(jaxpr):
    """{kernel name: FLOPs of its cost estimate}, anywhere in a jaxpr."""
    from jax.extend.core import jaxprs_in_params

    found = {}
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call" and equation.params["cost_estimate"] is not None:
            name = equation.params.get("name") or str(equation.params["name_and_src_info"]).split()[0]
            found[name] = equation.params["cost_estimate"].flops
        for inner in jaxprs_in_params(equation.params):
            found |= estimates(inner)
    return found


@pytest.mark.aot
def test_efficiencies_are_the_means_over_the_recorded_shapes():
    import jax

    from experiments.kernels import static

    found = collections.defaultdict(list)
    rows = [row for row in json.loads(ROWS.read_text())["rows"] if row["contestant"] == "pallas_tpu" and row["op"] != "flash_attention"]
    with jax.sharding.use_abstract_mesh(topology.mesh("v4").abstract_mesh):
        for row in rows:
            case = {name: row[name] for name in ("op", "direction", "dtype")} | {"shape": tuple(row["shape"].items())}
            f, arguments = static.program("pallas_tpu", case)
            flops = estimates(jax.make_jaxpr(f)(*arguments).jaxpr)
            for name, (_, cycles) in row["kernels"].items():
                name = re.sub(r"(jvp_|transpose_|_*\.\d+$)", "", name).rstrip("_")
                found[name].append(flops[name] / (cycles * FLOPS_PER_CYCLE))
    means = {name: sum(shares) / len(shares) for name, shares in found.items()}
    assert means == pytest.approx(kernel_time.EFFICIENCY, abs=0.006)


def attention(B, T, N, K, H):
    """(f, arguments): causal attention with the segment ids of one document a row, and its gradients."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import pallas_kernels

    def f(q, k, v, ids):
        options = {"segment_ids": ids, "kv_segment_ids": ids, "implementation": "pallas_tpu"}
        out, vjp = jax.vjp(lambda *x: pallas_kernels.flash_attention(*x, **options), q, k, v)
        return out, vjp(out)

    return f, (*(jax.ShapeDtypeStruct((B, T, heads, H), jnp.bfloat16) for heads in (N, K, K)), np.ones((B, T), np.int32))


def call(kernel, flops, moved=0):
    """The custom call of a kernel with this estimate."""
    cost = f'{{"flops":"{flops}","transcendentals":"0","bytes_accessed":"{moved}"}}'
    return hlo.Instruction(kernel, "f32[8]", "custom-call", (), f'backend_config={{"cost_estimate":{cost}}}')


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize("B, T, N, K, H", [(1, 4096, 16, 16, 128), (2, 2048, 16, 4, 64)])
def test_attention_with_segment_ids(B, T, N, K, H):
    report = instrument.measure("tests.plan.test_kernel_time:attention", {"B": B, "T": T, "N": N, "K": K, "H": H})
    pairs = B * N * T * (T + 1) // 2
    queries = {"forward": f"bf16[{B * N},{T},{H}]", "backward": f"bf16[{B},{T},{N * 128}]"}
    for kernel in report.kernels:
        way, products = ("forward", 2) if "forward" in kernel.name else ("backward", 5)
        instruction = call(kernel.name, 2 * products * pairs * 128)
        seconds, _ = kernel_time.seconds(instruction, chips.get("v4"), 0.0, ["s32[64]", queries[way]])
        assert seconds == pytest.approx(kernel.cycles / 1050e6, rel=0.02), kernel.name


def test_attention_is_slower_the_fewer_keys_a_query_sees():
    def efficiency(T, operands):
        flops = 4 * 8 * 128 * T * (T + 1) // 2
        return flops / 275e12 / kernel_time.seconds(call("flash_attention_forward.1", flops), chips.get("v4"), 0.0, operands)[0]

    assert efficiency(16_384, ["bf16[8,16384,64]"]) == pytest.approx(1 / (1.13 + 725 / 8192), rel=1e-3)
    assert efficiency(1024, ["bf16[8,1024,64]"]) == pytest.approx(1 / (1.13 + 725 / 512), rel=5e-3)
    assert efficiency(1024, []) == pytest.approx(1 / (1.13 + 725 / 2048))


@pytest.mark.parametrize("name, path, kernel", [
    ("grouped_matmul.25", "jit(f)/shard_map/grouped_matmul/pallas_call", "grouped_matmul"),
    ("closed_call.4", "jit(f)/transpose(jvp(grouped_matmul_dlhs))/pallas_call", "grouped_matmul_dlhs"),
    ("transpose_jvp_retention_backward__.1", "jit(f)/other", "retention_backward"),
    ("custom-call.7", "jit(f)/theirs/pallas_call", "theirs"),
])  # fmt: skip
def test_names(name, path, kernel):
    attributes = f'custom_call_target="tpu_custom_call", metadata={{op_name="{path}"}}'
    assert kernel_time.name(hlo.Instruction(name, "f32[]", "custom-call", (), attributes)) == kernel


def test_a_kernel_takes_the_longer_of_arithmetic_and_traffic():
    def seconds(flops, moved, name="retention_forward"):
        return kernel_time.seconds(call(f"{name}.1", flops, moved), chips.get("v4"), 1e9)

    assert seconds(10**12, 0) == (1e12 / (275e12 * kernel_time.EFFICIENCY["retention_forward"]), "kernel table")
    assert seconds(10**12, 0, "theirs") == (1e12 / (275e12 * kernel_time.OTHERS), "kernel table")
    assert seconds(1, 10**12) == (1e12 / 1.228e12, "kernel table")
    bare = hlo.Instruction("k.1", "f32[8]", "custom-call", (), "")
    assert kernel_time.seconds(bare, chips.get("v4"), 1e9) == (1e9 / 1.228e12, "unpriced")

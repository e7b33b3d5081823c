"""Every TPU kernel, forward and backward, compiled by the TPU compiler for every generation: what no interpreter notices.

Each `test_<op>_tpu*.py` gives `aot_cases()`: {"production": {name: (f, shapes)}, "odd": {name: (f, shapes)}}.
"""
import importlib
import time

import jax
import pytest

from effmodels.plan import topology

pytestmark = pytest.mark.aot
SECONDS = 10.0  # of processor time, per kernel, on a quiet core; two compilations that share a core's caches take up to twice that
OWNERS = ("flash_attention_tpu", "flash_attention_tpu_backward", "retention_tpu", "grouped_matmul_tpu", "linear_cross_entropy_tpu")


def collect(kind):
    """[(name, generation)] of one kind of case, and the cases by name."""
    cases = {}
    for owner in OWNERS:
        cases |= importlib.import_module(f"tests.pallas_kernels.test_{owner}").aot_cases()[kind]
    return cases


PRODUCTION, ODD = collect("production"), collect("odd")


def check(generation, f, shapes):
    topology.devices(generation)  # loading the compiler is not the kernel's time
    start = time.process_time()
    program = topology.compile_for(generation, f, *shapes)
    seconds = time.process_time() - start
    kernels = program.as_text().count('custom_call_target="tpu_custom_call"')
    assert kernels, "no kernel in the program"
    assert seconds < 2 * SECONDS * kernels, f"{seconds:.1f} s of processor time for {kernels} kernels"
    return program


@pytest.mark.parametrize("generation", topology.GENERATIONS)
@pytest.mark.parametrize("name", PRODUCTION)
def test_production_shapes(name, generation):
    check(generation, *PRODUCTION[name])


@pytest.mark.slow
@pytest.mark.parametrize("generation", topology.GENERATIONS)
@pytest.mark.parametrize("name", ODD)
def test_odd_shapes(name, generation):
    check(generation, *ODD[name])


def test_a_program_that_needs_too_much_memory_on_the_chip_is_an_error():
    """The test above can fail: 64 MiB blocks do not fit into a v4 core's 16 MiB."""
    from jax.experimental import pallas as pl

    def double(x):
        def kernel(x_ref, y_ref):
            y_ref[...] = x_ref[...] * 2

        block = pl.BlockSpec((4096, 4096), lambda i: (i, 0))
        return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), grid=(2,), in_specs=[block], out_specs=block)(x)

    with pytest.raises(Exception, match="(?i)vmem|exceed|RESOURCE_EXHAUSTED"):
        topology.compile_for("v4", double, jax.ShapeDtypeStruct((8192, 4096), jax.numpy.float32))

"""What the tests of the TPU kernels share: a look into their jaxprs, and runs under the race detector."""
import os
import pathlib
import subprocess
import sys
import textwrap

import jax

_NO_RACES = """
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
assert not interpret_pallas_call.races.races_found
print("no races")
"""


def equations(jaxpr):
    """Every equation of a jaxpr, those in its kernels included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def assert_float32_products(jaxpr, at_least):
    """A TPU rounds float32 operands to bfloat16 unless told otherwise, which interpretation hides."""
    dots = [equation for equation in equations(jaxpr) if equation.primitive.name == "dot_general"]
    assert len(dots) >= at_least, f"{len(dots)} products"
    highest = jax.lax.Precision.HIGHEST
    for dot in dots:
        assert dot.params["precision"] in (highest, (highest, highest)), dot


def assert_no_races(program):
    """Runs a program with `pltpu.InterpretParams(detect_races=True, ...)` in a process of its own.

    jax 0.12 raises on a race and then needs a fresh interpreter; jax 0.10 prints it and takes a note.
    """
    root = pathlib.Path(__file__).parents[2]
    program = textwrap.dedent(program) + _NO_RACES
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=280,
                          env={**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"})
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "no races" in done.stdout and "RACE" not in said, said[-3000:]

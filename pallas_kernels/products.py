"""Matrix products of the `xla` forms: operands as they come, sums in the accumulator's dtype."""
import functools

import jax
import jax.numpy as jnp


def product(equation, x, y, dtype):
    """einsum(equation, x, y) with sums and result in `dtype`.

    On a CPU half-precision operands are widened first. The result is the same, products of two bfloat16 numbers being exact in float32, but
    some layouts of such a product are not implemented there ("DotThunk BF16 x BF16 = F32", jax 0.10 and 0.12), and which ones are chosen
    depends on what the compiler fuses around them.
    """
    # Float32 operands are multiplied as such: the default of a TPU rounds them to bfloat16, that of a GPU to tf32.
    multiply = functools.partial(jnp.einsum, equation, precision="highest")
    if x.dtype == y.dtype == dtype:
        return multiply(x, y)

    def widened(x, y):
        return multiply(x.astype(dtype), y.astype(dtype))

    def as_they_are(x, y):
        return jnp.einsum(equation, x, y, preferred_element_type=dtype)

    return jax.lax.platform_dependent(x, y, cpu=widened, default=as_they_are)

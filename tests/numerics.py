"""How close two tensors are, said the same way everywhere: relative root-mean-square error of a named tensor."""
import jax
import numpy as np


def relative_rms(got, want, floor=0.0):
    """RMS(got - want) / max(RMS(want), floor), both sides in float64."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"shapes differ: got {got.shape}, want {want.shape}"
    if got.size == 0:
        return 0.0
    scale = max(float(np.sqrt(np.mean(want**2))), floor, np.finfo(np.float64).tiny)
    return float(np.sqrt(np.mean((got - want) ** 2))) / scale


def assert_close(name, got, want, rel, floor=0.0):
    """Fails with the name, the error and the bound; NaNs never pass. `floor` is an RMS below which a tensor counts as zero."""
    error = relative_rms(got, want, floor)
    assert error <= rel, f"{name}: relative RMS error {error:.3e} exceeds {rel:.1e}"


def assert_trees_close(got, want, rel, floor=0.0):
    """`assert_close` on every leaf, named by its path."""
    got_leaves, got_tree = jax.tree_util.tree_flatten_with_path(got)
    want_leaves, want_tree = jax.tree_util.tree_flatten_with_path(want)
    assert got_tree == want_tree, f"structures differ:\n{got_tree}\n{want_tree}"
    for (path, g), (_, w) in zip(got_leaves, want_leaves):
        assert_close(jax.tree_util.keystr(path), g, w, rel, floor)


def assert_as_accurate(name, got, want, naive, *, gradient=False, floor=0.0):
    """The two rules of the kernels: close to the float64 oracle `want`, and at most twice as far from it as a naive implementation.

    Args:
      got: the kernel's tensor; its dtype decides the bounds: float32 1e-5; bfloat16 4e-3, its gradients max(4e-3, twice naive).
      naive: the plain implementation's tensor in the same dtype of inputs.
      floor: 2^-8 times the RMS of the terms that sum to `want`, so that a true zero does not cry wolf.
    """
    half = jax.numpy.dtype(got.dtype).itemsize == 2
    naive_error = relative_rms(naive, want, floor)
    bound = 4e-3 if half else 1e-5
    if half and gradient:
        bound = max(bound, 2 * naive_error)
    assert_close(name, got, want, bound, floor)
    # Rounding that a tensor of few rows shares (one row's logsumexp, say) is a single draw: 4 units in the last place are no verdict.
    noise = 4 * float(jax.numpy.finfo(got.dtype).eps)
    error = relative_rms(got, want, floor)
    assert error <= 2 * naive_error + noise, f"{name}: error {error:.3e} is more than twice the naive implementation's {naive_error:.3e}"

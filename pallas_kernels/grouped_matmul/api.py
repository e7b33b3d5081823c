"""The public door of the grouped matmul: checks and choice of implementation.

M rows sorted by expert, K in, N out, E experts.
"""
import jax.numpy as jnp

from pallas_kernels import checks, dispatch

_OP = "grouped_matmul"


def grouped_matmul(lhs_MK, rhs_EKN, group_sizes_E, *, rhs_scale_EN=None, rhs_layout="EKN", implementation=None, interpret=None):
    """Row m times the matrix of its group, as `jax.lax.ragged_dot`: the first group_sizes[0] rows are group 0, and so on.

    Rows past the last group are 0 and get zero gradients; an empty group's matrix gets a zero gradient. The sizes must be >= 0 and
    sum to at most M (not checked: they live on the device).

    Args:
      lhs_MK: floating; the result has its dtype, sums are float32 (float64 for float64).
      rhs_EKN: same dtype as lhs, or int8 together with rhs_scale_EN.
      group_sizes_E: int [E].
      rhs_scale_EN: floating; matrix e is rhs[e] * rhs_scale[e]. Differentiable; int8 values are not.
      rhs_layout: "EKN", or "ENK": rhs is given transposed, and so is its gradient. Without rhs_scale_EN.
      implementation: None, "reference", "xla", "pallas_tpu" or "pallas_gpu".
      interpret: for Pallas kernels; None interprets where the named kernel has no hardware.

    >>> import jax.numpy as jnp
    >>> grouped_matmul(jnp.ones((3, 2)), jnp.stack([jnp.eye(2), 2 * jnp.eye(2)]), jnp.array([1, 1])).tolist()
    [[1.0, 1.0], [2.0, 2.0], [0.0, 0.0]]
    """
    checks.rank(_OP, "lhs_MK", lhs_MK, "MK")
    checks.floating(_OP, "lhs_MK", lhs_MK)
    if rhs_layout not in ("EKN", "ENK") or rhs_layout == "ENK" and rhs_scale_EN is not None:
        given = f"{rhs_layout!r}{' with rhs_scale_EN' if rhs_scale_EN is not None else ''}"
        raise ValueError(f"{_OP}: rhs_layout={given}; expected 'EKN', or without rhs_scale_EN 'ENK'.")
    checks.rank(_OP, "rhs_EKN", rhs_EKN, rhs_layout)
    E, K, N = (rhs_EKN.shape[rhs_layout.index(dim)] for dim in "EKN")
    checks.shape(_OP, "lhs_MK", lhs_MK, (lhs_MK.shape[0], K), "K of rhs_EKN")
    checks.shape(_OP, "group_sizes_E", group_sizes_E, (E,), "one size per matrix of rhs_EKN")
    checks.integer(_OP, "group_sizes_E", group_sizes_E)
    if 0 in (lhs_MK.shape[0], E, K, N):
        raise ValueError(f"{_OP}: empty operand, lhs {lhs_MK.shape} rhs {rhs_EKN.shape}; M, K, N and E must be at least 1.")
    if rhs_EKN.dtype == jnp.int8:
        if rhs_scale_EN is None:
            raise ValueError(f"{_OP}: rhs_EKN is int8 without rhs_scale_EN; give the scale of shape {(E, N)}.")
    else:
        checks.floating(_OP, "rhs_EKN", rhs_EKN, like=("lhs_MK", lhs_MK))
    if rhs_scale_EN is not None:
        checks.shape(_OP, "rhs_scale_EN", rhs_scale_EN, (E, N), "E and N of rhs_EKN")
        checks.floating(_OP, "rhs_scale_EN", rhs_scale_EN)
    arguments = (*(None if x is None else jnp.asarray(x) for x in (lhs_MK, rhs_EKN, group_sizes_E, rhs_scale_EN)), rhs_layout == "ENK")
    return dispatch.pick(_OP, "multiply", implementation, interpret, arguments)(*arguments)

"""Rematerialisation: what kernels return has a name, so that a policy of `jax.checkpoint` can keep it instead of running them again."""
import jax
from jax.ad_checkpoint import checkpoint_name

NAME = "kernel"


def kept(outputs):
    """A pytree of a kernel's results, each named for `jax.checkpoint_policies.save_only_these_names`; called in forward rules."""
    return jax.tree.map(lambda x: checkpoint_name(x, NAME), outputs)

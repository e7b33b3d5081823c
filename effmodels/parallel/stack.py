"""Layers in a row: `stack` builds R equal modules as one with a leading `layers` dim, `scan` runs them.

Both work on split NNX state with plain JAX transforms: `nnx.scan`, `nnx.vmap` and `nnx.remat` behave differently across flax versions.
"""
import jax
from flax import nnx

from effmodels.config import named_remat

# What is kept for the backward pass; everything else is recomputed. Besides these: the names of `config.named_remat`.
REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def stack(build, keys):
    """build(key) for every key as one module: each array gains a leading dim, named `layers` in its ParamInfo.

    keys: a key array [R]. The values equal those of R separate calls bit for bit (threefry draws do not depend on batching).
    """
    graphdef = nnx.split(jax.eval_shape(build, keys[0]))[0]
    state = jax.vmap(lambda key: nnx.split(build(key))[1])(keys)
    return nnx.merge(graphdef, map_info(state, lambda info: info.stacked()))


def map_info(state, f):
    """The NNX state with every variable's ParamInfo replaced by f(info)."""

    def replace(variable):
        metadata = variable.get_metadata()
        return variable.replace(variable.get_value(), info=f(metadata["info"]))

    return jax.tree.map(replace, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def scan(f, stacked, carry, xs=None, *, shared=None, remat="none"):
    """carry, ys = scan of f(layer, carry, x) over the leading dim of `stacked`, a module made by `stack`.

    shared: a module that every repeat uses, passed as f(layer, carry, x, shared); closed over, so that its gradient sums over the repeats.
    xs: a pytree with leading dim R, or None. remat: as of `policy`, or "none".
    """
    graphdef, state = nnx.split(stacked)

    def body(carry, slices):
        layer_state, x = slices
        layer = nnx.merge(graphdef, layer_state)
        return f(layer, carry, x) if shared is None else f(layer, carry, x, shared)

    return jax.lax.scan(checkpointed(body, remat, in_scan=True), carry, (state, xs))


def checkpointed(f, remat, in_scan=False):
    """f, with `jax.checkpoint` by policy name."""
    if remat == "none":
        return f
    # Inside a scan the loop boundary already keeps the recomputation from being merged with the forward pass.
    return jax.checkpoint(f, policy=policy(remat), prevent_cse=not in_scan)


def policy(remat):
    """The `jax.checkpoint` policy of a name of REMAT_POLICIES, or of "save:heads,kernel+offload:embed"."""
    if remat in REMAT_POLICIES:
        return REMAT_POLICIES[remat]
    saved, offloaded = named_remat(remat)
    if not offloaded:
        return jax.checkpoint_policies.save_only_these_names(*saved)
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=saved, names_which_can_be_offloaded=offloaded, offload_src="device", offload_dst="pinned_host"
    )

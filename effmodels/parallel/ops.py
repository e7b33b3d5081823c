"""The door between models and kernels: each op takes whole arrays, derives specs from the rules and runs the kernel shard by shard.

A Pallas kernel under an automatic mesh cannot be partitioned by the compiler, so every op enters `jax.shard_map` over the whole mesh.
Without a mesh it calls the kernel. Rings and state passing over a sharded sequence belong here too.
Letters: B batch, T query time, S key time, N heads, K kv heads, H head dim, P value dim, D model, V vocab, E experts, M rows, F ffn.
"""
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

import pallas_kernels
from effmodels.config import ConfigError
from effmodels.parallel import axes, layouts, options, ring, state_passing, torus, ulysses, weight_ring


def run_sharded(f, arrays, out_dims):
    """f(**arrays) shard by shard; arrays = {name: (array or None, dim names)}, absent ones are left out.

    out_dims: a pytree of tuples of dim names, one per output. The local arrays of f have the sizes of one shard. An array's dim names may
    be a PartitionSpec instead.
    """
    arrays = {name: (a, dims) for name, (a, dims) in arrays.items() if a is not None}
    values = {name: a for name, (a, _) in arrays.items()}
    mesh = axes.current_mesh()
    if mesh is None:
        return f(**values)
    in_specs = {
        name: dims if isinstance(dims, PartitionSpec) else axes.checked_spec(a.shape, dims, mesh=mesh, array=name)
        for name, (a, dims) in arrays.items()
    }
    out_specs = jax.tree.map(axes.spec, out_dims, is_leaf=_is_dims)
    return _manual(lambda v: f(**v), mesh, (in_specs,), out_specs)(values)


def _manual(f, mesh, in_specs, out_specs):
    # Custom VJPs and kernels carry no replication types, hence check_vma=False; said here only.
    return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _is_dims(x):
    return isinstance(x, tuple) and all(d is None or isinstance(d, str) for d in x)


def weight_axes(dim, *row_dims):
    """The mesh axes that split a weight's dim inside an op over these rows; () without a mesh.

    An axis that splits the rows too is left out, and the weight gathered over it: shards of different rows must not be summed.
    """
    mesh, rules = axes.current_mesh(), axes.current_rules()
    if mesh is None:
        return ()
    taken = {a for row_dim in row_dims for a in axes.as_tuple(rules[row_dim])}
    return tuple(a for a in axes.as_tuple(rules[dim]) if a not in taken and mesh.shape.get(a, 1) > 1)


def _pieces(mesh_axes):
    return math.prod(axes.current_mesh().shape[a] for a in mesh_axes)


def attention(
    q_BTNH, k_BSKH, v_BSKP, *, segment_ids=None, kv_segment_ids=None, positions=None, kv_positions=None, sinks=None,
    return_residual=False, **attention_options,
):  # fmt: skip
    """`pallas_kernels.flash_attention` with batch, heads and time split by the rules; [B, T, N, P] in q's dtype, and the logsumexp
    [B, T, N] if asked for the residual: results over disjoint sets of keys are joined by `ring.joined`.

    Where the tensor axis does not divide the kv heads (with rules.kv_heads=none), they are repeated until it does. Over a split sequence
    the form of `parallel.attention` runs: a ring, all keys gathered, or an exchange of heads. No positions: those of the layout in force.
    """
    pieces, kv_heads = axes.shards("act_heads"), k_BSKH.shape[2]
    if kv_heads % pieces:
        repeats = math.lcm(kv_heads, pieces) // kv_heads
        k_BSKH, v_BSKP = jnp.repeat(k_BSKH, repeats, axis=2), jnp.repeat(v_BSKP, repeats, axis=2)
    form = options.current().attention if axes.shards("seq") > 1 else None
    if form == "all_gather" and positions is None:
        positions = layout_positions(q_BTNH)
        kv_positions = positions if k_BSKH.shape[1] == q_BTNH.shape[1] else layout_positions(k_BSKH)

    def kernel(q, k, v, **rest):
        rest |= {"return_residual": return_residual}
        if form in SPLIT_TIME_ATTENTION:
            return SPLIT_TIME_ATTENTION[form](q, k, v, axis=seq_axes(), layout=options.current().layout, **rest, **attention_options)
        return pallas_kernels.flash_attention(q, k, v, **rest, **attention_options)

    key_time = "seq" if form in SPLIT_TIME_ATTENTION else None
    if axes.shards("kv_seq") > 1:
        raise ConfigError(
            "rules.kv_seq: no form of attention joins keys that are split on their own; use rules.kv_seq=none (rules.seq with "
            "parallel.attention=ring splits queries and keys)."
        )
    heads, rows, key_rows = ("batch", "seq", "act_heads", None), ("batch", "seq"), ("batch", key_time)
    key_heads = ("batch", key_time, "act_heads", None)
    if form is not None:  # queries and keys of one shard are of different tokens: both sides need their own
        kv_positions = positions if kv_positions is None else kv_positions
        kv_segment_ids = segment_ids if kv_segment_ids is None else kv_segment_ids
    arrays = {
        "q": (q_BTNH, heads), "k": (k_BSKH, key_heads), "v": (v_BSKP, key_heads), "sinks": (sinks, ("act_heads",)),
        "segment_ids": (segment_ids, rows), "kv_segment_ids": (kv_segment_ids, key_rows),
        "positions": (positions, rows), "kv_positions": (kv_positions, key_rows),
    }  # fmt: skip
    return run_sharded(kernel, arrays, (heads, heads[:3]) if return_residual else heads)


def layout_positions(x_BT):
    """int32 [B, T]: the place in the row of every token under the layout in force, for an array that starts with [B, T]."""
    B, T = x_BT.shape[:2]
    return jnp.broadcast_to(layouts.order(options.current().layout, T, axes.shards("seq")), (B, T))


def seq_axes():
    """The mesh axes that split a sequence, as collectives take them."""
    return axes.as_tuple(axes.current_rules()["seq"])


SPLIT_TIME_ATTENTION = {"ring": ring.attend, "ulysses": ulysses.attend}


def retention(q_BTNH, k_BTNH, v_BTNP, log_decay, *, initial_state=None, segment_ids=None, output_final_state=False, **retention_options):
    """`pallas_kernels.retention` with batch, heads and time split by the rules; y [B, T, N, P], and the state [B, N, H, P] if asked.

    Over a split sequence every shard summarises its own tokens and the states pass from shard to shard (`state_passing`).
    """
    split_time = axes.shards("seq") > 1

    def kernel(q, k, v, log_decay, **rest):
        rest |= {"output_final_state": output_final_state, **retention_options}
        if split_time:
            return state_passing.retain(q, k, v, log_decay, axis=seq_axes(), layout=options.current().layout, **rest)
        return pallas_kernels.retention(q, k, v, log_decay, **rest)

    heads, state = ("batch", "seq", "act_heads", None), ("batch", "act_heads", None, None)
    decay_dims = ("act_heads",) if log_decay.ndim == 1 else ("batch", "seq", "act_heads")
    arrays = {
        "q": (q_BTNH, heads), "k": (k_BTNH, heads), "v": (v_BTNP, heads), "log_decay": (log_decay, decay_dims),
        "initial_state": (initial_state, state), "segment_ids": (segment_ids, ("batch", "seq")),
    }  # fmt: skip
    return run_sharded(kernel, arrays, (heads, state) if output_final_state else heads)


def project(spec, x, w, dim_names, dtype=None):
    """einsum(spec, x, w) of rows x[batch(, time), in] and a weight w[in, out] with these dim names (None: not known), in `dtype` or x's.

    With `parallel.gradient_sum=ring` the gradient of a weight that is split over axes which also split the rows is summed by
    `weight_ring`; of other weights, and of other einsums, the compiler sums it.
    """
    if options.current().gradient_sum == "ring" and dim_names and weight_ring.placed(spec, dim_names):
        return _project(spec, tuple(dim_names), dtype, x, w)
    return jnp.einsum(spec, x, w, preferred_element_type=dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _project(spec, dim_names, dtype, x, w):
    return jnp.einsum(spec, x, w, preferred_element_type=dtype)


def _project_fwd(spec, dim_names, dtype, x, w):
    return _project(spec, dim_names, dtype, x, w), (x, w)


def _project_bwd(spec, dim_names, dtype, residuals, dy):
    x, w = residuals
    (dx,) = jax.vjp(lambda x: jnp.einsum(spec, x, w, preferred_element_type=dtype), x)[1](dy)
    mesh, place = axes.current_mesh(), weight_ring.placed(spec, dim_names)
    axes.checked_spec(w.shape, dim_names, mesh=mesh, array="weight")
    gradient = functools.partial(weight_ring.gradient, place, dims=torus.rings(place.scattered, mesh.shape))
    return dx, _manual(gradient, mesh, (place.x_spec, place.y_spec), place.w_spec)(x, dy).astype(w.dtype)


_project.defvjp(_project_fwd, _project_bwd)


def grouped_matmul(lhs_MK, rhs_EKN, group_sizes_E, **options):
    """`pallas_kernels.grouped_matmul` on the local rows; call it inside `run_sharded`, where rows are already sorted by group."""
    return pallas_kernels.grouped_matmul(lhs_MK, rhs_EKN, group_sizes_E, **options)


def embedding(table_VD, tokens_BT):
    """The table's rows for each token, [B, T, D]; every vocabulary shard looks up its own rows and the shards add up."""
    split = weight_axes("vocab", "batch", "seq")
    if split and table_VD.shape[0] % _pieces(split):
        split = ()

    def local(table, tokens):
        if not split:
            return table[tokens]
        own = tokens - jax.lax.axis_index(split) * table.shape[0]
        here = (own >= 0) & (own < table.shape[0])
        return jax.lax.psum(jnp.where(here[..., None], table[jnp.where(here, own, 0)], 0), split)

    arrays = {"table": (table_VD, PartitionSpec(split or None, None)), "tokens": (tokens_BT, ("batch", "seq"))}
    return run_sharded(local, arrays, ("batch", "seq", None))


def linear_cross_entropy(x_BTD, w, labels_BT, *, w_layout, **options):
    """Head matmul and cross entropy without the logits: (loss_BT, lse_BT), float32, vocab-parallel where the rules split the vocabulary.

    A vocabulary that does not divide is used whole and the tokens are split over the tensor axis instead.
    """
    mesh = axes.current_mesh()
    vocab = w.shape[1] if w_layout == "DV" else w.shape[0]
    vocab_axes = weight_axes("act_vocab", "batch", "seq")
    flat = functools.partial(_flat_linear_cross_entropy, w_layout=w_layout, **options)
    if mesh is None:
        return flat(x_BTD, w, labels_BT)
    pieces = _pieces(vocab_axes)
    split_vocab = pieces > 1 and vocab % pieces == 0
    rows = axes.spec(("batch", "seq"), mesh=mesh, array="tokens")
    if not split_vocab and pieces > 1 and x_BTD.shape[1] % (pieces * axes.shards("seq")) == 0:
        rows = PartitionSpec(rows[0], axes.as_tuple(rows[1]) + vocab_axes)
    w_spec = PartitionSpec(*((None, vocab_axes) if w_layout == "DV" else (vocab_axes, None))) if split_vocab else PartitionSpec()
    body = functools.partial(_vocab_parallel, flat=flat, vocab_axes=vocab_axes, w_layout=w_layout) if split_vocab else flat
    return _manual(body, mesh, (PartitionSpec(*rows, None), w_spec, rows), (rows, rows))(x_BTD, w, labels_BT)


def _flat_linear_cross_entropy(x_BTD, w, labels_BT, **options):
    B, T, D = x_BTD.shape
    loss_M, lse_M = pallas_kernels.linear_cross_entropy(x_BTD.reshape(B * T, D), w, labels_BT.reshape(B * T), **options)
    return loss_M.reshape(B, T), lse_M.reshape(B, T)


def _vocab_parallel(x_BTD, w, labels_BT, *, flat, vocab_axes, w_layout):
    """One shard of the vocabulary: its log-sum-exp and, if it holds the label, the label's logit; then combined over the shards."""
    size = w.shape[1] if w_layout == "DV" else w.shape[0]
    local_labels = labels_BT - jax.lax.axis_index(vocab_axes) * size
    # A label outside the shard adds no logit: then loss = lse.
    loss_BT, lse_BT = flat(x_BTD, w, jnp.where((local_labels >= 0) & (local_labels < size), local_labels, -1))
    peak_BT = jax.lax.pmax(jax.lax.stop_gradient(lse_BT), vocab_axes)
    total_BT = jnp.log(jax.lax.psum(jnp.exp(lse_BT - peak_BT), vocab_axes)) + peak_BT
    label_logit_BT = jax.lax.psum(lse_BT - loss_BT, vocab_axes)
    return total_BT - label_logit_BT, total_BT

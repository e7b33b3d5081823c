"""Whether two configs are of the same model, whatever they say about training."""
import dataclasses

from effmodels.models.resolve import resolve

# How a model is trained or run, not what it computes.
RUNNING = {"dropout", "z_loss", "param_dtype", "compute_dtype", "scan_layers", "scan_neighbours", "remat", "implementation"}
RUNNING_PARTS = {"balance", "balance_coef", "z_coef", "capacity_factor", "bias_update_rate", "chunk"}
LAYERS = {"pattern", "channel", "prefix", "suffix", "mixers", "channels"}


def differences(ours, theirs):
    """['field=what only the first config says', ...] between two ModelConfigs (or mappings), parts compared layer by layer."""
    a, b = resolve(ours), resolve(theirs)
    found = [
        f"{f.name}={getattr(a.config, f.name)!r}" for f in dataclasses.fields(a.config)
        if f.name not in RUNNING | LAYERS and getattr(a.config, f.name) != getattr(b.config, f.name)
    ]  # fmt: skip
    for i, (x, y) in enumerate(zip(a.layers, b.layers)):
        for what in ("mixer", "channel"):
            found += [f"layers.{i}.{what}.{text}" for text in _parts(getattr(x, what), getattr(y, what), a.env)]
    return found


def _parts(a, b, env):
    if a.cls is not b.cls:
        return [f"kind={a.cls.__name__}"]
    mine, other = sizes(a.config, env), sizes(b.config, env)
    return [f"{n}={v!r}" for n, v in mine.items() if n not in RUNNING_PARTS and v != other[n]]


def sizes(config, env):
    """The fields of a part's Config, with sizes that it leaves to the model filled in."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    if fields.get("num_kv_heads", 0) is None:
        fields["num_kv_heads"] = fields["num_heads"]
    if fields.get("head_dim", 0) is None:
        fields["head_dim"] = env.d_model // fields["num_heads"]
    if fields.get("value_dim", 0) is None:
        fields["value_dim"] = 2 * fields["head_dim"]
    if fields.get("hidden", 0) is None:
        from effmodels.channel.mlp import hidden_size

        fields["hidden"] = hidden_size(config, env)
    return fields

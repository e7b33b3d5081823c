"""Whether two configs are of the same model, whatever they say about training."""
import dataclasses

from effmodels.mixers.gated_delta import GatedDelta
from effmodels.mixers.lightning import decay_rates
from effmodels.mixers.ssd import SSD
from effmodels.models import mtp
from effmodels.models.resolve import resolve

# How a model is trained or run, not what it computes.
RUNNING = {"dropout", "z_loss", "param_dtype", "compute_dtype", "scan_layers", "scan_neighbours", "remat", "implementation"}
RUNNING_PARTS = {"balance", "balance_coef", "z_coef", "capacity_factor", "bias_update_rate", "chunk"}
LAYERS = {"pattern", "channel", "prefix", "suffix", "mixers", "channels", "residual_scales", "mtp"}


def differences(ours, theirs):
    """['field=what only the first config says', ...] between two ModelConfigs (or mappings), parts compared layer by layer."""
    a, b = resolve(ours), resolve(theirs)
    ahead = [dataclasses.replace(mtp.check(m.config.mtp), weight=0.0, mixer=None, channel=None) for m in (a, b)]
    found = [] if ahead[0] == ahead[1] else [f"mtp={dict(a.config.mtp)}"]
    if a.ahead and b.ahead:
        pairs = ((what, getattr(a.ahead, what), getattr(b.ahead, what)) for what in ("mixer", "channel"))
        found += [f"mtp.{what}.{text}" for what, mine, other in pairs for text in _parts(mine, other, a.env)]
    found += [
        f"{f.name}={getattr(a.config, f.name)!r}" for f in dataclasses.fields(a.config)
        if f.name not in RUNNING | LAYERS and getattr(a.config, f.name) != getattr(b.config, f.name)
    ]  # fmt: skip
    for i, (x, y) in enumerate(zip(a.layers, b.layers)):
        for what in ("mixer", "channel"):
            mine, other = getattr(x, what), getattr(y, what)
            found += [f"layers.{i}.{what}.{text}" for text in _parts(mine, other, a.env)]
            scales = a.config.residual_scales.get(mine.name, (1.0, 1.0))
            if scales != b.config.residual_scales.get(other.name, (1.0, 1.0)):
                found.append(f"layers.{i}.{what}: residual_scales={scales}")
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
    if isinstance(config, SSD.Config):
        fields |= {"head_dim": config.head_dim or 2 * env.d_model // config.num_heads, "norm_eps": config.norm_eps or env.norm_eps}
    if isinstance(config, GatedDelta.Config):
        values = config.num_value_heads or config.num_heads
        fields |= {"num_value_heads": values, "norm_eps": config.norm_eps or env.norm_eps}
        fields["value_dim"] = config.value_dim or max(1, 2 * config.head_dim * config.num_heads // values)
    if "slopes" in fields:
        fields |= _lightning(config, env, fields["head_dim"])
    if fields.get("value_dim", 0) is None:
        fields["value_dim"] = 2 * fields["head_dim"]
    if fields.get("hidden", 0) is None:
        from effmodels.channel.mlp import hidden_size

        fields["hidden"] = hidden_size(config, env)
    if fields.get("shared_hidden", 0) is None:
        fields["shared_hidden"] = fields["shared_experts"] * fields["hidden"]
    return fields


def _lightning(config, env, head_dim):
    """Fields of a Lightning that have defaults of their own; rates of decay by their values, since several names may give the same."""
    return {
        "value_dim": config.value_dim or head_dim, "slopes": decay_rates(config, env.num_layers).tolist(), "layer_factor": None,
        "norm_groups": config.num_heads if config.norm_groups is None else config.norm_groups,
        "norm_eps": env.norm_eps if config.norm_eps is None else config.norm_eps,
        "scale": head_dim**-0.5 if config.scale is None else config.scale,
    }  # fmt: skip

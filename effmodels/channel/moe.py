"""Mixture of experts: a router in float32, dropless or with a capacity, shared experts, balance by loss or by bias.

Letters: B batch, T time, D model, F ffn of one expert, E experts, k choices per token, C capacity.
"""
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from effmodels.channel import routers
from effmodels.channel.base import ACTIVATIONS, ChannelMixer, LayerAux, activation
from effmodels.channel.mlp import MLP, hidden_size
from effmodels.config import ConfigError, nearest
from effmodels.layers.param import Buffer, ParamInfo, param, zeros
from effmodels.mixers.base import Cost
from effmodels.parallel.expert import expert_ffn


class MoE(ChannelMixer):
    """y = sum over the k chosen experts of weight * expert(x), plus the shared experts (DeepSeekMoE, arXiv:2401.06066)."""

    reports_load = True

    @dataclasses.dataclass(frozen=True)
    class Config:
        num_experts: int = 8
        top_k: int = 2
        hidden: int | None = None  # ffn width of one expert
        activation: str = "swiglu"
        swiglu_alpha: float = 1.702  # of "swiglu_clamped"
        swiglu_limit: float = 7.0  # likewise
        bias: bool = False  # every matrix of every expert, shared ones too, has a bias
        router: str = "softmax"  # or "sigmoid"
        normalize_weights: bool = True  # the k weights of a token sum to routed_scaling,
        weights_eps: float = 1e-20  # but for this, which is added to what they are divided by (LFM2: 1e-6)
        routed_scaling: float = 1.0
        groups: int = 1  # group-limited choice: the experts form this many groups,
        top_groups: int = 1  # and a token may use this many of them
        group_score: str = "top2"  # of a group: the sum of its two highest scores, or "max", its highest (DeepSeek-V2)
        shared_experts: int = 0  # experts that every token uses
        shared_hidden: int | None = None  # ffn width of all shared experts together; None: shared_experts times hidden
        shared_gate: bool = False  # their output times sigmoid(x w), a number per token (Qwen2-MoE)
        router_bias: bool = False  # a learned bias of the router's logits (gpt-oss)
        capacity_factor: float | None = None  # None: dropless; else C = ceil(factor * T * k / E) per row, while training
        balance: str = "row"  # balance loss per "row" or over the whole "batch"
        balance_coef: float = 0.01
        z_coef: float = 0.0
        bias_update_rate: float = 0.0  # > 0: loss-free balancing by a bias on the choice (usually 1e-3)

    @classmethod
    def check(cls, config, env):
        c = config
        if c.activation not in ACTIVATIONS:
            raise ConfigError(f"moe.activation: unknown {c.activation!r}.{nearest(c.activation, ACTIVATIONS)}")
        if c.router not in routers.SCORES:
            raise ConfigError(f"moe.router: unknown {c.router!r}.{nearest(c.router, routers.SCORES)}")
        if c.group_score not in routers.GROUP_SCORES:
            raise ConfigError(f"moe.group_score: unknown {c.group_score!r}.{nearest(c.group_score, routers.GROUP_SCORES)}")
        if c.balance not in ("row", "batch"):
            raise ConfigError(f"moe.balance: expected 'row' or 'batch', got {c.balance!r}.")
        if not 1 <= c.top_k <= c.num_experts:
            raise ConfigError(f"moe: top_k={c.top_k} must be between 1 and num_experts={c.num_experts}.")
        if c.groups < 1 or c.num_experts % c.groups or not 1 <= c.top_groups <= c.groups:
            raise ConfigError(
                f"moe: groups={c.groups} must divide num_experts={c.num_experts}, and top_groups={c.top_groups} must be in 1 .. groups."
            )
        if c.top_k > c.top_groups * (c.num_experts // c.groups):
            eligible = c.top_groups * (c.num_experts // c.groups)
            raise ConfigError(f"moe: top_k={c.top_k} exceeds the {eligible} experts of top_groups={c.top_groups} of {c.groups} groups.")

        if c.capacity_factor is not None and c.capacity_factor <= 0:
            raise ConfigError(f"moe: expected capacity_factor > 0 or None (dropless), got {c.capacity_factor}.")
        if not c.shared_experts and (c.shared_gate or c.shared_hidden is not None):
            raise ConfigError("moe: shared_gate and shared_hidden need shared_experts >= 1.")
        if c.swiglu_limit <= 0:
            raise ConfigError(f"moe: expected swiglu_limit > 0, got {c.swiglu_limit}.")
        if c.shared_experts < 0 or (c.hidden is not None and c.hidden < 1):
            raise ConfigError(f"moe: expected shared_experts >= 0 and hidden >= 1, got {c.shared_experts} and {c.hidden}.")

    def __init__(self, config, env, *, rngs):
        self.config, self.env = config, env
        D, E, F = env.d_model, config.num_experts, hidden_size(config, env)
        make = functools.partial(param, jax.random.normal, dtype=env.param_dtype)
        # The router stays in float32: bfloat16 scores tie, and ties make the choice depend on the order of experts.
        wide = jnp.promote_types(env.param_dtype, jnp.float32)
        self.router = param(jax.random.normal, rngs.params(), (D, E), ("embed", None), in_dims=("embed",), dtype=wide)
        self.w_in = make(rngs.params(), (E, D, F), ("expert", "embed", "expert_mlp"), in_dims=("embed",), batch_dims=("expert",))
        if ACTIVATIONS[config.activation][1] == 2:
            self.w_up = make(rngs.params(), (E, D, F), ("expert", "embed", "expert_mlp"), in_dims=("embed",), batch_dims=("expert",))
        self.w_out = make(rngs.params(), (E, F, D), ("expert", "expert_mlp", "embed"), in_dims=("expert_mlp",), batch_dims=("expert",))
        if config.bias:
            vector = functools.partial(param, zeros, in_dims=(), batch_dims=("expert",), dtype=env.param_dtype)
            for name in ("b_in", "b_up")[: ACTIVATIONS[config.activation][1]]:
                setattr(self, name, vector(rngs.params(), (E, F), ("expert", "expert_mlp")))
            self.b_out = vector(rngs.params(), (E, D), ("expert", "norm"))
        if config.shared_experts:
            self.shared = MLP(_shared_config(config, env), env, rngs=rngs)
        if config.shared_gate:
            self.shared_gate = make(rngs.params(), (D,), ("norm",), in_dims=("norm",))
        if config.router_bias:
            self.router_bias = param(zeros, rngs.params(), (E,), (None,), in_dims=(), dtype=wide)
        if config.bias_update_rate:
            self.bias = Buffer(jnp.zeros((E,), jnp.float32), info=ParamInfo((None,)))

    def __call__(self, x_BTD, ctx):
        c = self.config
        valid_BT = jnp.ones(x_BTD.shape[:2], bool) if ctx.segment_ids_BT is None else ctx.segment_ids_BT != 0
        wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
        logits_BTE = jnp.einsum("BTD,DE->BTE", x_BTD.astype(wide), self.router[...].astype(wide))
        if c.router_bias:
            logits_BTE = logits_BTE + self.router_bias[...].astype(wide)
        bias_E = self.bias[...] if c.bias_update_rate else None
        routing = routers.route(logits_BTE, bias_E, valid_BT, c, ctx.experts(c.top_k))
        load_BE = routers.loads(routing.ids_BTk, c.num_experts)
        kept, dropped_BTk, limit = routing, jnp.zeros((), bool), None
        if c.capacity_factor is not None and ctx.mode == "train":
            limit = capacity(c, x_BTD.shape[1])
            kept, dropped_BTk = routers.limit_capacity(routing, limit, ctx.layout)
        function, inputs = activation(c)
        names = ("in", "up")[:inputs]
        w_in = tuple(getattr(self, "w_" + n)[...] for n in names)
        biases = tuple(getattr(self, "b_" + n)[...] for n in (*names, "out")) if c.bias else ()
        # Decoding has few rows, which a bound in multiples of their mean would not fit.
        y_BTD, overflow = expert_ffn(
            x_BTD, kept.ids_BTk, kept.weights_BTk, w_in, self.w_out[...], function, biases=biases, capacity=limit,
            groups=(c.groups, c.top_groups), exact=ctx.mode != "train", return_overflow=True, implementation=self.env.implementation,
        )  # fmt: skip
        if c.shared_experts:
            y_BTD = y_BTD + self._shared(x_BTD, ctx)
        return y_BTD, self._aux(routing, load_BE, dropped_BTk, overflow, valid_BT)

    def _shared(self, x_BTD, ctx):
        y_BTD = self.shared(x_BTD, ctx)[0]
        if not self.config.shared_gate:
            return y_BTD
        return y_BTD * jax.nn.sigmoid(jnp.einsum("BTD,D->BT", x_BTD, self.shared_gate[...].astype(x_BTD.dtype)))[..., None]

    def _aux(self, routing, load_BE, dropped_BTk, overflow, valid_BT):
        c, load_E = self.config, jnp.sum(load_BE, axis=0)
        losses = {}
        if c.balance_coef:
            losses["moe_balance"] = c.balance_coef * routers.balance_loss(routing, load_BE, valid_BT, c.balance)
        if c.z_coef:
            losses["moe_z"] = c.z_coef * routers.z_loss(routing, valid_BT)
        metrics = {
            "moe_max_violation": routers.max_violation(load_E),
            "moe_drop_fraction": jnp.sum(dropped_BTk) / jnp.maximum(jnp.sum(load_E), 1.0),
            # Choices that found no room in the exchange (parallel.recv_bound): their outputs are NaN, and the step must fail.
            "moe_overflow": overflow,
        }
        return LayerAux(losses, load_E, jax.lax.stop_gradient(metrics))

    @classmethod
    def cost(cls, config, env, seq_len, dtype_bytes=2):
        D, E, F = env.d_model, config.num_experts, hidden_size(config, env)
        inputs = ACTIVATIONS[config.activation][1]
        expert, biases = (inputs + 1) * D * F, (inputs * F + D) * config.bias
        shared = MLP.cost(_shared_config(config, env), env, 1) if config.shared_experts else Cost(0, 0, 0, 0)
        shared_matrices = int(shared.flops) // 2 + D * config.shared_gate
        shared_vectors = shared.params - int(shared.flops) // 2
        active = D * E + config.top_k * expert + shared_matrices
        vectors = E * config.router_bias + shared_vectors
        # A row finds its expert's biases as a product with all of them.
        return Cost(
            params=D * E + E * (expert + biases) + shared_matrices + vectors,
            active_params=active + config.top_k * biases + vectors,
            flops=2 * active * seq_len,
            dense_flops=2 * (active + config.top_k * ((E - 1) * expert + E * biases)) * seq_len,
            decode_flops=2 * active,
        )


def capacity(config, seq_len):
    """Tokens that one expert takes of one row."""
    return max(1, math.ceil(config.capacity_factor * seq_len * config.top_k / config.num_experts))


def _shared_config(config, env):
    return MLP.Config(
        hidden=config.shared_hidden or config.shared_experts * hidden_size(config, env), activation=config.activation, bias=config.bias,
        swiglu_alpha=config.swiglu_alpha, swiglu_limit=config.swiglu_limit,
    )  # fmt: skip

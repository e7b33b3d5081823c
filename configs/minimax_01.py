"""MiniMax-Text-01 (arXiv:2501.08313): seven lightning layers to one of attention, 32 experts of which two, 456 B parameters.

The norms come before the residual splits off, and the stream is scaled as in DeepNorm (arXiv:2203.00555): by (2 L)^(1/4) of L layers.
"""
from configs import common


def get_config(arg=None):
    c = common.base()
    c.batch_size, c.seq_len, c.steps = 4096, 8192, 300_000
    c.model = common.model(
        vocab_size=200_064,
        d_model=6144,
        num_layers=80,
        pattern=("lightning",) * 7 + ("attention",),
        channel=("moe",),
        mixers={
            "lightning": {"num_heads": 64, "head_dim": 128, "qkv_activation": "silu", "qk_norm": False, "rotary_fraction": 0.0,
                          "norm_groups": 1, "norm_eps": 1e-6, "scale": 1.0},
            "attention": {"num_heads": 64, "num_kv_heads": 8, "head_dim": 128, "rotary_fraction": 0.5},
        },
        channels={"moe": {"num_experts": 32, "top_k": 2, "hidden": 9216, "balance": "batch", "balance_coef": 0.01}},
        norm_eps=1e-5,
        norm_position="input",
        residual_scales=deepnorm(80),
        compute_dtype="bfloat16",
    )  # fmt: skip
    c.expect.params, c.expect.active_params = 456.09e9, 48.39e9
    c.data.tokenizer = "bpe:200064"
    c.optim.lr, c.optim.warmup_steps = 2e-4, 2000
    c.mesh.data, c.mesh.fsdp = 1, -1
    c.train.remat, c.train.accumulation = "full", "scan"
    if arg == "small":
        common.small(c)
        c.model.num_layers, c.model.residual_scales = 8, deepnorm(8)
        c.model.mixers.lightning.update({"num_heads": 4, "head_dim": 32})
        c.model.mixers.attention.update({"num_heads": 4, "num_kv_heads": 2, "head_dim": 32})
        c.model.channels.moe.update({"num_experts": 4, "hidden": 64})
    elif arg:
        raise ValueError(f"configs/minimax_01.py: unknown argument {arg!r}; expected nothing or 'small'.")
    return c


def deepnorm(layers):
    """residual_scales of every part."""
    return dict.fromkeys(("lightning", "attention", "moe"), ((2 * layers) ** 0.25, 1.0))

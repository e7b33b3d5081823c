"""0.93 B parameters, 0.25 B active: seven retention layers to one of attention, fine-grained experts, Muon; what we would train."""
from configs import common


def get_config(arg=None):
    c = common.base()
    c.steps, c.batch_size, c.seq_len = 50_000, 512, 4096
    c.model = common.model(
        vocab_size=32_768,
        d_model=1024,
        num_layers=16,
        pattern=("retention",) * 7 + ("attention",),
        channel=("moe",),
        prefix=(("retention", "mlp"),),
        mixers={
            "retention": {"num_heads": 8, "head_dim": 128, "value_dim": 256},
            "attention": {"num_heads": 16, "num_kv_heads": 4, "head_dim": 64, "qk_norm": True},
        },
        channels={
            "mlp": {"hidden": 2816},
            "moe": {
                "num_experts": 64, "top_k": 6, "hidden": 256, "shared_experts": 1, "router": "sigmoid", "routed_scaling": 2.5,
                "bias_update_rate": 1e-3, "balance_coef": 0.0, "z_coef": 1e-4,
            },
        },
        tie_embeddings=True,
        compute_dtype="auto",
    )  # fmt: skip
    c.expect.params, c.expect.active_params = 932.68e6, 248.48e6
    c.data.tokenizer = "bpe:32768"
    c.optim.name, c.optim.lr, c.optim.schedule, c.optim.warmup_steps = "muon", 2e-3, "wsd", 1000
    c.train.remat = "full"
    if arg == "small":
        common.small(c)
        c.model.num_layers = 8
        c.model.mixers.retention.update({"num_heads": 4, "head_dim": 32, "value_dim": 64})
        c.model.mixers.attention.update({"num_heads": 4, "num_kv_heads": 2, "head_dim": 32})
        c.model.channels.mlp.hidden = 256
        c.model.channels.moe.update({"num_experts": 8, "top_k": 2, "hidden": 64})
    elif arg:
        raise ValueError(f"configs/hybrid_1b.py: unknown argument {arg!r}; expected nothing or 'small'.")
    return c

"""DeepSeekMoE 16B (arXiv:2401.06066, table 7): 64 fine-grained experts, six used, two shared; the first layer is dense."""
from configs import common


def get_config(arg=None):
    c = common.base()
    c.batch_size, c.seq_len = 4608, 4096
    c.steps = 2_000_000_000_000 // (c.batch_size * c.seq_len)
    c.model = common.model(
        vocab_size=102_400,
        d_model=2048,
        num_layers=28,
        channel=("moe",),
        prefix=(("attention", "mlp"),),
        mixers={"attention": {"num_heads": 16}},
        channels={
            "mlp": {"hidden": 10_944},
            "moe": {"num_experts": 64, "top_k": 6, "hidden": 1408, "shared_experts": 2, "normalize_weights": False, "balance_coef": 1e-3},
        },
        compute_dtype="bfloat16",
    )
    c.expect.params, c.expect.active_params = 16_375_728_128, 2_828_650_496
    c.data.tokenizer = "bpe:102400"
    c.optim.lr, c.optim.warmup_steps = 4.2e-4, 2000
    c.mesh.data, c.mesh.fsdp = 1, -1
    c.train.remat, c.train.accumulation = "full", "scan"
    if arg == "small":
        common.small(c)
        c.model.mixers.attention.num_heads, c.model.channels.mlp.hidden = 4, 256
        c.model.channels.moe.update({"num_experts": 8, "top_k": 2, "hidden": 64})
    elif arg:
        raise ValueError(f"configs/deepseek_moe_16b.py: unknown argument {arg!r}; expected nothing or 'small'.")
    return c

"""RetNet of 6.7 billion parameters (arXiv:2307.08621, table 2): 8 D^2 per retention, 4 D^2 per feed-forward layer, heads of 256 x 512.

    python -m experiments.plan --config=configs/retnet_6p7b.py --topology=v4:4x4x4
    python -m experiments.train --config=configs/retnet_6p7b.py:small

The paper trained rows of 2,048 tokens; the rows here are the 8,192 of its inference figures. Its vocabulary is not stated: 64,000.
"""
from configs import common


def get_config(arg=None):
    c = common.base()
    c.batch_size, c.seq_len = 512, 8192  # 4 M tokens
    c.steps = 100_000_000_000 // (c.batch_size * c.seq_len)
    c.model = common.model(
        vocab_size=64_000,
        d_model=4096,
        num_layers=32,
        pattern=("retention",),
        mixers={"retention": {"num_heads": 16, "decay": "paper"}},
        channels={"mlp": {"hidden": 8192, "activation": "gelu"}},
        norm="layernorm",
        tie_embeddings=True,
        compute_dtype="bfloat16",
    )
    c.expect.params = c.expect.active_params = 6.7052e9
    c.data.tokenizer = "bpe:64000"
    c.optim.lr, c.optim.schedule, c.optim.warmup_steps, c.optim.final_lr_ratio = 3e-4, "linear", 375, 0.0
    c.optim.b2, c.optim.weight_decay, c.optim.clip = 0.98, 0.05, 2.0
    c.mesh.data, c.mesh.fsdp = 1, -1
    c.train.remat, c.train.accumulation = "full", "scan"
    if arg == "small":
        common.small(c)
        c.model.mixers, c.model.channels = {"retention": {"num_heads": 4, "decay": "paper"}}, {"mlp": {"hidden": 256, "activation": "gelu"}}
    elif arg:
        raise ValueError(f"configs/retnet_6p7b.py: unknown argument {arg!r}; expected nothing or 'small'.")
    return c

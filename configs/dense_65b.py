"""A dense decoder of 65 billion parameters with the dimensions of LLaMA-65B (arXiv:2302.13971, table 2), for 1.4 T tokens.

    python -m experiments.plan --config=configs/dense_65b.py --topology=v4:8x8x16     # what it needs, before anything is rented
    python -m experiments.train --config=configs/dense_65b.py:small                   # the same code on a CPU
"""
from configs import common


def get_config(arg=None):
    c = common.base()
    c.batch_size, c.seq_len = 1024, 2048
    c.steps = 1_400_000_000_000 // (c.batch_size * c.seq_len)
    c.model = common.model(
        vocab_size=32_000,
        d_model=8192,
        num_layers=80,
        mixers={"attention": {"num_heads": 64}},
        channels={"mlp": {"hidden": 22_016}},
        compute_dtype="bfloat16",
    )
    c.expect.params = c.expect.active_params = 65.286e9
    c.data.tokenizer = "bpe:32000"
    c.optim.lr, c.optim.warmup_steps = 1.5e-4, 2000
    c.mesh.data, c.mesh.fsdp = 1, -1
    c.train.remat, c.train.accumulation = "full", "scan"
    if arg == "small":
        common.small(c)
        c.model.mixers, c.model.channels = {"attention": {"num_heads": 4}}, {"mlp": {"hidden": 344}}
    elif arg:
        raise ValueError(f"configs/dense_65b.py: unknown argument {arg!r}; expected nothing or 'small'.")
    return c

"""The shape on which other trainers were measured: 8,390,912 parameters, 4 layers of attention and SwiGLU, sequences of 512.

    python -m experiments.bench train --config=configs/reference_8m.py
"""
from configs import common


def get_config(arg=None):
    c = common.base()
    c.steps, c.batch_size, c.seq_len = 200, 4, 512
    c.model = common.model(
        vocab_size=8192,
        d_model=256,
        num_layers=4,
        pattern=("attention",),
        channel=("mlp",),
        mixers={"attention": {"num_heads": 4}},
        channels={"mlp": {"hidden": 1024, "activation": "swiglu"}},
    )
    c.expect.params = 8_390_912.0
    c.data.tokenizer = "bpe:8192"
    if arg == "small":
        c.steps, c.seq_len, c.optim.warmup_steps = 2, 64, 1
    elif arg:
        raise ValueError(f"configs/reference_8m.py: unknown argument {arg!r}; expected nothing or 'small'.")
    return c

"""A small hybrid of retention and attention with a MoE layer, on the source code of Python's standard library.

    python -m experiments.train --config=configs/quickstart.py

About two minutes on two CPU cores; ends near 2.06 bits per byte on files never trained on (gzip -9: 2.14, unigram: 4.51).
`:test` is the same model cut down to seconds, for the tests.
"""
from configs import common


def get_config(arg=None):
    c = common.base()
    c.steps, c.batch_size, c.seq_len = 600, 8, 256
    c.model = common.model(
        vocab_size=512,  # bytes and a few specials, room to spare
        d_model=128,
        num_layers=4,
        pattern=("retention", "attention"),
        channel=("mlp", "mlp", "mlp", "moe"),
        mixers={"retention": {"num_heads": 4, "head_dim": 32, "value_dim": 48}, "attention": {"num_heads": 4, "window": 128}},
        channels={"mlp": {"hidden": 384}, "moe": {"num_experts": 4, "top_k": 1, "hidden": 384, "bias_update_rate": 1e-3}},
        tie_embeddings=True,
        embed_scale=128**0.5,
    )
    c.expect.params, c.expect.active_params = 1.443e6, 1.001e6
    c.optim.lr, c.optim.warmup_steps = 5e-3, 30
    c.checkpoint.every_steps, c.eval.every_steps, c.log.every_steps = 200, 100, 20
    if arg == "test":
        c.steps, c.batch_size, c.seq_len = 6, 4, 64
        c.model.d_model, c.model.num_layers = 32, 4
        c.model.mixers = {"retention": {"num_heads": 2, "head_dim": 16, "value_dim": 16}, "attention": {"num_heads": 2, "window": 16}}
        c.model.channels = {"mlp": {"hidden": 64}, "moe": {"num_experts": 4, "top_k": 1, "hidden": 32, "bias_update_rate": 1e-3}}
        c.expect.params, c.expect.active_params = None, None
        c.checkpoint.every_steps = c.eval.every_steps = 3
        c.eval.batches, c.eval.sample_tokens, c.log.every_steps, c.optim.warmup_steps = 2, 8, 1, 2
    elif arg:
        raise ValueError(f"configs/quickstart.py: unknown argument {arg!r}; expected nothing or 'test'.")
    return c

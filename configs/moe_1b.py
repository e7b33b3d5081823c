"""One billion parameters, a third of them active: retention and attention three to one, sixteen experts of which each token uses two.

Wide and shallow: of three shapes of one billion, the one a TPU v4 is predicted to train at the largest share of its peak: docs/log.md.

    python -m experiments.train --config=configs/moe_1b.py            # a GPU, a TPU, or (hours per step) a 2-core CPU with 24 GB
    python -m experiments.train --config=configs/moe_1b.py:small      # one minute of the same code on a CPU
"""
from configs import common


def get_config(arg=None):
    c = common.base()
    c.steps, c.batch_size, c.seq_len = 20_000, 256, 2048
    c.model = common.model(
        vocab_size=32_768,
        d_model=2048,
        num_layers=8,
        pattern=("retention", "retention", "retention", "attention"),
        channel=("moe",),
        mixers={
            "retention": {"num_heads": 8, "head_dim": 128, "value_dim": 256},
            "attention": {"num_heads": 16, "num_kv_heads": 4, "head_dim": 128, "qk_norm": True},
        },
        channels={"moe": {"num_experts": 16, "top_k": 2, "hidden": 1024, "shared_experts": 1, "bias_update_rate": 1e-3}},
        tie_embeddings=True,
        compute_dtype="auto",  # bfloat16 on accelerators, float32 on a CPU, which multiplies bfloat16 more slowly
    )
    c.expect.params, c.expect.active_params = 1.0447e9, 0.3400e9
    c.data.tokenizer = "bpe:32768"
    # Adafactor: its moments are a few MB, so that float32 parameters, gradients and accumulator fit in 20 GB of host memory.
    c.optim.name, c.optim.lr, c.optim.warmup_steps = "adafactor", 1e-2, 500
    c.train.remat, c.train.accumulate_dtype = "full", "bfloat16"
    c.checkpoint.mode = "sync"
    if arg == "small":
        c.steps, c.batch_size, c.seq_len = 30, 16, 128
        c.model.vocab_size, c.model.d_model, c.model.num_layers = 2048, 128, 4
        c.model.mixers = {
            "retention": {"num_heads": 4, "head_dim": 32, "value_dim": 64},
            "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "qk_norm": True},
        }
        c.model.channels.moe.hidden = 128
        c.expect.params, c.expect.active_params = None, None
        c.data.tokenizer = "bpe:2048"
        c.optim.warmup_steps, c.train.micro_batch_size = 10, 8
        c.checkpoint.every_steps = c.eval.every_steps = 15
        c.eval.batches, c.log.every_steps = 4, 5
    elif arg:
        raise ValueError(f"configs/moe_1b.py: unknown argument {arg!r}; expected nothing or 'small'.")
    return c

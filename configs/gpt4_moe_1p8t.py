"""A mixture of experts with the size that GPT-4 is reported to have: 120 layers, 16 experts of 111 B, 2 of them used, 55 B shared.

    python -m experiments.plan --config=configs/gpt4_moe_1p8t.py --topology=v4:16x16x16
    python -m experiments.train --config=configs/gpt4_moe_1p8t.py:small

The report (SemiAnalysis, 10 July 2023) is unconfirmed and gives no dimensions: these are chosen to give its counts, 1,831 B in all and
277 B per token, with matrices that split over 8 and 16 chips and few keys and values to send round a split sequence (the report names
multi-query attention). Feed-forward layers are not gated; the vocabulary is 32,768.
"""
from configs import common


def get_config(arg=None):
    c = common.base()
    c.batch_size, c.seq_len = 1024, 8192  # 8.4 M tokens
    c.steps = 13_000_000_000_000 // (c.batch_size * c.seq_len)
    c.model = common.model(
        vocab_size=32_768,
        d_model=12_288,
        num_layers=120,
        channel=("moe",),
        mixers={"attention": {"num_heads": 128, "num_kv_heads": 16, "head_dim": 128}},
        channels={"moe": {"num_experts": 16, "top_k": 2, "hidden": 37_632, "activation": "gelu"}},
        compute_dtype="bfloat16",
    )
    c.expect.params, c.expect.active_params = 1.8309e12, 277.15e9
    c.data.tokenizer = "bpe:32768"
    c.optim.lr, c.optim.warmup_steps = 1e-4, 2000
    # 1,024 rows over data, fsdp and expert, four chips to a row; the weights of an expert are split over all that hold it, which on a
    # pod of 16 x 16 x 16 chips are two rings of 16: data, and fsdp with seq (docs/plans).
    c.mesh.data, c.mesh.fsdp, c.mesh.expert, c.mesh.seq = 16, -1, 16, 4
    c.rules.embed, c.parallel.gradient_rings, c.parallel.recv_bound = "data,fsdp,seq", "data,fsdp+seq", 2.0
    c.train.remat, c.train.accumulation = "full", "scan"
    if arg == "small":
        common.small(c)
        c.model.mixers = {"attention": {"num_heads": 4, "num_kv_heads": 2}}
        c.model.channels = {"moe": {"num_experts": 16, "top_k": 2, "hidden": 128, "activation": "gelu"}}
        c.mesh.data, c.mesh.fsdp, c.mesh.expert, c.mesh.seq = -1, 1, 1, 1
        c.rules.embed, c.parallel.gradient_rings, c.parallel.recv_bound = "default", "", None
    elif arg:
        raise ValueError(f"configs/gpt4_moe_1p8t.py: unknown argument {arg!r}; expected nothing or 'small'.")
    return c

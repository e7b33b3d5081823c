"""gpt-oss-20b (arXiv:2508.10925) as released: windows of 128 in every second layer, sinks, 32 experts of which four, biases everywhere.

20.9 B parameters; 3.61 B per token besides the embedding table, the count of the model card. How it was trained is not published.
"""
from configs import common

YARN = {"kind": "yarn", "factor": 32.0, "original_length": 4096, "truncate": False}


def get_config(arg=None):
    c = common.base()
    c.batch_size, c.seq_len, c.steps = 1024, 4096, 500_000
    attention = {
        "kind": "attention", "num_heads": 64, "num_kv_heads": 8, "head_dim": 64, "rope_theta": 150_000.0, "rope_scaling": YARN,
        "sinks": True, "bias": True, "out_bias": True,
    }  # fmt: skip
    c.model = common.model(
        vocab_size=201_088,
        d_model=2880,
        num_layers=24,
        pattern=("local", "attention"),
        channel=("moe",),
        mixers={"local": attention | {"window": 127}, "attention": attention},
        channels={
            "moe": {
                "num_experts": 32, "top_k": 4, "hidden": 2880, "activation": "swiglu_clamped", "bias": True, "router_bias": True,
                "balance_coef": 1e-3,
            },
        },
        norm_eps=1e-5,
        compute_dtype="bfloat16",
    )  # fmt: skip
    c.expect.params, c.expect.active_params = 20_914_757_184, 4_187_440_704
    c.data.tokenizer = "bpe:201088"
    c.mesh.data, c.mesh.fsdp = 1, -1
    c.train.remat, c.train.accumulation = "full", "scan"
    if arg == "small":
        common.small(c)
        for mixer in c.model.mixers.values():
            mixer.update({"num_heads": 4, "num_kv_heads": 2, "head_dim": 32})
        c.model.mixers.local.window = 31
        c.model.channels.moe.update({"num_experts": 8, "top_k": 2, "hidden": 64})
    elif arg:
        raise ValueError(f"configs/gpt_oss_20b.py: unknown argument {arg!r}; expected nothing or 'small'.")
    return c

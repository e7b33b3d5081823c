"""Mixtral 8x7B (arXiv:2401.04088, table 1): eight experts, two used, weights by a softmax over the chosen two."""
from configs import common


def get_config(arg=None):
    c = common.base()
    c.batch_size, c.seq_len, c.steps = 512, 8192, 500_000
    c.model = common.model(
        vocab_size=32_000,
        d_model=4096,
        num_layers=32,
        channel=("moe",),
        mixers={"attention": {"num_heads": 32, "num_kv_heads": 8, "rope_theta": 1e6}},
        channels={"moe": {"num_experts": 8, "top_k": 2, "hidden": 14_336}},
        norm_eps=1e-5,
        compute_dtype="bfloat16",
    )
    c.expect.params, c.expect.active_params = 46_702_792_704, 12_879_925_248
    c.data.tokenizer = "bpe:32000"
    c.mesh.data, c.mesh.fsdp = 1, -1
    c.train.remat, c.train.accumulation = "full", "scan"
    if arg == "small":
        common.small(c)
        c.model.mixers.attention.update({"num_heads": 4, "num_kv_heads": 2})
        c.model.channels.moe.update({"num_experts": 4, "hidden": 128})
    elif arg:
        raise ValueError(f"configs/mixtral_8x7b.py: unknown argument {arg!r}; expected nothing or 'small'.")
    return c

"""A decoder of interleaved text and images in the style of Gemini 1.0 (arXiv:2312.11805): multi-query attention, images as tokens.

    python -m experiments.train --config=configs/gemini_style_multimodal.py:small
    python -m experiments.train --config=configs/gemini_style_multimodal.py:small --config.model.media.fusion=gate --workdir=runs/gate

The report publishes no sizes and describes no layer that routes between modalities: the sizes are ours, and `fusion` chooses how images
join the text, "soft_tokens" as in the report, or the learned "gate" per channel, or "concat" (docs/multimodal.md).
"""
from configs import common


def get_config(arg=None):
    c = common.base()
    c.batch_size, c.seq_len, c.steps = 512, 4096, 200_000
    c.model = common.model(
        vocab_size=256_128,
        d_model=2048,
        num_layers=24,
        mixers={"attention": {"num_heads": 16, "num_kv_heads": 1, "head_dim": 128}},
        channels={"mlp": {"hidden": 8192, "activation": "geglu"}},
        media={
            "encoder": {"kind": "vit", "image_size": 224, "patch": 14, "width": 1024, "num_layers": 24, "num_heads": 16},
            "resampler": {"kind": "perceiver", "latents": 64, "width": 1024, "num_layers": 4, "num_heads": 16, "head_dim": 64},
            "fusion": "soft_tokens",
            "images": 16,
        },
        tie_embeddings=True,
        embed_scale=2048**0.5,
        compute_dtype="bfloat16",
    )
    c.expect.params = c.expect.active_params = 2_302_225_408
    c.data.name, c.data.tokenizer = "shapes", "bpe:256000"
    c.rules.kv_heads = c.rules.act_kv_heads = "none"  # one head of keys for all
    c.optim.lr, c.optim.warmup_steps = 2e-4, 2000
    c.train.remat, c.train.accumulation = "full", "scan"
    c.eval.sample_prompt = "a "
    if arg == "small":
        common.small(c)
        c.model.embed_scale = 128**0.5
        c.model.mixers.attention.update({"num_heads": 4, "head_dim": 32})
        c.model.channels.mlp.hidden = 256
        common.small_media(c)
        c.model.media.images = 3
    elif arg:
        raise ValueError(f"configs/gemini_style_multimodal.py: unknown argument {arg!r}; expected nothing or 'small'.")
    return c

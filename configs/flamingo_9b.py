"""A model like Flamingo-9B (arXiv:2204.14198): text attends to its latest image in a gated block before every four layers of text.

    python -m experiments.train --config=configs/flamingo_9b.py:small

From the paper: layers 4096 wide with 32 heads, gates that start closed, a resampler of 64 latents (6 layers, 1536 wide, 16 heads of 128,
squared ReLU), five images in a row of 256 tokens. Not as there: a ViT-L/14 for the NFNet-F6, rotary positions, and all of it is
trained, since it begins from nothing. Once weights are loaded, optim.frozen=("embed", "media.encoder.*", "segments.0.blocks.[1-4].*") keeps
what the paper keeps.
"""
from configs import common


def get_config(arg=None):
    c = common.base()
    c.batch_size, c.seq_len, c.steps = 2048, 256, 500_000
    c.model = common.model(
        vocab_size=32_064,
        d_model=4096,
        num_layers=40,
        pattern=("cross_attention",) + ("attention",) * 4,
        channel=("gated_mlp",) + ("mlp",) * 4,
        mixers={"attention": {"num_heads": 32}, "cross_attention": {"num_heads": 32, "memory_dim": 1536, "memory_len": 320}},
        channels={
            "gated_mlp": {"hidden": 16_384, "activation": "relu2"},
            "mlp": {"hidden": 16_384, "activation": "gelu"},
        },
        media={
            "encoder": {"kind": "vit", "image_size": 224, "patch": 14, "width": 1024, "num_layers": 24, "num_heads": 16},
            "resampler": {"kind": "perceiver", "latents": 64, "width": 1536, "num_layers": 6, "num_heads": 16, "head_dim": 128},
            "fusion": "cross_attention",
            "images": 5,
        },
        tie_embeddings=True,
        compute_dtype="bfloat16",
    )  # fmt: skip
    c.expect.params = c.expect.active_params = 8_510_619_664
    c.data.name, c.data.tokenizer = "shapes", "bpe:32000"
    c.optim.lr, c.optim.schedule, c.optim.warmup_steps = 1e-4, "constant", 5000
    c.mesh.data, c.mesh.fsdp = 1, -1
    c.train.remat, c.train.accumulation = "full", "scan"
    c.eval.sample_prompt = "a "
    if arg == "small":
        common.small(c)
        c.model.num_layers = 5
        c.model.mixers.attention.num_heads = 4
        c.model.mixers.cross_attention.update({"num_heads": 4, "memory_dim": 64, "memory_len": 24})
        c.model.channels.gated_mlp.hidden = c.model.channels.mlp.hidden = 256
        common.small_media(c)
        c.model.media.images = 3
    elif arg:
        raise ValueError(f"configs/flamingo_9b.py: unknown argument {arg!r}; expected nothing or 'small'.")
    return c

"""A tiny model of every fusion, and a packed batch with images for it. Letters: T time, I images, D model, E width of the memory."""
import numpy as np

from effmodels.config import ModelConfig
from effmodels.multimodal.registry import FUSIONS
from tests.contract.cases import draw

T, I, D, E, TOKENS, VOCAB = 17, 3, 12, 10, 3, 23
ENCODER = {"kind": "vit", "image_size": 6, "patch": 3, "channels": 2, "width": 8, "num_layers": 2, "num_heads": 2, "hidden": 6}
RESAMPLER = {"kind": "perceiver", "latents": TOKENS, "width": E, "num_layers": 2, "num_heads": 2, "head_dim": 5,
             "hidden": 8, "max_frames": 2}  # fmt: skip
# Documents with two images, none, and one; the second image has room for two of its three soft tokens; padding behind.
DOCUMENTS = np.array([1] * 7 + [2] * 2 + [3] * 6 + [0] * 2, np.int32)
INDEX = np.array([1, 5, 10], np.int32)
OF_DOCUMENT = np.array([1, 1, 3], np.int32)
IMAGE_OF = {**dict.fromkeys(range(1, 5), 0), 5: 1, 6: 1, **dict.fromkeys(range(10, 15), 2)}  # token -> its latest image
NAMES = sorted(FUSIONS)


def config(fusion, layers=2, **fields):
    """A ModelConfig whose images join the text by this fusion."""
    mixers, pattern, channel = {"attention": {"num_heads": 2}}, ("attention",), ("mlp",)
    if fusion == "cross_attention":
        mixers["cross_attention"] = {"num_heads": 2, "head_dim": 4, "memory_dim": E, "memory_len": I * TOKENS}
        pattern, channel = ("cross_attention", "attention"), ("gated_mlp", "mlp")
    media = {"encoder": ENCODER, "resampler": RESAMPLER, "fusion": fusion, "images": I}
    return ModelConfig(
        vocab_size=VOCAB, d_model=D, num_layers=layers, pattern=pattern, channel=channel, mixers=mixers,
        channels={name: {"hidden": 8} for name in channel}, media=media, **fields,
    )  # fmt: skip


def batch(rows=1, seed=0, dtype=np.float64):
    """A batch of packed rows with three images each."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (rows, T + 1)).astype(np.int32)
    repeat = lambda a: np.repeat(a[None], rows, axis=0)  # noqa: E731
    return {
        "tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": repeat(DOCUMENTS),
        "weights": repeat((DOCUMENTS > 0).astype(np.float32)), "positions": repeat(np.arange(T, dtype=np.int32)),
        "source_patches": draw(rows, I, 4, 18, seed=seed + 1, dtype=dtype), "source_index": repeat(INDEX),
        "source_segment_ids": repeat(OF_DOCUMENT),
    }  # fmt: skip

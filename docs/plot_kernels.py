"""Draws docs/images/kernels.png, the figure of docs/kernels.md: python docs/plot_kernels.py docs/images/kernels.png (needs matplotlib)."""
import sys

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

NOT_VISITED, MASKED, FULL = 0.0, 0.45, 0.85


def attention(axes, blocks=16, window=5, global_blocks=1):
    """Tiles of a causal window of `window` blocks with global tokens in the first block."""
    q, k = np.arange(blocks)[:, None], np.arange(blocks)[None]
    gap = q - k
    seen = (gap >= 0) & ((gap <= window) | (k < global_blocks))
    edge = (gap == 0) | ((gap == window) & (k >= global_blocks))
    axes.imshow(np.where(seen, np.where(edge, MASKED, FULL), NOT_VISITED), cmap="Blues", vmin=0, vmax=1)
    grid(axes, blocks)
    axes.set(title="attention: tiles visited", xlabel="blocks of keys", ylabel="blocks of queries")


def retention(axes, chunks=4, size=4):
    """The triangle inside each chunk, and the state that passes from chunk to chunk."""
    t = np.arange(chunks * size)
    inside = (t[:, None] // size == t[None] // size) & (t[:, None] >= t[None])
    axes.imshow(np.where(inside, FULL, NOT_VISITED), cmap="Blues", vmin=0, vmax=1)
    grid(axes, chunks * size)
    for chunk in range(chunks - 1):
        corner = (chunk + 1) * size - 0.5
        ends = dict(xy=(corner + 1.5, corner + 1.5), xytext=(corner - 1.2, corner - 1.2))
        axes.annotate("", **ends, arrowprops=dict(arrowstyle="->", color="C3", lw=2))
        axes.text(corner + 0.6, corner - 0.6, "state", color="C3", fontsize=8)
    axes.set(title="retention: chunks and states", xlabel="keys", ylabel="queries")


def cross_entropy(axes, rows=6, columns=12):
    """One tile of logits at a time; what is kept of a row is its running log-sum-exp and the label's logit."""
    tiles = np.zeros((rows, columns))
    tiles[2, :5], tiles[2, 5] = 0.15, FULL
    tiles[:2] = 0.15
    axes.imshow(tiles, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    grid(axes, columns, rows)
    axes.set(title="cross entropy: one tile of logits", xlabel="blocks of the vocabulary", ylabel="blocks of tokens")


def grid(axes, columns, rows=None):
    axes.set_xticks(np.arange(columns + 1) - 0.5, [""] * (columns + 1))
    axes.set_yticks(np.arange((rows or columns) + 1) - 0.5, [""] * ((rows or columns) + 1))
    axes.grid(color="0.8", lw=0.5)
    axes.tick_params(length=0)


def main(target):
    figure, panels = plt.subplots(1, 3, figsize=(10, 3.6), dpi=130)
    for draw, axes in zip((attention, retention, cross_entropy), panels):
        draw(axes)
    figure.tight_layout()
    figure.savefig(target)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Draws the loss curve of a run: python docs/plot_loss.py runs/quickstart docs/images/quickstart_loss.png (needs matplotlib)."""
import json
import pathlib
import sys

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


def main(workdir, target):
    records = [json.loads(line) for line in (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    train = [(r["tokens"] / 1e6, r["loss"]) for r in records if "loss" in r]
    tokens = {r["step"]: r["tokens"] / 1e6 for r in records if "tokens" in r}
    held_out = [(tokens[r["step"]], r["eval_loss"]) for r in records if "eval_loss" in r and r["step"] in tokens]
    figure, axes = plt.subplots(figsize=(6, 3), dpi=150)
    axes.plot(*zip(*train), label="training")
    axes.plot(*zip(*held_out), "o", label="held-out files")
    axes.set_xlabel("million tokens")
    axes.set_ylabel("loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(target)


if __name__ == "__main__":
    main(*sys.argv[1:])

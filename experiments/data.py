"""Shows what a run is trained on: a batch as text, where each piece of it comes from, and the figures of the corpus.

    python -m experiments.data --config=configs/quickstart.py --split=train --batch=0 --rows=2
"""
import sys

import numpy as np
from absl import app, flags

import effmodels.data
from experiments import common

FLAGS = flags.FLAGS
_SPLIT = flags.DEFINE_enum("split", "train", ["train", "validation"], "Which windows to show")
_BATCH = flags.DEFINE_integer("batch", 0, "Which global batch, counted from the start of the run", lower_bound=0)
_ROWS = flags.DEFINE_integer("rows", 2, "How many rows of it", lower_bound=0)
_CHARS = flags.DEFINE_integer("chars", 600, "Characters of each document to print; 0: all", lower_bound=0)


def show(config, *, split="train", batch=0, rows=2, chars=600, out=print):
    """Prints the figures of the data of a config and some rows of one of its batches."""
    prepared = effmodels.data.prepare(config.data, config.seq_len, images=_images(config), log=out)
    _show_corpus(prepared, out)
    batches = effmodels.data.batches(prepared, batch_size=config.batch_size, seed=config.seed, split=split, start=batch, threads=0,
                                     repeat=split == "train")
    arrays = next(batches, None)
    if arrays is None:
        raise effmodels.data.DataError(f"--batch={batch}: the {split} split has {len(prepared.validation)} windows, "
                                       f"which is {-(-len(prepared.validation) // config.batch_size)} batches of {config.batch_size}.")
    used = int(arrays["weights"].sum())
    out(f"\n{split} batch {batch}: {len(arrays['tokens'])} rows of {config.seq_len} tokens, {used} targets "
        f"({used / arrays['weights'].size:.2%}), {int(arrays['target_bytes'].sum())} bytes")
    for r in range(min(rows, len(arrays["tokens"]))):
        _show_row(r, {name: value[r] for name, value in arrays.items()}, prepared, chars, out)


def _images(config):
    """What the model wants of its images, or None."""
    if not config.get("model", {}).get("media"):
        return None
    from effmodels.train.run_config import RunConfig
    from effmodels.train.sources import image_spec

    return image_spec(RunConfig.from_mapping(config).model)


def _show_corpus(prepared, out):
    info = prepared.info
    out(f"corpus      {info['corpus_hash']}")
    for corpus in info["corpora"]:
        out(f"  source    {corpus['name']} {' '.join(corpus['paths']) or ''} weight {corpus['weight']:g}, {corpus['windows']} windows, "
            f"file list sha256 {corpus['file_list_sha256']}")
    out(f"tokenizer   {info['tokenizer']} ({info['vocab_size']} ids), fingerprint {info['tokenizer_fingerprint'][:16]}")
    for name, prefix in (("train", ""), ("validation", "validation_")):
        documents, size, tokens = (info[prefix + field] for field in ("documents", "bytes", "tokens"))
        out(f"{name:<11} {documents} documents, {size} bytes, {tokens} tokens ({size / max(tokens, 1):.3f} bytes per token), "
            f"{info[prefix + 'windows']} windows of {info['seq_len']}, {info['packing']}: {info[prefix + 'efficiency']:.2%} filled")
    base = effmodels.data.baselines(prepared)
    out(f"baselines   unigram {base['unigram_bits_per_byte']:.3f}, gzip -9 {base['gzip_bits_per_byte']:.3f} bits per byte on validation")


def _show_row(r, row, prepared, chars, out):
    out(f"\n=== row {r}: window {int(row['window'])}, {int(row['weights'].sum())} targets")
    for s, (name, offset, size) in enumerate(effmodels.data.trace(row, prepared), start=1):
        ids = row["tokens"][np.flatnonzero(row["segment_ids"] == s)]
        text = prepared.tokenizer.decode(ids[ids < prepared.tokenizer.vocab_size])  # an image has an id of its own
        rest = f" [... {len(text) - chars} more characters]" if chars and len(text) > chars else ""
        out(f"--- document {s}: {name}, bytes {offset}..{offset + size}, {len(ids)} tokens\n{text[:chars] if chars else text}{rest}")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}; every option starts with --")
    try:
        show(common.CONFIG.value, split=_SPLIT.value, batch=_BATCH.value, rows=_ROWS.value, chars=_CHARS.value)
    except effmodels.data.DataError as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    common.run(main, "config")

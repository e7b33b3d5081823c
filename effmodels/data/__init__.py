'''Data: local text or a TFDS dataset -> ArrayRecord corpus -> token streams -> fixed windows on disk -> batches through Grain.

Everything is made once, before step 1, under a name that is a hash of what it was made from; a warm start opens memory-mapped windows
and imports neither TFDS nor a tokenizer library that it does not need.

    prepared = prepare(config.data, seq_len)           # .tokenizer .train .validation .info
    iterator = batches(prepared, batch_size=16, seed=0, process_index=p, process_count=n)      # or rows=[0, 5, ...] of each batch
    batch = next(iterator)                             # tokens, targets, weights, segment_ids, positions [B,T]; HOST_KEYS stay on the host
    state = iterator.state()                           # a small JSON dict; iterator.restore(state) on any number of processes
    trace({k: v[0] for k, v in batch.items()}, prepared)   # [(source, byte offset, bytes), ...]
    baselines(prepared)                                # {"unigram_bits_per_byte", "gzip_bits_per_byte"} of the validation split

Fields of config.data (`defaults()` gives them with their values):
    name              "local", or a TFDS dataset such as "lm1b" or "wiki40b/en"; for a model that reads images "shapes", "digits",
                      "idx_digits" or "idx_fashion" (images.registry)
    paths             files, folders, globs: text of any extension, .gz, .jsonl, .jsonl.gz, .parquet; empty: Python's standard library
    column            field of .jsonl records, column of .parquet files, feature of a TFDS dataset
    train_split, validation_split, data_dir            TFDS datasets only
    holdout           fraction of documents never trained on, by a hash of their names; of very few documents, the tail of the longest
    tokenizer         "bytes", "bpe:8192" (learned from the training split), a tokenizer.json, a SentencePiece .model
    bpe_train_bytes   the vocabulary is learned from at most so much text
    packing           "concat" (concatenate and split) or "best_fit"
    mixture           dicts with "weight" and any of name, paths, column, splits, data_dir, holdout; what is left out is taken from above
    cache_dir         empty: $EFFMODELS_DATA, else ~/.cache/effmodels
'''
from effmodels.data.api import Prepared, baselines, batches, import_libraries, prepare, trace
from effmodels.data.images.preprocess import ImageSpec
from effmodels.data.options import DataError, defaults
from effmodels.data.options import resolve as check
from effmodels.data.storage import DamagedError
from effmodels.data.tokenizer import Tokenizer, from_dict, load
from effmodels.data.windows import HOST_KEYS

__all__ = ["HOST_KEYS", "DamagedError", "DataError", "ImageSpec", "Prepared", "Tokenizer", "baselines", "batches", "check", "defaults",
           "from_dict", "import_libraries", "load", "prepare", "trace"]

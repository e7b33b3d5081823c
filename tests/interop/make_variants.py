"""Reference logits of the variants, by the code that makes the references: one JSON file per family in references/variants/.

    python -m tests.interop.make_variants [family ...]

Kept per variant: its tensors where they are not the base's, and the logits of the last tokens, which depend on all of the row.
"""
import base64
import json
import pathlib
import sys

import numpy as np

from tests.interop import variants
from tests.interop.make_references import computed

HERE = pathlib.Path(__file__).parent / "references" / "variants"
LENGTH, KEPT = 13, 3


def make(family):
    """{tokens, tensors of the base, variants: {name: {tensors that differ, null for none, logits}}}."""
    row = np.random.RandomState(2).randint(1, variants.BASES[family]["vocab_size"], LENGTH).tolist()
    found = {name: computed(variants.config(family, fields), [row])[1:] for name, fields in variants.HONOURED[family].items()}
    base = found["base"][0]
    return {"tokens": row, "tensors": base, "variants": {name: _kept(base, *result) for name, result in found.items()}}


def _kept(base, tensors, logits):
    other = {n: tensors.get(n) for n in {**base, **tensors} if base.get(n) != tensors.get(n)}
    last = np.ascontiguousarray(logits[0][-KEPT:], np.float32)
    return {"tensors": other, "logits": base64.b64encode(last.tobytes()).decode()}


def main(names):
    HERE.mkdir(exist_ok=True)
    for family in names or variants.BASES:
        reference = make(family)
        (HERE / f"{family}.json").write_text(json.dumps(reference, indent=0) + "\n")
        print(f"{family}: {len(reference['variants'])} variants", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

"""Reference logits of small random models, by `transformers` on a CPU in float32: one JSON file per case in references/.

    python -m tests.interop.make_references [case ...]

Needs torch, transformers 5 and for RetNet torchscale 0.3, which nothing else here does. Weights are not kept: `draws` makes them again from
the tensors' names.
"""
import base64
import json
import pathlib
import sys
import tempfile

import numpy as np

from tests.interop import bailing_oracle, minimax_oracle, retnet_oracles
from tests.interop.cases import CASES
from tests.interop.draws import weights

ORACLES = retnet_oracles.ORACLES | bailing_oracle.ORACLES | minimax_oracle.ORACLES
HERE = pathlib.Path(__file__).parent / "references"
LENGTHS = (19, 13)


def make(case):
    """The reference of one case: config.json, tensors with shapes, tokens and logits of rows, each computed alone."""
    fields = CASES[case]
    tokens = np.random.RandomState(1).randint(1, fields["vocab_size"], (len(LENGTHS), max(LENGTHS)))
    rows = [tokens[i, :n].tolist() for i, n in enumerate(LENGTHS)]
    config, tensors, logits = computed(fields, rows)
    return {
        "config": config,
        "tensors": tensors,
        "tokens": rows,
        "logits": [base64.b64encode(np.ascontiguousarray(r, np.float32).tobytes()).decode() for r in logits],
    }


def computed(fields, rows):
    """(config.json, {name: [dtype, *shape]}, logits of every row) by the independent code of a model type."""
    if fields["model_type"] in ORACLES:
        return fields, *ORACLES[fields["model_type"]](fields, weights, rows)
    return by_transformers(fields, rows)


def by_transformers(fields, rows):
    """(config.json, {name: [dtype, *shape]}, logits of every row) of a model of `transformers` with drawn weights."""
    import torch
    from safetensors.numpy import load_file, save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / "config.json").write_text(json.dumps(fields))
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), attn_implementation="eager").float().eval()
        model.save_pretrained(folder)
        file = pathlib.Path(folder) / "model.safetensors"
        saved = load_file(file)
        config_json = json.loads((pathlib.Path(folder) / "config.json").read_text())
        kept = {n for n, _ in model.named_buffers() if not n.endswith("bias")}  # tables that follow from the config
        drawn = {n: a if n in kept else weights(n, a.shape, fields["model_type"]) for n, a in saved.items()}
        save_file(drawn, file, metadata={"format": "pt"})
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
        with torch.no_grad():
            logits = [model(torch.tensor([row]), use_cache=False).logits[0].numpy() for row in rows]
    return config_json, {n: [str(a.dtype), *a.shape] for n, a in saved.items()}, logits


def main(names):
    for case in names or CASES:
        reference = make(case)
        logits = np.frombuffer(base64.b64decode(reference["logits"][0]), np.float32)
        (HERE / f"{case}.json").write_text(json.dumps(reference, indent=0) + "\n")
        print(f"{case}: {len(reference['tensors'])} tensors, logits rms {np.sqrt(np.mean(logits**2)):.3f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

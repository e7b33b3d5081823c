"""Defaults of every run, with what each field means. A config file calls `base()` and changes what it is about."""
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

DIMS = (
    "batch", "seq", "res_seq", "kv_seq", "act_embed", "act_heads", "act_kv_heads", "act_mlp", "act_vocab", "act_expert", "tokens",
    "embed", "heads", "kv_heads", "head_dim", "value_dim", "mlp", "expert", "expert_mlp", "vocab", "layers", "stage", "norm", "rank",
)  # fmt: skip


def base():
    """A run's config with every section; `model` is left to the config file."""
    c = ConfigDict()
    c.seed = 0
    c.steps = 1000
    c.batch_size = 32  # sequences per optimiser step, over all devices and processes
    c.seq_len = 512
    c.start_from = ""  # a run's folder or a Hugging Face folder: its weights instead of drawn ones (`experiments.train --start_from`)
    c.model = model()
    c.expect = ConfigDict({"params": placeholder(float), "active_params": placeholder(float)})  # checked within 0.1 % by the tests
    c.data = data()
    c.optim = optim()
    c.mesh = ConfigDict({"data": -1, "fsdp": 1, "seq": 1, "tensor": 1, "expert": 1, "stage": 1})  # one axis may be -1: what is left
    # Which mesh axes split a dim: "default" (effmodels.parallel.axes.DEFAULT_RULES), "none", or axes such as "data,fsdp".
    c.rules = ConfigDict({dim: "default" for dim in DIMS} | {"priority": ""})  # priority: dims that win where two want one axis
    c.parallel = parallel()
    c.distributed = ConfigDict(
        {
            "mode": "auto",  # "on": join the processes of a TPU pod, SLURM or MPI; auto: if the surroundings speak of several; "off"
            "coordinator": placeholder(str),  # elsewhere: host:port of process 0,
            "num_processes": placeholder(int),
            "process_id": placeholder(int),
            "timeout": 300,  # seconds to wait for the others
        }
    )
    c.train = train()
    c.checkpoint = ConfigDict(
        {
            "every_steps": 500,
            "keep": 2,  # newest ones kept
            "keep_best": 0,  # also the best ones by evaluation loss
            "mode": "auto",  # "async" copies the state and writes behind the run, "sync" streams it; auto: async where the copy fits
        }
    )
    c.eval = ConfigDict({"every_steps": 500, "batches": 16, "at_end": True, "sample_prompt": "def ", "sample_tokens": 200})
    c.log = ConfigDict({"every_steps": 10, "tensorboard": "auto", "profile_steps": ()})  # profile_steps = (first, last)
    return c


def small(c):
    """Cuts a large run down to the minute on a CPU that its `:small` form takes; the config sets its own mixers and channels."""
    c.steps, c.batch_size, c.seq_len = 30, 8, 128
    c.model.vocab_size, c.model.d_model, c.model.num_layers, c.model.compute_dtype = 512, 128, 4, "float32"
    c.expect.params, c.expect.active_params = None, None
    c.data.tokenizer = "bytes"
    c.optim.warmup_steps, c.train.accumulation = 10, "auto"
    c.checkpoint.every_steps = c.eval.every_steps = 15
    c.eval.batches, c.log.every_steps = 4, 5


def small_media(c):
    """Cuts the encoder and the resampler of a model down likewise: eight entries of 64 numbers for an image of 32 x 32 pixels."""
    c.model.media.encoder.update({"image_size": 32, "patch": 8, "width": 64, "num_layers": 2, "num_heads": 4})
    c.model.media.resampler.update({"latents": 8, "width": 64, "num_layers": 2, "num_heads": 4, "head_dim": 16})


def window_stages(num_layers, windows, **fields):
    """(pattern, mixers) of attention whose window depends on the depth: equal stages of layers, None = all keys. fields: of every mixer.

    >>> window_stages(4, (256, None), num_heads=8)[0]
    ('local_256', 'local_256', 'full', 'full')
    """
    names = ["full" if w is None else f"local_{w}" for w in windows]
    pattern = tuple(names[i * len(windows) // num_layers] for i in range(num_layers))
    return pattern, {n: {"kind": "attention", "window": w, **fields} for n, w in zip(names, windows) if n in pattern}


def pythia(layers, d_model, heads, lr, vocab_size=50_304):
    """A run of the Pythia suite (arXiv:2304.01373, table 1): GPT-NeoX layers, 143,000 steps of 2 M tokens in rows of 2,048."""
    c = base()
    c.batch_size, c.seq_len, c.steps = 1024, 2048, 143_000
    c.model = model(
        vocab_size=vocab_size,
        d_model=d_model,
        num_layers=layers,
        mixers={"attention": {"num_heads": heads, "rotary_fraction": 0.25, "bias": True, "out_bias": True}},
        channels={"mlp": {"hidden": 4 * d_model, "activation": "gelu_exact", "bias": True}},
        norm="layernorm",
        norm_eps=1e-5,
        residual="parallel",
        compute_dtype="bfloat16",
    )
    c.data.tokenizer = f"bpe:{vocab_size}"
    c.optim.lr, c.optim.warmup_steps = lr, 1430
    c.train.remat, c.train.accumulation = "full", "scan"
    return c


def retnet(layers, d_model, heads, lr, tokens=100_000_000_000):
    """A run of RetNet (arXiv:2307.08621, table 2): 8 D^2 per retention, 4 D^2 per feed-forward layer; a vocabulary of our own."""
    c = base()
    c.batch_size, c.seq_len = 2048, 2048
    c.steps = tokens // (c.batch_size * c.seq_len)
    c.model = model(
        vocab_size=64_000,
        d_model=d_model,
        num_layers=layers,
        pattern=("retention",),
        mixers={"retention": {"num_heads": heads, "decay": "paper"}},
        channels={"mlp": {"hidden": 2 * d_model, "activation": "gelu"}},
        norm="layernorm",
        tie_embeddings=True,
        compute_dtype="bfloat16",
    )
    c.data.tokenizer = "bpe:64000"
    c.optim.lr, c.optim.schedule, c.optim.warmup_steps, c.optim.final_lr_ratio = lr, "linear", 375, 0.0
    c.optim.b2, c.optim.weight_decay, c.optim.clip = 0.98, 0.05, 2.0
    c.train.remat, c.train.accumulation = "full", "scan"
    return c


def torchscale_retnet(layers, d_model, inner, heads, lr):
    """`retnet` with the sizes of torchscale's presets: values and gated feed-forward layers `inner` wide, RMSNorm, chunks of 512."""
    c = retnet(layers, d_model, heads, lr)
    c.model.mixers.retention.update({"value_dim": inner // heads, "decay": "torchscale", "chunk": 512})
    c.model.channels.mlp.update({"hidden": inner, "activation": "swiglu"})
    c.model.norm = "rmsnorm"
    return c


def ring_linear(layers, d_model, heads, group, inner, expert):
    """A Ring-linear-2.0 model (arXiv:2510.19338): of every `group` layers the last attends, the rest are lightning; one is dense."""
    c = base()
    c.batch_size, c.seq_len, c.steps = 4096, 4096, 35_000
    c.model = model(
        vocab_size=157_184,
        d_model=d_model,
        num_layers=layers,
        pattern=("lightning",) * (group - 1) + ("attention",),
        channel=("moe",),
        prefix=(("lightning", "mlp"),),
        mixers={
            "lightning": {"num_heads": heads, "head_dim": 128, "norm_groups": 4, "rope_theta": 600_000.0, "layer_factor": "ring"},
            "attention": {"num_heads": heads, "num_kv_heads": 4, "head_dim": 128, "qk_norm": True, "rotary_fraction": 0.5,
                          "rope_theta": 600_000.0},
        },
        channels={
            "mlp": {"hidden": inner},
            "moe": {
                "num_experts": 256, "top_k": 8, "hidden": expert, "shared_experts": 1, "router": "sigmoid", "groups": 8, "top_groups": 4,
                "routed_scaling": 2.5, "bias_update_rate": 1e-3, "balance_coef": 0.0, "z_coef": 3.5e-6,
            },
        },
        compute_dtype="bfloat16",
        scan_neighbours=True,
    )  # fmt: skip
    c.data.tokenizer = "bpe:157184"
    c.optim.lr, c.optim.warmup_steps = 3e-4, 2000
    c.train.remat, c.train.accumulation = "full", "scan"
    return c


def model(**fields):
    """The fields of effmodels.config.ModelConfig with their defaults, so that each can be set on the command line, and those given."""
    defaults = {
        "vocab_size": 512,
        "d_model": 128,
        "num_layers": 2,
        "pattern": ("attention",),  # names of token mixers; layer i is pattern[i % len]
        "channel": ("mlp",),  # likewise of channel mixers
        "prefix": (),  # (mixer, channel) pairs that replace the first layers
        "suffix": (),  # and the last
        "mixers": ConfigDict({}),  # name = {"kind": registry name (default: the name), **fields of its Config}
        "channels": ConfigDict({}),
        "sharing": ConfigDict({}),  # layers that use the same weights: {"channel": "neighbours:2", "rank": 8} (effmodels.models.sharing)
        "mtp": ConfigDict({}),  # modules that predict further tokens: {"depth": 1, "weight": 0.3} (effmodels.models.mtp)
        "media": ConfigDict({}),  # images beside the text: {"encoder": {"kind": "vit"}, "fusion": "gate"} (effmodels.multimodal.media)
        "norm": "rmsnorm",
        "norm_eps": 1e-6,
        "norm_offset": 0.0,  # added to the scales of norms; 1: scales are learned around zero
        "norm_position": "pre",
        "residual": "serial",
        "residual_scales": ConfigDict({}),  # {"moe": (3.5, 1.0)}: after this mixer the stream is 3.5 x + f, not x + f
        "tie_embeddings": False,
        "embed_scale": 1.0,
        "learned_positions": 0,  # rows of a learned table of positions; 0: none
        "logits_soft_cap": placeholder(float),
        "z_loss": 0.0,
        "dropout": 0.0,
        "mup_base_width": placeholder(int),
        "param_dtype": "float32",
        "compute_dtype": "float32",  # or "auto": bfloat16 on accelerators, float32 on a CPU
        "scan_layers": True,
        "scan_neighbours": False,  # inside a period too: a long one is a smaller program
        "remat": "none",
        "implementation": placeholder(str),
    }
    c = ConfigDict(defaults)
    c.update(fields)
    return c


def data():
    """Where text comes from and how it becomes windows; see effmodels.data."""
    return ConfigDict(
        {
            "name": "local",  # local text, or the name of a TensorFlow dataset such as "lm1b"
            "paths": (),  # files, folders, globs; empty: the standard library source of the Python that runs
            "column": "text",  # of .jsonl and .parquet files and of TensorFlow datasets
            "tokenizer": "bytes",  # or "bpe:8192", or the path of a tokenizer.json or SentencePiece model
            "packing": "concat",  # or "best_fit"
            "holdout": 0.02,  # share of documents never trained on
            "cache_dir": "",  # empty: $EFFMODELS_DATA, else ~/.cache/effmodels
        }
    )


def optim():
    """The optimiser and its schedule."""
    return ConfigDict(
        {
            "name": "adamw",  # adafactor, lion, muon, sgd, or any of optax by name
            "lr": 3e-4,
            "schedule": "cosine",  # linear, wsd, constant
            "warmup_steps": 100,
            "final_lr_ratio": 0.1,
            "decay_ratio": 0.1,  # wsd: the last share of the steps
            "b1": 0.9,
            "b2": 0.95,
            "eps": 1e-8,
            "weight_decay": 0.1,
            "clip": 1.0,  # global gradient norm; 0: off
            "frozen": (),  # shell patterns of parameters that stay as they are: "media.encoder.*"
            "options": ConfigDict({}),  # passed to the optimiser as they are
        }
    )


def parallel():
    """How the program is spread over the mesh; what it computes stays the same (docs/parallel.md)."""
    return ConfigDict(
        {
            "layout": "auto",  # of a row over mesh.seq: contiguous, zigzag, striped; auto: the shortest path for its attention layers
            "attention": "ring",  # over mesh.seq; or "all_gather" the keys, or "ulysses": exchange heads for tokens
            "states": "auto",  # recurrent states over mesh.seq pass in a "ring" or in "log" steps
            "experts": "auto",  # tokens over mesh.expert: "ragged", "padded"; "gather": the weights come to the tokens
            "recv_bound": placeholder(float),  # rows for one pair of shards, in multiples of the mean; None: the worst case
            "rounds": 1,  # over mesh.stage: how often a micro-batch goes round the stages (circular schedule)
            "zero1": False,  # the optimiser's state is split over mesh.data too
            "gradient_sum": "xla",  # of projections: by the compiler; "ring": while they are computed, by permutes (docs/parallel.md)
            "gradient_rings": "",  # "data,fsdp+seq": experts' gradients are summed along these rings of chips; empty: by the compiler
        }
    )


def train():
    """How a step runs; nothing here changes what it computes, but for rounding."""
    return ConfigDict(
        {
            "micro_batch_size": placeholder(int),  # sequences per forward and backward pass; None: the whole batch
            "accumulation": "auto",  # "scan" inside one program, "loop" over two programs; auto: loop when a step takes over 30 s
            "accumulate_dtype": "float32",
            "remat": "none",  # full, dots, dots_no_batch, or what to keep: "save:heads+offload:embed" (effmodels.config.named_remat)
            "batch_ramp": (),  # ((from, batch_size), ...), the first from 0, the last with the full batch_size
            "batch_ramp_unit": "steps",  # what `from` counts: "steps" or "tokens"
            "length_stages": (),  # ((from_step, seq_len), ...), the last with the full seq_len
            "compiler_options": "",  # of XLA: "xla_enable_async_all_gather=true,..."
        }
    )

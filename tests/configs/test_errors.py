"""What a person reads after a mistake in a config: the field, what was given, what was expected, the nearest that works."""
import subprocess
import sys

import pytest

from effmodels.config import ConfigError
from effmodels.models import Decoder, resolve
from effmodels.parallel import mesh
from effmodels.train.run_config import RunConfig
from effmodels.train.setup import Setup
from tests.configs.catalogue import ROOT, load


def changed(**fields):
    """The quickstart's `:test` config as a dict with fields set by dotted path (`model__d_model=5`)."""
    config = load("quickstart", "test").to_dict()
    for path, value in fields.items():
        *parents, last = path.split("__")
        section = config
        for name in parents:
            section = section.setdefault(name, {})
        section[last] = value
    return config


def replaced(section, value):
    return {**changed(), section: value}


MISTAKES = {
    "unknown section": (lambda: replaced("optimiser", {}), r"config: unknown section 'optimiser'\. Did you mean 'optim'\?"),
    "unknown model field": (lambda: changed(model__dmodel=8), r"model: unknown field 'dmodel'\. Did you mean 'd_model'\?"),
    "unknown train field": (
        lambda: changed(train__micro_batch=2),
        r"config\.train: unknown field 'micro_batch'\. Did you mean 'micro_batch_size'\?",
    ),
    "unknown checkpoint field": (lambda: changed(checkpoint__every=2), r"config\.checkpoint: unknown field 'every'\..*every_steps"),
    "unknown mixer field": (
        lambda: changed(model__mixers__retention__num_head=2),
        r"model\.mixers\.retention: unknown field 'num_head'\. Did you mean 'num_heads'\?",
    ),
    "unknown mixer": (
        lambda: changed(model__pattern=("retension", "attention")),
        r"model\.pattern: unknown token mixer 'retension'\. Did you mean 'retention'\? Available: attention, .*retention",
    ),
    "a pattern from the command line": (
        lambda: changed(model__pattern=("retention,attention",)),
        r"unknown token mixer 'retention,attention'.*Write a tuple as \('retention', 'attention'\)",
    ),
    "unknown kind": (
        lambda: changed(model__mixers={"local": {"kind": "atention"}}, model__pattern=("local",)),
        r"model\.mixers\.local\.kind: unknown token mixer 'atention'\. Did you mean 'attention'\?",
    ),
    "unknown channel mixer": (
        lambda: changed(model__channel=("moee",)),
        r"model\.channel: unknown channel mixer 'moee'\. Did you mean 'moe'\?",
    ),
    "unused definition": (
        lambda: changed(model__mixers__local={"kind": "attention", "num_heads": 2}),
        r"model\.mixers: 'local' is defined but no layer uses it",
    ),
    "indivisible heads": (
        lambda: changed(model__mixers__attention={"num_heads": 3}),
        r"attention: d_model=32 is not divisible by num_heads=3; valid: \[1, 2, 4\], or set head_dim",
    ),
    "indivisible kv heads": (
        lambda: changed(model__mixers__attention={"num_heads": 4, "num_kv_heads": 3}),
        r"attention: num_heads=4 is not divisible by num_kv_heads=3; valid: \[1, 2, 4\]",
    ),
    "indivisible retention heads": (
        lambda: changed(model__mixers__retention={"num_heads": 5}),
        r"retention: d_model=32 is not divisible by num_heads=5; valid: \[1, 2, 4\], or set head_dim",
    ),
    "no heads": (lambda: changed(model__mixers__attention={"num_heads": 0}), r"attention: expected num_heads.*at least 1, got num_heads=0"),
    "negative soft cap": (
        lambda: changed(model__mixers__attention={"num_heads": 2, "soft_cap": -1.0}),
        r"attention: expected soft_cap > 0 or None, got -1\.0",
    ),
    "unknown decay": (
        lambda: changed(model__mixers__retention={"num_heads": 2, "decay": "papers"}),
        r"retention\.decay: unknown schedule 'papers'; expected \['paper', 'torchscale'\] or",
    ),
    "too many experts per token": (
        lambda: changed(model__channels__moe__top_k=5), r"moe: top_k=5 must be between 1 and num_experts=4",
    ),
    "odd head": (lambda: changed(model__mixers__retention__head_dim=5), r"retention: head_dim=5 must be even"),
    "indivisible micro-batch": (
        lambda: changed(batch_size=12, train__micro_batch_size=5),
        r"batch_size=12 is not a multiple of train\.micro_batch_size=5; valid: \[1, 2, 3, 4, 6, 12\]",
    ),
    "text for a number": (lambda: changed(model__d_model="64"), r"model\.d_model: expected int, got '64' \(str\)"),
    "a fraction for a whole": (lambda: changed(model__d_model=64.5), r"model\.d_model: expected int, got 64\.5 \(float\)"),
    "a number for a flag": (lambda: changed(eval__at_end=1), r"config\.eval\.at_end: expected bool, got 1 \(int\)"),
    "a number for a section": (
        lambda: replaced("checkpoint", 3),
        r"config\.checkpoint: expected a mapping of CheckpointConfig fields, got 3",
    ),
    "no steps": (lambda: changed(steps=0), r"config\.steps: expected a positive integer, got 0"),
    "missing batch size": (lambda: replaced("batch_size", None), r"config\.batch_size: expected a positive integer, got None"),
    "missing model field": (lambda: replaced("model", {"d_model": 8}), r"model: vocab_size, num_layers must be given"),
    "unknown norm": (lambda: changed(model__norm="rmsnrom"), r"model\.norm: unknown 'rmsnrom'\. Did you mean 'rmsnorm'\?"),
    "unknown dtype": (lambda: changed(model__param_dtype="bf16"), r"model\.param_dtype: unknown 'bf16'.*bfloat16"),
    "unknown remat": (lambda: changed(train__remat="dot"), r"model\.remat: unknown 'dot'\. Did you mean 'dots'\?"),
    "unknown accumulation": (
        lambda: changed(train__accumulation="lop"),
        r"config\.train\.accumulation: unknown 'lop'\. Did you mean 'loop'\?",
    ),
    "unknown save mode": (lambda: changed(checkpoint__mode="fast"), r"config\.checkpoint\.mode: expected auto, sync or async, got 'fast'"),
    "unknown rule": (lambda: changed(rules={"head": "tensor"}), r"rules: unknown dim 'head'\. Did you mean 'heads'\?"),
    "unknown axis in a rule": (
        lambda: changed(rules={"heads": "tensors"}),
        r"rules\.heads: unknown mesh axis 'tensors'\. Did you mean 'tensor'\?",
    ),
    "too many layers around": (
        lambda: changed(model__prefix=(("attention", "mlp"),) * 3, model__suffix=(("attention", "mlp"),) * 2),
        r"prefix \(3 layers\) and suffix \(2\) exceed num_layers=4",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_in_a_config(mistake):
    make, message = MISTAKES[mistake]
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_mapping(make())


def test_compiler_options_are_typed_as_on_a_command_line():
    run = RunConfig.from_mapping(changed(train__compiler_options="xla_a=true, xla_b=-4,xla_c=two"))
    assert dict(run.train.compiler_options) == {"xla_a": True, "xla_b": -4, "xla_c": "two"}
    with pytest.raises(ConfigError, match="compiler_options: expected name=value,name=value, got 'xla_a'"):
        RunConfig.from_mapping(changed(train__compiler_options="xla_a"))


def test_a_decoder_checks_before_it_draws():
    with pytest.raises(ConfigError, match="Did you mean 'attention'"):
        Decoder({"vocab_size": 8, "d_model": 8, "num_layers": 1, "pattern": ("atention",)}, rngs=None)
    with pytest.raises(ConfigError, match="retention.decay: expected 2 numbers in"):
        resolve({"vocab_size": 8, "d_model": 8, "num_layers": 1, "pattern": ("retention",),
                 "mixers": {"retention": {"num_heads": 2, "decay": (0.5, 1.5)}}})  # fmt: skip


@pytest.mark.parametrize("sizes, message", [
    ({"tensors": 2}, r"mesh: unknown axis 'tensors'\. Did you mean 'tensor'\?"),
    ({"data": -1, "tensor": -1}, r"mesh: only one axis may be -1, got data, tensor"),
    ({"data": 0}, r"mesh: sizes must be positive"),
    ({"data": 1, "tensor": 3}, r"needs 3 devices, but 8 are here.*must be one of \[1, 2, 4, 8\], or exactly 8 without a -1"),
    ({"tensor": 3}, r"needs a multiple of 3 devices, but 8 are here.*\[1, 2, 4, 8\]"),
])
def test_mistake_in_a_mesh(sizes, message):
    with pytest.raises(ConfigError, match=message):
        mesh.sizes(sizes, 8)


def test_a_batch_that_the_mesh_cannot_split():
    message = r"config: batch_size=12 cannot be split over the 8 devices of the mesh's data, fsdp and expert axes; nearest: 8 or 16"
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_mapping(changed(batch_size=12)).mesh_sizes(8)
    with pytest.raises(ConfigError, match=r"train\.micro_batch_size=4 cannot be split over the 8 devices.*nearest: 8"):
        RunConfig.from_mapping(changed(batch_size=16, train__micro_batch_size=4)).mesh_sizes(8)


@pytest.mark.parametrize("fields, message", [
    ({"train__batch_ramp": ((0, 8), (3, 32))}, r"train\.batch_ramp ends at batch 32, but batch_size=16"),
    ({"train__batch_ramp": ((1, 8), (3, 16))}, r"train\.batch_ramp must begin at 0, not at 1"),
    ({"train__batch_ramp": ((0, 12), (3, 16))}, r"batch size 12 is not a multiple of the micro batch of 8 sequences; nearest: 8 or 16"),
    ({"train__batch_ramp": ((0, 8), (3, 16)), "train__accumulation": "scan"}, r"config\.train: a batch_ramp .*'scan' fixes.*'loop'"),
    ({"train__length_stages": ((0, 32), (3, 48))}, r"train\.length_stages ends at length 48, but seq_len=64"),
    ({"optim__schedule": "cosin"}, r"optim\.schedule='cosin' is unknown.*Did you mean 'cosine'"),
    ({"optim__name": "adamww"}, r"'adamww'.*Did you mean 'adamw'"),
    ({"optim__learning_rate": 1.0}, r"optim.*unknown field 'learning_rate'"),
])
def test_mistake_in_a_schedule(fields, message):
    """Refused when the run is set up: before data is read and before anything is compiled."""
    with pytest.raises(ConfigError, match=message):
        Setup(changed(batch_size=16, train__micro_batch_size=8, **fields), log=lambda *_: None)


@pytest.mark.subprocess
@pytest.mark.parametrize("arguments, message", [
    (["--config=configs/quickstart.py", "--config.optim.lrr=1"], 'Did you mean "lr" instead of "lrr"'),
    (["--config=configs/quickstart.py", "--config.model.d_model=abc"], "flag --config.model.d_model=abc: invalid literal for int"),
    (["--config=configs/quickstart.py:tets"], "configs/quickstart.py: unknown argument 'tets'; expected nothing or 'test'"),
    (["--config=configs/quickstrat.py"], "there is no file configs/quickstrat.py. Configs here:"),
    ([], "Flag --config must have a value other than None"),
])
def test_mistake_on_the_command_line(arguments, message):
    ran = subprocess.run([sys.executable, "-m", "experiments.train", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode != 0 and message in ran.stderr + ran.stdout, ran.stderr

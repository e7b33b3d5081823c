"""What the documents say is true: the table of mixers, every command, every file and target that they name."""
import re

import pytest

from effmodels.mixers.registry import MIXERS
from tests.configs.catalogue import arguments, load
from tests.contract.test_models import MESHES
from tests.docs.blocks import ROOT, code_block, table

DOCUMENTS = ["README.md", "CONTRIBUTING.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]
SOURCES = [p for folder in ("configs", "experiments", "colab") for p in (ROOT / folder).glob("*.py")]
WITH_COMMANDS = [*DOCUMENTS, *sorted(str(p.relative_to(ROOT)) for p in SOURCES)]
# Up to the end of the line, a backtick, a comment or a redirection; a backslash continues it.
COMMAND = re.compile(r"python3? -m experiments\.(\w+)((?:(?:[ \t]|\\\n)+[^\s`#>]+)*)")
COLUMNS = ["Mixer", "Train", "Decode", "Packed", "Sharded"]
MESH_AXES = {axis for sizes in MESHES.values() for axis in sizes}  # those that are compared with one device


def text_of(document):
    path = ROOT / document
    assert path.exists(), f"{document} is missing"
    return path.read_text()


def test_the_table_of_mixers_is_the_registry():
    """Train, decode and packed are contract tests over the registry, so every registered mixer says yes; sharded names tested axes."""
    rows = table("README.md", "## Mixers")
    assert list(rows[0]) == COLUMNS
    assert sorted(row["Mixer"].strip("`") for row in rows) == sorted(MIXERS)
    for row in rows:
        assert (row["Train"], row["Decode"], row["Packed"]) == ("yes", "yes", "yes"), row
        assert set(re.split(r",\s*", row["Sharded"])) == MESH_AXES, row


@pytest.mark.parametrize("document", WITH_COMMANDS)
def test_commands_exist(document):
    for command in COMMAND.finditer(text_of(document)):
        module, rest = command[1], command[2]
        source = ROOT / "experiments" / f"{module}.py"
        assert source.exists(), f"{document}: {command[0]!r}: there is no experiments/{module}.py"
        configs = re.findall(r"--config=configs/(\w+)\.py(?::(\w+))?", rest)
        for name, arg in configs:
            assert (ROOT / "configs" / f"{name}.py").exists(), f"{document}: there is no configs/{name}.py"
            assert not arg or arg in arguments(name), f"{document}: configs/{name}.py takes {arguments(name)}, not {arg!r}"
        for flag in re.findall(r"--(\w+)(?![\w.])", rest):
            defined = source.read_text() + (ROOT / "experiments" / "common.py").read_text()
            assert f'("{flag}"' in defined, f"{document}: experiments/{module}.py has no flag --{flag}"
        for key in re.findall(r"--config\.([\w.]+)=", rest):
            config = load(configs[0][0] if configs else "quickstart")
            for part in key.split("."):
                assert part in config, f"{document}: no field config.{key}"
                config = config[part]


def test_the_patterns_find_commands():
    """So that the test above cannot become empty."""
    found = COMMAND.search("run `python -m experiments.train --config=configs/moe_1b.py:small --config.steps=3 --eval_only` now")
    assert found[1] == "train" and found[2].split() == ["--config=configs/moe_1b.py:small", "--config.steps=3", "--eval_only"]
    assert sum(len(COMMAND.findall(text_of(d))) for d in WITH_COMMANDS if d != "README.md") >= 6


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_files_and_targets_exist(document):
    example = code_block("CONTRIBUTING.md", "registry line").split('"')[3].split(":")[0].replace(".", "/") + ".py"
    text = text_of(document)
    for name in re.findall(r"`((?:[\w]+/)+[\w.]*?(?:\.py|\.ipynb|/))`", text):
        assert name == example or any((base / name).exists() for base in (ROOT, ROOT / "effmodels")), f"{document}: there is no {name}"
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"(?:^ {4}|`|^)(?:\w+=\S+ )*make (\w+)", text, re.MULTILINE):
        assert target in targets, f"{document}: the Makefile has no target {target!r}"


def test_the_tpu_page_says_what_was_not_run():
    text = text_of("docs/tpu.md")
    assert "**Nothing on this page was run on a TPU" in text.split("\n## ")[0]
    for section in text.split("\n## ")[1:]:
        if "gcloud" in section:
            assert "not run" in section, section.splitlines()[0]

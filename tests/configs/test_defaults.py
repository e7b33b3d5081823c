"""The defaults written in configs/common.py, which loads without jax, are those of the code."""
import dataclasses

from configs import common
from effmodels import data
from effmodels.config import ModelConfig
from effmodels.parallel import axes
from effmodels.train import run_config

SECTIONS = {
    "train": run_config.TrainConfig, "checkpoint": run_config.CheckpointConfig, "eval": run_config.EvalConfig, "log": run_config.LogConfig,
}  # fmt: skip


def defaults(cls):
    return {
        f.name: f.default if f.default is not dataclasses.MISSING else f.default_factory()
        for f in dataclasses.fields(cls)
        if f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING
    }


def test_model_fields_and_defaults():
    given = common.model().to_dict()
    assert set(given) == {f.name for f in dataclasses.fields(ModelConfig)}
    for name, value in defaults(ModelConfig).items():
        assert given[name] == value or (not given[name] and not value), name


def test_sections():
    base = common.base().to_dict()
    for section, cls in SECTIONS.items():
        assert {k: v or None for k, v in base[section].items()} == {k: v or None for k, v in defaults(cls).items()}, section


def test_data_fields():
    known = data.defaults()
    for name, value in common.data().to_dict().items():
        assert known[name] == value, name


def test_rules_name_every_dim():
    assert set(common.base().rules) == {*axes.DIMS, axes.PRIORITY}
    assert axes.make_rules(common.base().rules) == axes.make_rules()
    assert dict(axes.make_rules({"batch": "data,fsdp", "heads": "none"}))["batch"] == ("data", "fsdp")

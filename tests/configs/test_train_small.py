"""Every config family trains two steps in its small form."""
import jax
import numpy as np
import pytest

from effmodels.train import metrics
from effmodels.train.loop import train
from tests.configs.catalogue import distinct_short, load

DEFAULT = ("quickstart",)


@pytest.mark.parametrize(
    "name,argument", [pytest.param(n, a, marks=() if n in DEFAULT else pytest.mark.slow, id=f"{n}-{a}") for n, a in distinct_short()]
)
def test_two_steps(name, argument, tmp_path):
    for i in range(30):
        (tmp_path / f"f{i}.py").write_text("\n".join(f"def f{i}_{j}(x, y={j}):\n    return [x * {j}, y + {i}]" for j in range(60)))
    config = load(name, argument)
    config.steps, config.optim.warmup_steps, config.optim.schedule = 2, 1, "constant"
    config.data.cache_dir, config.data.holdout = str(tmp_path / "cache"), 0.2
    if config.data.name == "local":
        config.data.paths = (str(tmp_path),)
    config.eval.at_end, config.eval.every_steps, config.eval.sample_tokens = False, 100, 0
    config.log.every_steps, config.log.tensorboard = 1, "off"
    result = train(config, tmp_path / "run", devices=jax.devices()[:1], log=lambda *_: None)
    losses = [record["loss"] for record in metrics.read(tmp_path / "run")]
    assert result["step"] == len(losses) == 2 and np.all(np.isfinite(losses)), losses

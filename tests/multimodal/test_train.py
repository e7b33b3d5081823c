"""The whole path: images from their source through the train step, a mesh, a resumed run, and generation; and fusions under noise."""
import jax
import numpy as np
import pytest

from effmodels.decode import generate
from effmodels.train import metrics, sources
from effmodels.train.loop import train
from effmodels.train.restore import load_run
from experiments import fusion
from tests.configs.catalogue import load
from tests.data.test_images import PHOTO

pytestmark = pytest.mark.slow


def run(name, folder, cache, devices, steps=4, **mesh):
    config = load(name, "small")
    config.steps, config.batch_size, config.optim.warmup_steps, config.optim.schedule = steps, 8, 1, "constant"
    config.data.cache_dir, config.mesh.data = str(cache), 1
    config.mesh.update(mesh)
    config.eval.at_end, config.eval.every_steps, config.eval.sample_tokens, config.checkpoint.every_steps = False, 100, 0, 2
    config.log.every_steps, config.log.tensorboard = 1, "off"
    train(config, folder, devices=jax.devices()[:devices], log=lambda *_: None)
    return [record["loss"] for record in metrics.read(folder)]


@pytest.mark.parametrize("name", ["flamingo_9b", "gemini_style_multimodal"])
def test_one_device_a_mesh_and_a_resumed_run_are_the_same(name, tmp_path):
    one = run(name, tmp_path / "one", tmp_path / "cache", 1)
    mesh = run(name, tmp_path / "mesh", tmp_path / "cache", 8, data=2, fsdp=2, tensor=2)
    assert len(one) == 4 and np.allclose(one, mesh, rtol=2e-5), (one, mesh)
    assert one[-1] < one[0]
    run(name, tmp_path / "resumed", tmp_path / "cache", 1, steps=2)
    assert run(name, tmp_path / "resumed", tmp_path / "cache", 1) == one  # the saved run knows the steps of neither
    model, tokenizer, step = load_run(tmp_path / "one", log=lambda *_: None)
    row, memory = sources.with_image(model, tokenizer, PHOTO, tokenizer.encode("a "))
    written = np.asarray(generate(model, np.array([row]), 5, memory=memory))
    assert step == 4 and written.shape == (1, len(row) + 5)


def test_fusions_where_one_modality_is_noise():
    """A gate learns to trust the image if it shows something and the word if it does not, and is no worse than concatenation."""
    result = {name: fusion.run(name, 0.5, 0, 600) for name in ("gate", "concat")}
    gate, concat = result["gate"], result["concat"]
    assert gate["clean"] > 0.97 and gate["image noise"] > 0.9 and gate["word noise"] > 0.9, gate
    assert np.mean([gate[k] - concat[k] for k in ("clean", "image noise", "word noise")]) > -0.02, result
    assert gate["text share, image noise"] > gate["text share, clean"] + 0.01, gate
    always = fusion.run("gate", 0.0, 0, 600)
    assert always["clean"] > 0.99 and always["image noise"] < gate["image noise"], always

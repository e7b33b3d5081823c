"""Fusions compared where one of two modalities is noise: each model names a class that an image shows and a word says.

    python -m experiments.fusion [--noise=0.0,0.5 --seeds=3 --steps=600 --json=out.json]

With probability p one of the two, either as often, is noise: the image then is noise that can be seen to be noise, the word is that of
another class, which by itself looks like any. Who trusts the image if it shows something and the word if it does not is always right.
All models have the same number of parameters within 1 %. Letters: B rows, T tokens, K classes, D model.
"""
import functools
import json
import time

from absl import flags

from experiments import common

_NOISE = flags.DEFINE_list("noise", ["0.0", "0.5"], "probabilities that one modality is noise")
_SEEDS = flags.DEFINE_integer("seeds", 3, "runs of each model, whose mean and spread are printed", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 600, "of each run, of 64 rows", lower_bound=1)
_JSON = flags.DEFINE_string("json", "", "also write the result here")
CLASSES, SIDE, PATCH, ROWS, TEST_ROWS, RATE = 8, 8, 4, 64, 2048, 3e-3
PLACES = (SIDE // PATCH) ** 2  # tokens that stand for the image
WORDS, ANSWERS, BOS, IMAGE, EQUALS = 0, CLASSES, 2 * CLASSES, 2 * CLASSES + 1, 2 * CLASSES + 2
CLUE = 1 + PLACES  # the word's place in the row


def config(fusion):
    """A ModelConfig of two layers; what a fusion has fewer parameters than the others, its feed-forward layers have more."""
    mixers, pattern, channel = {"attention": {"num_heads": 2}}, ("attention",), ("mlp",)
    channels, layers = {"mlp": {"hidden": 75 if fusion == "soft_tokens" else 64}}, 2
    if fusion == "cross_attention":
        mixers["cross_attention"] = {"num_heads": 2, "head_dim": 8, "memory_dim": 16, "memory_len": PLACES}
        pattern, channel = ("cross_attention", "attention", "attention"), ("gated_mlp", "mlp", "mlp")
        channels["gated_mlp"], layers = {"hidden": 15, "activation": "relu2"}, 3
    encoder = {"kind": "vit", "image_size": SIDE, "patch": PATCH, "channels": 1, "width": 16, "num_layers": 1, "num_heads": 2, "hidden": 32}
    return {
        "vocab_size": 2 * CLASSES + 3, "d_model": 32, "num_layers": layers, "pattern": pattern, "channel": channel, "mixers": mixers,
        "channels": channels, "embed_scale": 32**0.5, "media": {"encoder": encoder, "fusion": fusion},
    }  # fmt: skip


def rows(rng, count, noise):
    """(batch, class [B], image is noise [B], word is noise [B]); the answer is the target of the last token."""
    import numpy as np

    templates = np.random.default_rng(0).choice([-1.0, 1.0], (CLASSES, SIDE * SIDE))
    truth, one = rng.integers(0, CLASSES, count), rng.random(count) < noise
    image_noise = one & (rng.random(count) < 0.5)
    word_noise = one & ~image_noise
    pixels = templates[truth] + 0.5 * rng.standard_normal((count, SIDE * SIDE))
    pixels = np.where(image_noise[:, None], 1.1 * rng.standard_normal(pixels.shape), pixels)  # of the same size
    word = np.where(word_noise, (truth + rng.integers(1, CLASSES, count)) % CLASSES, truth)
    tokens = np.full((count, CLUE + 2), IMAGE, np.int32)
    tokens[:, 0], tokens[:, CLUE], tokens[:, CLUE + 1] = BOS, WORDS + word, EQUALS
    targets, weights = np.zeros_like(tokens), np.zeros(tokens.shape, np.float32)
    targets[:, -1], weights[:, -1] = ANSWERS + truth, 1.0
    cut = pixels.reshape(count, SIDE // PATCH, PATCH, SIDE // PATCH, PATCH).transpose(0, 1, 3, 2, 4).reshape(count, 1, PLACES, -1)
    batch = {"tokens": tokens, "targets": targets, "weights": weights, "source_patches": cut.astype(np.float32)}
    return batch | {"source_index": np.ones((count, 1), np.int32)}, truth, image_noise, word_noise


@functools.cache
def programs(fusion):
    """(init(key), train(params, state, batch), answers(params, batch) -> (class [B], the text's share of the gate [B] or None), size)."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    from effmodels.models import Decoder
    from effmodels.models import state as model_state

    graphdef, abstract, _ = model_state.split(nnx.eval_shape(lambda: Decoder(config(fusion), rngs=nnx.Rngs(0))))
    optimizer = optax.adamw(RATE, weight_decay=0.01)

    @jax.jit
    def init(key):
        params = model_state.split(Decoder(config(fusion), rngs=nnx.Rngs(key)))[1]
        return params, optimizer.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train(params, state, batch):
        gradient = jax.grad(lambda p: model_state.merge(graphdef, p, {}).loss(batch).loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def answers(params, batch):
        model = model_state.merge(graphdef, params, {})
        memory, tokens = model.media(batch["source_patches"], batch["source_index"]), batch["tokens"]
        chosen = jnp.argmax(model(tokens, memory={"source": memory})[:, -1, ANSWERS : ANSWERS + CLASSES], axis=-1)
        if fusion != "gate":
            return chosen, None
        image = model.media.prepare(memory).x_BSD
        return chosen, jnp.mean(model.media.fusion.openness(model.embedded(tokens[:, CLUE : CLUE + 1]), image), axis=(1, 2))

    return init, train, answers, sum(a.size for a in abstract.values())


def run(fusion, noise, seed, steps):
    """Accuracies of one trained model on new rows: clean, with noise as the image, as the word; and the gate's text share."""
    import jax
    import numpy as np

    init, train, answers, _ = programs(fusion)
    (params, state), rng = init(jax.random.key(seed)), np.random.default_rng([seed, 1])
    for _ in range(steps):
        params, state = train(params, state, rows(rng, ROWS, noise)[0])
    batch, truth, image_noise, word_noise = rows(np.random.default_rng([seed, 2]), TEST_ROWS, 0.5)
    chosen, share = answers(params, batch)
    right, clean = np.asarray(chosen) == truth, ~(image_noise | word_noise)
    parts = {"clean": clean, "image noise": image_noise, "word noise": word_noise}
    shares = {} if share is None else {f"text share, {name}": float(np.asarray(share)[where].mean()) for name, where in parts.items()}
    return {name: float(right[where].mean()) for name, where in parts.items()} | shares


def table(noises, seeds, steps, say):
    """{(fusion, noise): [result of every seed]}, a line printed for each."""
    import numpy as np

    from effmodels.multimodal.registry import FUSIONS

    found = {}
    say(f"{'fusion':16s} {'parameters':>10s} {'p':>5s}  accuracy if clean / image noise / word noise; the text's share of the gate too")
    for fusion in FUSIONS:
        for noise in noises:
            results = found[fusion, noise] = [run(fusion, noise, seed, steps) for seed in range(seeds)]
            mean, spread = ({k: f([r[k] for r in results]) for k in results[0]} for f in (np.mean, np.std))
            cells = [f"{mean[k]:.3f} +- {spread[k]:.3f}" for k in ("clean", "image noise", "word noise")]
            share = " / ".join(f"{v:.3f}" for k, v in mean.items() if k.startswith("text share"))
            say(f"{fusion:16s} {programs(fusion)[3]:10,} {noise:5.2f}  {' / '.join(cells)}  {share}")
    return found


def main(argv):
    del argv
    common.set_up_jax()
    import jax

    begun = time.perf_counter()
    found = table([float(p) for p in _NOISE.value], _SEEDS.value, _STEPS.value, common.say)
    where = f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {time.perf_counter() - begun:.0f} s"
    common.say(f"{_SEEDS.value} seeds, {_STEPS.value} steps of {ROWS} rows; {where}")
    if _JSON.value:
        with open(_JSON.value, "w") as f:
            json.dump([{"fusion": fusion, "noise": noise, "results": r} for (fusion, noise), r in found.items()], f, indent=1)


if __name__ == "__main__":
    common.run(main)
